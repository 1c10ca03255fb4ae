"""attach() and the handle it returns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

from torch import nn

from .budget import REFERENCE_TEXT, Scope
from .call import Call
from .compat import warn_if_untested
from .compatibility import checked_signals
from .errors import AlreadyAttachedError, NotCopyable, OptionError
from .methods import Spec, build_method
from .methods.base import Method
from .observer import Observer
from .report import Report, describe_signals, without_beam_copies
from .saving import Folder, write_saved
from .selection import Newlines
from .stages import Stages, one_of, stages_of


def attach(
    model: nn.Module,
    method: Spec,
    *,
    keep_ratio: float | Sequence[float] | None = None,
    keep_tokens: int | Sequence[int] | None = None,
    flops_ratio: float | None = None,
    flops_scope: Scope = "llm",
    flops_text: int = REFERENCE_TEXT,
    positions: Literal["auto", "contiguous", "original"] = "auto",
    newlines: Newlines = "auto",
    replay: Sequence[Any] | None = None,
    **options: Any,
) -> Attachment:
    """Let a model's language model see fewer visual tokens, until `detach` or the end of a `with` block.

    Args:
        model: a Hugging Face multimodal model; a PEFT model is unwrapped.
        method: a name ("vtc_cls"), a specification ("vtc_cls:start_layer=22"), a method object, or a list of
            them. See `tokprune.list_methods()`. Start with "vtc_cls" where the tower has a [CLS] token and
            with "fopru" elsewhere.
        keep_ratio: fraction of each image's visual tokens to keep, in (0, 1]. Start with 0.25. Between decoder layers:
            what is left after the last cut, of what the language model is given. For two methods a list has one for
            each; a single fraction is what both leave together, each the square root of it.
        keep_tokens: number of each image's visual tokens to keep, instead of a fraction.
        flops_ratio: fraction of the unpruned FLOPs to spend, instead of a number of tokens, in (0, 1]; solved for
            each image beside `flops_text` text tokens.
        flops_scope: "llm" counts the language model, "prefill" everything up to the first token.
        flops_text: text tokens of the prompt.
        positions: "contiguous" renumbers the kept tokens without gaps, "original" leaves them their numbers;
            "auto" is what papers measure for the model's family.
        newlines: of models that end every row of a picture with one: "keep_rows_with_tokens" keeps those of rows
            that keep a token, "keep" all, "drop" none; "auto" is the first, or what the method says. They are not
            counted in a budget.
        replay: what another attachment `kept`, one entry an image, instead of selecting anew; it takes no budget.
        **options: options of the method, such as start_layer=22.

    Returns:
        The handle: a context manager with `report`, `paused()` and `detach()`.

    Raises:
        TokPruneError: in one of its kinds, before the model is touched.
    """
    from .integrations.transformers import adapter_for

    if "keep" in options:
        raise OptionError("keep is no option; type keep_ratio=0.25 (a fraction) or keep_tokens=64 (a count)")
    built, label = build_method(method, options)
    stages = stages_of(built, label, (keep_ratio, keep_tokens, flops_ratio), (flops_scope, flops_text), replay)
    adapter = adapter_for(model)
    warn_if_untested()
    one_of("positions", positions, ("auto", "contiguous", "original"))
    one_of("newlines", newlines, get_args(Newlines))
    positions = adapter.default_positions if positions == "auto" else positions
    adapter.check_attention(positions)
    signals = frozenset() if replay is not None else checked_signals(stages.first, label, adapter)
    stages.check(adapter.decoder, adapter.shape)
    current = (getattr(getattr(adapter.base, n), "_tokprune_attachment", None) for n in adapter.encode_functions)
    owners = [owner for owner in current if owner is not None]
    if owners:
        raise AlreadyAttachedError(f"this model already has an attachment ({owners[0].label}); call its detach() first")
    return Attachment(adapter, built, stages, positions, newlines, signals)


class Attachment(NotCopyable):
    """The handle of an attached model; a context manager. Made by `attach`.

    A call is one generate() or one forward of the user, whatever passes are made inside of it. In the thread that made
    the attachment, `report` and `kept` are of the last call of any thread, such as a streamer's; other threads see
    their own last call.

    Attributes:
        method: the method object.
        label: the method as it was asked for.
        budget: the budget, or None for a method without one; a pair for two methods that take one each.
        positions: "contiguous" or "original".
        newlines: which newlines stay.
    """

    def __init__(self, adapter, method: Method, stages: Stages, positions, newlines: Newlines, signals):
        self.adapter, self.positions, self._stages = adapter, positions, stages
        self.method, self.label, self.budget = method, stages.label, stages.budget
        self._observer = Observer(adapter, stages, positions, newlines, signals)
        self.newlines = self._observer.selector.newlines
        self._observer.install()
        for name in adapter.encode_functions:
            getattr(adapter.base, name)._tokprune_attachment = self

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def __repr__(self):
        return f"Attachment({self.label!r}, {self._stages.budget_text or 'no budget'}, positions={self.positions!r})"

    def detach(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._observer.hooks.close()

    def save(self, directory: Folder) -> None:
        """Write methods with all options, budget, positions, newlines and the methods' files to a folder, for `load`.

        Nothing of the model is written. What was saved there before is replaced, other files stay. Salts are not saved.

        Raises:
            SavedError: a replay, a method without a name in the registry, or a folder that cannot be written.
        """
        write_saved(directory, self.adapter, self.method, self._stages, self.positions, self.newlines)

    @property
    def salts(self) -> Sequence[int]:
        """Integers that seeded methods mix in, one an image or one for all; a harness sets one a sample."""
        return self._observer.salts

    @salts.setter
    def salts(self, salts: Sequence[int]) -> None:
        self._observer.salts = salts

    def paused(self) -> AbstractContextManager[None]:
        """The bare model inside a `with` block; nests. Pruned caches are still served.

        The block counts for its thread, for asyncio.to_thread, and, in the thread that made the attachment, for threads
        that are started inside of it. In a thread of a pool pause inside of the function that runs there.
        """
        return self._observer.pauses.hold()

    @property
    def report(self) -> Report:
        """What the last call did."""
        call, observer = self._call or Call(), self._observer
        return Report(
            method=self.label,
            budget=self._stages.budget_text,
            signals=describe_signals(observer.signals),
            n_layers=len(self.adapter.language_model.layers),
            images=without_beam_copies(call.images, call.rows),
            encoded=call.images,
            prefills=list(call.prefills),
            clamped=call.clamped,
            between=observer.cutter is not None,
            shape=self.adapter.shape,
            bytes_per_value=self.adapter.language_model.dtype.itemsize,
        )

    @property
    def kept(self) -> list[Any]:
        """Indices of the kept rows of each image of the last call, ascending, int64 on the CPU.

        Where decoder layers are cut, {layer: indices}: what is left from that layer on, 0 for before the first.
        """
        between = self._observer.cutter is not None
        return [image.kept_by_layer if between else image.kept for image in self.report.images]

    @property
    def _call(self) -> Call | None:
        """The call to be reported to this thread."""
        observer, newest = self._observer, self._observer.newest
        own = observer.passes.calls
        if newest is None or (own.shown is not None and not observer.pauses.is_holder):
            return own.shown
        return newest.shown
