"""What holds for every case. `check` raises Broken with the case as code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tiny
import torch
from fuzz import around
from fuzz.calls import Run, Told
from fuzz.cases import Case
from fuzz.choices import check_choices, check_draws
from fuzz.expected import check_counts, check_newlines, embeds_of, filled, logits_of, newlines_of
from fuzz.methods import keeps_features
from fuzz.prompts import Batch, Shown
from fuzz.refusals import is_allowed

import tokprune

EXACT = {"float64": 1e-9, "float32": 2e-3, "bfloat16": None}
EAGER = 1e-4  # its softmax is in single precision
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Broken(AssertionError):
    """A law does not hold."""


class Invalid(Exception):
    """The bare model does not take this call either."""


def check(case: Case) -> str:
    """Hold a case against all laws.

    Returns:
        "pruned", "refused" or "invalid": which of the fates of a case it was.

    Raises:
        Broken: with the case as code that can be pasted.
    """
    try:
        return _check(case)
    except Invalid:
        return "invalid"
    except Exception as error:
        raise Broken(
            f"{type(error).__name__}: {error}\n\nfrom fuzz.cases import Case\nfrom fuzz.laws import check\n"
            f"check({case!r})"
        ) from error


def tolerance_of(case: Case) -> float | None:
    """How far logits may be off; None where they are not compared."""
    return EAGER if (case.dtype, case.attn) == ("float64", "eager") else EXACT[case.dtype]


def batch_of(case: Case) -> Batch:
    return Batch(case.kind, DTYPES[case.dtype], case.rows, case.texts, case.side)


def _check(case: Case) -> str:
    own = around.needs_own_model(case)
    make = tiny.fresh_model if own else tiny.model
    model, batch = make(case.kind, case.attn, DTYPES[case.dtype]), batch_of(case)
    bare = run_bare(case, model, batch)
    if not any(line.images for line in batch.lines):  # transformers hooks a tower when it first runs
        plain_logits(model, around.other(case))
    before, hooks = plain_logits(model, batch), hooks_of(model)
    try:
        with around.attached(case, model) as attachment:
            run, alone = run_pruned(case, model, batch, attachment)
    except tokprune.TokPruneError as error:
        if "\n" in str(error) or not is_allowed(case, str(error)):
            raise Broken(f"refused: {type(error).__name__}: {error}") from error
        run = None
    assert hooks_of(model) == hooks, "hooks or wrapped functions are left behind after detach()"
    if not own:
        assert around.same(plain_logits(model, batch), before), "the bare model computes something else after detach()"
    if run is None:
        return "refused"
    check_told(case, model, bare, bare=True)
    check_again(case, model, batch, run)
    check_kept(case, model, run)
    check_told(case, model, run, bare=False)
    check_finite(run, bare)
    check_everything_kept(case, run, bare)
    check_alone(case, run, alone)
    return "pruned"


def hooks_of(model) -> list[tuple[int, ...]]:
    """Hooks of every module, and the names that stand on it; what torch.compile writes there is the caller's."""

    def names(module) -> int:
        return len(vars(module).keys() - {"_compiled_call_impl"})

    return [(len(m._forward_hooks), len(m._forward_pre_hooks), names(m)) for m in model.modules()]


RANDOM = ("sample", "several", "sampled beams")


def run_again(case: Case, model, batch: Batch, attachment, run: Run) -> None:
    """The same call behind others tells the same; so does one without cache where that is defined."""
    if case.salts is not None:
        attachment.salts = case.salts
    if case.seed % 3 == 0 and case.around != "nested":
        again = Run(case, model, batch, attachment).go()
        check_same(run, again, "a second time", 0)
    if case.way == "generate" and (case.how or {}).get("mode") == "greedy" and is_merging(case):
        uncached = replace(case, how={**(case.how or {}), "mode": "uncached"})
        check_same(run, Run(uncached, model, batch, attachment).go(), "without cache", 1e-4)


def is_merging(case: Case) -> bool:
    """Whether indices do not tell everything, in numbers that can be compared."""
    return case.dtype == "float64" and not keeps_features(case.method)


def check_same(run: Run, other: Run, when: str, tolerance: float) -> None:
    for told, same in zip(run.told, other.told, strict=True):
        assert told.line.ids == same.line.ids, f"row {told.row}: other tokens {when}"
        assert told.score == same.score, f"row {told.row}: another score {when}"
        off = (told.logits - same.logits).abs()
        worst = float(off.max()) if off.numel() else 0.0
        assert worst <= tolerance, f"row {told.row}: logits differ by {worst:.3g} {when}"


def check_again(case: Case, model, batch: Batch, run: Run) -> None:
    """What was kept, replayed by another attachment, tells the same."""
    modes = ("greedy", "stopping", "uncached", None)
    plain = case.way in ("forward", "by_hand") or (case.way == "generate" and (case.how or {}).get("mode") in modes)
    if case.seed % 4 or not plain or case.around != "nothing" or not keeps_features(case.method):
        return
    options = {"positions": case.positions, "newlines": case.newlines}
    with tokprune.attach(model, case.method, **options, replay=run.turns[0].kept) as attachment:
        check_same(run, Run(case, model, batch, attachment).go(), "when replayed", 1e-12)


def run_bare(case: Case, model, batch: Batch) -> Run:
    """The same call of the bare model; the case is invalid where it does not take it."""
    try:
        run = Run(case, model, batch).go()
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    if any(not told.logits.isfinite().all() or told.score != told.score for told in run.told):
        raise Invalid
    return run


@torch.no_grad()
def plain_logits(model, batch: Batch):
    return model(**batch.inputs()).logits


def run_pruned(case: Case, model, batch: Batch, attachment) -> tuple[Run, list[Run]]:
    """The call, and every row alone."""
    if case.salts is not None:
        attachment.salts = case.salts
    run = Run(case, model, batch, attachment)
    around.AROUND[case.around](run)
    alone = []
    if len(batch.rows) > 1 and (case.how or {}).get("mode") not in RANDOM:
        rows = [r for image, r in zip(batch.images(), batch.image_rows(), strict=True)]
        for r in range(len(batch.rows)):
            if case.salts is not None:
                own = tuple(salt for salt, row in zip(case.salts, rows, strict=True) if row == r)
                attachment.salts = own or (0,)
            single = replace(case, rows=(case.rows[r],), texts=(case.texts[r],))
            alone.append(Run(single, model, batch.alone(r), attachment, first=r).go())
    run_again(case, model, batch, attachment, run)
    return run, alone


# ---------------------------------------------------------------------------------------- laws


def check_told(case: Case, model, run: Run, bare: bool) -> None:
    """Logits equal the hand-built sequence's."""
    tolerance = tolerance_of(case)
    if tolerance is None or not (bare or keeps_features(case.method)):
        return
    positions = run.attachment.positions if run.attachment else "contiguous"
    for told in run.told:
        want, alive = logits_of(model, replace(case, positions=positions), told.line, DTYPES[case.dtype], told.offset)
        what = f"row {told.row}" + (" of the bare model" if bare else "")
        held, known = filled(want, alive, 0)
        if case.way != "turns":  # what stands in dropped columns, and is answered from where a prompt ends with them
            want, alive = held, known
        if told.score is not None:
            check_score(told, want, tolerance, what)
            continue
        stays = alive[told.at]
        off = (told.logits - want[told.at])[stays].abs().amax(1)
        worst = float(off.max()) if len(off) else 0.0
        assert worst < near(told, tolerance), (
            f"{what}: logits differ by {worst:.3g} from the short sequence, {first(told, off)}"
        )


def near(told: Told, tolerance: float) -> float:
    """What generate() returns is in single precision whatever the model's."""
    return max(tolerance, 1e-5) if told.logits.dtype == torch.float32 else tolerance


def first(told: Told, off) -> str:
    wrong = [c for c, value in zip(told.at, off.tolist(), strict=False) if value > 1e-6]
    return f"at columns {wrong[:8]} of {len(told.line.ids)}"


def check_score(told: Told, want, tolerance: float, what: str) -> None:
    """A beam's score is the mean log-probability of its tokens."""
    probabilities = want[told.at].double().log_softmax(-1)
    new = torch.tensor(told.line.ids[-told.n_new :])
    score = float(probabilities.gather(1, new[:, None]).sum()) / told.n_new
    assert abs(score - (told.score or 0)) < max(tolerance, 1e-5), f"{what}: a beam scores {told.score}, not {score}"


def check_kept(case: Case, model, run: Run) -> None:
    """Counts, newlines and choices of every picture; lengths of layers and report."""
    for number, turn in enumerate(run.turns):
        check_turn(case, model, turn, number, run)
        for line in turn.lines:
            features = embeds_of(model, case, line, DTYPES[case.dtype])
            last = max((i.start + i.n for i in line.images), default=0)
            for image in line.images:
                newline = newlines_of(model, features[image.start : image.start + image.n])
                check_counts(case, image, newline, has_text_behind=last < len(line.ids))
                check_newlines(case, image, newline)
            if number == 0:
                check_choices(case, line)
    if run.turns:
        images = [image for line in run.turns[0].lines for image in line.images]
        check_draws(case, images, [image.n for image in images])


def check_turn(case: Case, model, turn, number: int, run: Run) -> None:
    """What layers saw is what is told, and what follows from what was kept."""
    mode = (case.how or {}).get("mode", case.way)
    if mode in ("chunked", "uncached", "lookup") or case.around == "nested" or turn.extra is None:
        return
    reported = turn.report["layers"]
    assert reported == turn.widths, f"the report has layers {reported}, they saw {turn.widths}"
    width = turn.batch.width + turn.extra
    assert turn.report["prompt_columns"] == width, f"{turn.report['prompt_columns']} columns told of {width}"
    wanted = []
    for layer in range(len(turn.widths)):
        lengths = [
            turn.extra + len(line.ids) - sum(i.n - len(i.left(layer)) for i in line.images) for line in turn.lines
        ]
        touched = any(len(i.left(layer)) < i.n for line in turn.lines for i in line.images)
        wanted.append(max(lengths) if touched else width)
    assert turn.widths == wanted, f"layers saw {turn.widths} columns; what was kept makes {wanted}"
    if number == 0 and turn.n_cached is not None:
        assert turn.n_cached[: len(wanted)] == wanted, f"the cache holds {turn.n_cached}, layers saw {wanted}"


def check_finite(run: Run, bare: Run) -> None:
    for told in run.told:
        assert told.logits.isfinite().all(), f"row {told.row}: logits are not finite"


def check_everything_kept(case: Case, run: Run, bare: Run) -> None:
    """Where everything is kept the model is the bare one, to the bit."""
    budget, pictures = case.budget or {}, any(line.images for told in run.told for line in [told.line])
    whole = budget.get("keep_ratio") == 1.0 or budget.get("keep_tokens") == 10_000
    if pictures and (not whole or "+" in case.method):
        return
    for told, same in zip(run.told, bare.told, strict=True):
        assert told.line.ids == same.line.ids, "everything is kept, and the tokens are others"
        assert torch.equal(told.logits, same.logits), "everything is kept, and the logits are others"


def check_alone(case: Case, run: Run, alone: list[Run]) -> None:
    """Every row of a batch equals the row alone."""
    tolerance = tolerance_of(case)
    if tolerance is None or case.dtype != "float64":
        return
    for r, single in enumerate(alone):
        for turn, own in zip(run.turns, single.turns, strict=False):
            for a, b in zip(turn.lines[r].images, own.lines[0].images, strict=True):
                if has_no_rank(case, a):
                    continue
                same = a.kept.keys() == b.kept.keys() and all(torch.equal(a.kept[k], b.kept[k]) for k in a.kept)
                assert same, f"row {r} keeps {shown(a.kept)}, alone {shown(b.kept)}"
        if any(has_no_rank(case, image) for turn in single.turns for image in turn.lines[0].images):
            continue
        together = [told for told in run.told if told.row == r]
        for told, own in zip(together, single.told, strict=False):
            assert told.line.ids == own.line.ids, f"row {r} has tokens {told.line.ids[-6:]}, alone {own.line.ids[-6:]}"
            if told.score is not None:
                assert abs(told.score - (own.score or 0)) < 1e-5, f"row {r}: a beam scores otherwise alone"
                continue
            both = [(i, own.at.index(c)) for i, c in enumerate(told.at) if c in own.at]
            i, j = zip(*both, strict=True) if both else ((), ())
            off = (told.logits[list(i)] - own.logits[list(j)]).abs()
            worst = float(off.max()) if off.numel() else 0.0
            # The angles of positions are in single precision.
            exact = told.offset == own.offset and keeps_features(case.method)  # merges are in single precision
            most = near(told, tolerance) if exact else 1e-4
            assert worst < most, f"row {r}: logits differ by {worst:.3g} from the row alone"


def has_no_rank(case: Case, image: Shown) -> bool:
    """Beyond the rank of features of width 64, what cdpruner adds hangs on rounding."""
    return "cdpruner" in case.method and len(image.left(0)) > 48


def shown(kept: dict[int, Any]) -> dict[int, list[int]]:
    return {layer: rows.tolist() for layer, rows in kept.items()}
