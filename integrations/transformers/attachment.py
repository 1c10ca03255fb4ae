"""attach() and the handle it returns."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokprune.core.errors import AlreadyAttachedError, NotCopyable, OptionError, UnsupportedModelError
from tokprune.core.signals import Signal
from tokprune.methods import Labelled
from tokprune.prune.copies import folded
from tokprune.prune.report import Report, describe_signals
from tokprune.prune.request import Request, request_of
from tokprune.prune.saved import Folder, write_saved
from tokprune.prune.supply import checked_signals

from .calibrate import Calibrator
from .compat import warn_if_untested
from .families import family_of
from .families.base import ModelFamily
from .observer import Observer
from .passes import Call

LOG = logging.getLogger("tokprune")


def attach(model: nn.Module, request: Request) -> Attachment:
    """Attach to a model what was asked for; see `tokprune.attach`.

    Raises:
        TokPruneError: in one of its kinds, before the model is touched.
    """
    family = family_of(model)
    warn_if_untested()
    if request.before is not None and request.before.keeps_positions:
        if request.positions == "contiguous":
            raise OptionError(
                f"{request.label!r} keeps the positions of tokens; leave positions='contiguous' or calibrate out"
            )
        request = replace(request, positions="original")
    if request.attention_bias is not None:
        Calibrator(family, request.attention_bias)
    if request.positions == "auto":
        request = replace(request, positions=family.default_positions)
    family.check_positions(request.positions)
    family.check_attention(request.positions)
    before = None if request.replay else request.before
    signals = checked_signals(before, request.label, family.supply) if before else frozenset()
    if request.between is not None and family.no_layer_cuts:
        raise UnsupportedModelError(
            f"{request.label!r} cuts between decoder layers, which {family.model_type!r} does not allow: "
            f"{family.no_layer_cuts}. Use a method that acts before the language model, such as 'divprune'"
        )
    request.check(family.decoder, family.shape)
    current = (getattr(getattr(family.base, n), "_tokprune_attachment", None) for n in family.encode_functions)
    owners = [owner for owner in current if owner is not None]
    if owners:
        raise AlreadyAttachedError(f"this model already has an attachment ({owners[0].label}); call its detach() first")
    return Attachment(family, request, signals)


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

    def __init__(self, family: ModelFamily, request: Request, signals: frozenset[Signal]):
        self._family, self._request = family, request
        self.method, self.label, self.budget = request.method, request.label, request.budget
        self.positions, self.newlines = request.positions, request.newlines
        self._observer, self._listeners = Observer(family, request, signals), OrderedDict()
        self._observer.on_done = self._tell
        self._observer.install()
        for name in family.encode_functions:
            getattr(family.base, name)._tokprune_attachment = self

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def __setattr__(self, name: str, value: object) -> None:
        if callable(getattr(type(self), name, None)):
            raise AttributeError(f"{name} is a method and cannot be set: call attachment.{name}()")
        super().__setattr__(name, value)

    def __repr__(self):
        return f"Attachment({self.label!r}, {self._request.budget_text or 'no budget'}, positions={self.positions!r})"

    def detach(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._observer.hooks.close()

    def save(self, directory: Folder) -> None:
        """Write methods with all options, budget, positions, newlines and the methods' files to a folder, for `load`.

        Nothing of the model is written. What was saved there before is replaced, other files stay. Salts are not saved.

        Raises:
            SavedError: a replay, a method without a name in the registry, or a folder that cannot be written.
        """
        write_saved(directory, self._family.facts, self._request)

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

    @contextmanager
    def using(
        self, *, keep_ratio: float | None = None, keep_tokens: int | None = None, flops_ratio: float | None = None
    ) -> Iterator[None]:
        """Another budget inside a `with` block, in this thread; nests.

        What was pruned into a cache stays pruned: a block is for whole calls.

        Args:
            keep_ratio: fraction of each image's visual tokens; or
            keep_tokens: their number; or
            flops_ratio: fraction of the language model's FLOPs, as for `attach`.

        Raises:
            OptionError: the method cuts between decoder layers, or keeps a replay.
            BudgetError: a budget that `attach` would refuse.
        """
        asked = self._request
        if asked.between is not None or asked.replay is not None:
            why = "cuts between decoder layers" if asked.between is not None else "replays kept tokens"
            raise OptionError(f"{self.label!r} {why}, which is fixed by attach; detach and attach with another budget")
        budgets = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens, "flops_ratio": flops_ratio}
        request = request_of(
            Labelled(self.method, self.label), **budgets, positions=self.positions, newlines=self.newlines
        )
        request.check(self._family.decoder, self._family.shape)
        with self._observer.using(request):
            yield

    def on_call(self, callback: Callable[[Report], None]) -> RemovableHandle:
        """Call back with the report after every call, in the thread that made it.

        An exception of the callback is logged under "tokprune" and never reaches the call.

        Returns:
            a handle: `remove()` ends it, and so does the end of a `with` block.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = callback
        return handle

    def _tell(self, call: Call) -> None:
        """Log a call, and tell those who asked for it."""
        if not self._listeners and not LOG.isEnabledFor(logging.INFO):
            return
        report = self._report_of(call)
        LOG.info("%s", report)
        for callback in list(self._listeners.values()):
            try:
                callback(report)
            except Exception:
                LOG.exception("a callback of on_call failed")

    @property
    def report(self) -> Report:
        """What the last call did."""
        return self._report_of(self._call or Call())

    def _report_of(self, call: Call) -> Report:
        observer = self._observer
        on_cpu = self._family.language_model.device.type == "cpu"
        return Report(
            method=self.label,
            budget=call.budget or self._request.budget_text,
            signals=describe_signals(observer.signals),
            n_layers=len(self._family.language_model.layers),
            images=folded(call.images, call.rows),
            encoded=call.images,
            prefills=list(call.prefills),
            clamped=call.clamped,
            between=observer.cutter is not None,
            shape=self._family.shape,
            bytes_per_value=self._family.language_model.dtype.itemsize,
            rows_of=call.rows_of,
            encode_s=call.encode_s if on_cpu and call.ran else None,
            prefill_s=call.prefill_s if on_cpu and call.ran else None,
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
