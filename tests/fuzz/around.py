"""What happens around a call: pauses, nested calls, other attachments, threads, changes of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tiny
import torch
from fuzz.calls import Run
from fuzz.cases import Case

import tokprune


def needs_own_model(case: Case) -> bool:
    return case.around in ("compiled", "replaced")


@contextmanager
def attached(case: Case, model) -> Iterator:
    """The model with the case's attachment."""
    if case.around == "reattached":
        with tokprune.attach(model, "uniform", keep_tokens=3):
            model(**Run(case, model, other(case)).batch.inputs())
    options = {"positions": case.positions, "newlines": case.newlines, **(case.budget or {})}
    with tokprune.attach(model, case.method, **options) as attachment:
        if case.around == "compiled":
            model.model.language_model.compile(backend="eager")
        if case.around == "replaced":
            plain = tiny.fresh_model(case.kind, case.attn, model.dtype)
            layers = model.model.language_model.layers
            layers[3] = plain.model.language_model.layers[3]
        yield attachment


def other(case: Case):
    """A batch that is not the case's."""
    from fuzz.laws import DTYPES
    from fuzz.prompts import Batch

    return Batch(case.kind, DTYPES[case.dtype], ((1, "p1", 3),), (5,))


def same(a, b) -> bool:
    """To the bit; where the bare model has no numbers in a padded batch there are none."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def nothing(run: Run) -> None:
    run.go()


@torch.no_grad()
def paused(run: Run) -> None:
    """The bare model in between."""
    inputs = run.batch.inputs()
    with run.attachment.paused():
        want = run.model(**inputs).logits
    run.go()
    with run.attachment.paused(), run.attachment.paused():
        assert same(run.model(**inputs).logits, want), "the paused model is another behind a pruned call"


def nested(run: Run) -> None:
    """A hook calls the model with something else while the call is under way."""
    inputs, inside = other(run.case).inputs(), []

    def call_again(module, args, kwargs, out):
        if not inside:
            inside.append(True)
            run.model(**inputs)
            inside.pop()

    hook = run.model.model.language_model.layers[2].register_forward_hook(call_again, with_kwargs=True)
    try:
        run.go()
    finally:
        hook.remove()


class Stop(Exception):
    """Raised in the middle of a call."""


def failed(run: Run) -> None:
    """A call before this one ends in an error, in a layer."""
    inputs = other(run.case).inputs()

    def stop(module, args, kwargs):
        raise Stop

    hook = run.model.model.language_model.layers[run.case.seed % 5].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run.model(**inputs)
    except Stop:
        pass
    finally:
        hook.remove()
    run.go()


@torch.no_grad()
def abandoned(run: Run) -> None:
    """Pictures are encoded before this call, and never used."""
    pixels = {k: v for k, v in other(run.case).inputs().items() if k not in ("input_ids", "attention_mask")}
    run.model.model.get_image_features(**pixels)
    run.go()


def thread(run: Run) -> None:
    """The call runs in a thread, as with a streamer, and is asked about from this one."""
    errors: list[BaseException] = []

    def work():
        try:
            run.go()
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    if errors:
        raise errors[0]
    kept = run.attachment.kept
    last = run.turns[-1].kept
    assert len(kept) == len(last), f"the thread's call kept {len(last)} pictures' tokens, here kept has {len(kept)}"


AROUND: dict[str, Callable[[Run], object]] = {
    "nothing": nothing,
    "paused": paused,
    "nested": nested,
    "reattached": nothing,
    "failed": failed,
    "abandoned": abandoned,
    "thread": thread,
    "compiled": nothing,
    "replaced": nothing,
}
