"""What a thread is doing with an attached model: calls, generations, and passes that may lie inside each other.

A hook of the user may call the model again while a pass is under way. What is known of a pass is kept by pass, so
that the outer one goes on undisturbed. A pass that ended by an exception is known by its frame, which
is no longer on the stack.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor, nn

from tokprune.prune.report import ImageReport, Prefill

from .compat import cache_of
from .hooks import mark_ready

HEAD, BASE, DECODER = range(3)  # where a forward is entered: the model with its head, without, its language model
_MODULE_FILE = nn.Module._call_impl.__code__.co_filename
_BEGUN = itertools.count()


@dataclass
class Call:
    """What one call of the model did: begun by an encode, or by a language-model pass on an empty cache."""

    encoded: set[str] = field(default_factory=set)
    images: list[ImageReport] = field(default_factory=list)
    sizes: list[Tensor | None] = field(default_factory=list)  # of each, how many tokens its kept rows stand for
    prefills: list[Prefill] = field(default_factory=list)
    bad: list[Tensor] = field(default_factory=list)  # whether features held NaN, on the device
    dropped: list[Tensor] = field(default_factory=list)  # whether tokens were dropped, on the device
    mistakes: list[Tensor] = field(default_factory=list)  # of the method, scalars on the device
    below_budget: bool = False  # some image had more tokens than its budget, so some have to be dropped
    touched: bool = False  # a method ran
    pending: list = field(default_factory=list)  # `selection.Encoded`, to be selected when the prompt is known
    marks: list = field(default_factory=list)  # (`prompt.Place`, marked rows, rows before) of what was selected then
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # placeholders of the prompt that they were found in
    by_name: dict[str, range] = field(default_factory=dict)  # places in `images` by encode function
    prompt: Mapping[str, Tensor] = field(default_factory=dict)  # placeholders of the prompt in which layers were cut
    clamped: bool = False
    by_hand: bool = False  # begun by an encode of the user, outside of any generate or forward
    ran: bool = False
    rows: Tensor | None = None  # input_ids whose rows may be beam copies
    counts: dict[str, Tensor] = field(
        default_factory=dict
    )  # placeholders of every row, by encode function, on the device
    budget: str = ""  # that it began with, for the report
    told: bool = False  # to those who listen for calls
    encode_s: float = 0.0
    prefill_s: float = 0.0

    def rows_of(self) -> list[int | None]:
        """The row of the batch of every image in `images`; None where the prompt does not tell."""
        found: list[int | None] = [None] * len(self.images)
        for name, places in self.by_name.items():
            lengths = [len(self.images[i].layout.crop) for i in places]
            counts = self.counts[name].tolist() if name in self.counts else []
            n_copies = sum(counts) // sum(lengths) if sum(lengths) else 0  # beams have copies of a row below each other
            if n_copies < 1 or sum(counts) != n_copies * sum(lengths):
                continue
            own = counts[::n_copies]
            row, left = 0, own[0]
            for place, length in zip(places, lengths, strict=True):
                while left < length and row + 1 < len(own):
                    row, left = row + 1, own[row + 1]
                found[place], left = row, left - length
        return found


@dataclass
class Context:
    """Calls that follow each other.

    Args:
        call: the last one that was begun.
        main: the call that a generation is about, whatever else the model is asked meanwhile.
        waiting: a call whose pictures the user encoded, while text alone runs before they are used.
        begun: rises with every call of any thread.
    """

    call: Call | None = None
    main: Call | None = None
    waiting: Call | None = None
    begun: int = -1

    def begin(self) -> Call:
        """A new call."""
        self.call, self.begun = Call(), next(_BEGUN)
        return self.call

    @property
    def shown(self) -> Call | None:
        """The call to be reported."""
        return self.main or self.call


@dataclass
class Pass:
    """One forward of the model, from where it is entered until it is left there.

    Args:
        context: whose calls it belongs to.
        generation: the generate() that it is a step of.
        inside: calls of what hooks run inside of it.
        masks: placeholders by encode function, (B, S) bool.
        rows: input_ids whose rows may be beam copies.
        ids: input_ids of the pass; None where the caller passed embeddings.
        asked: keywords that the base model was called with.
        facts: read from the device in the one synchronisation of a prefill.
        by_hand: whether the caller made the embeddings.
        joins: whether it was given pictures that the caller encoded.
        n_candidates: draft tokens after the prompt, of assisted decoding.
        n_again: leading columns that the cache holds already.
        aside: the call of a pass that a generation makes for something else.
        started: when, in seconds.
        shortening, layers, prompt, tap: what is under way before and between the decoder layers.
        step: the cache of a step of decoding; None for other passes.
    """

    context: Context
    generation: Generation | None = None
    inside: Context = field(default_factory=Context)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    ids: Tensor | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, int] = field(default_factory=dict)
    by_hand: bool = False
    joins: bool = False
    n_candidates: int = 0
    n_again: int = 0
    aside: Call | None = None
    shortening: Any = None
    layers: Any = None
    prompt: Any = None
    tap: Any = None
    step: Any = None
    started: float = field(default_factory=time.perf_counter)
    entered: dict[int, FrameType | None] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)

    @property
    def call(self) -> Call | None:
        """The call that it belongs to."""
        return self.aside or self.context.call


@dataclass
class Generation:
    """One generate() of the user.

    Args:
        inside: calls of its passes.
        n_rows, n_prompt: rows and columns of its prompt; None where they are not known.
        joins: whether it was given pictures that the caller encoded.
        ready: caches on which its steps run without hooks.
        mask: `shorten.KnownMask` of its last pass.
    """

    inside: Context
    n_rows: int | None
    n_prompt: int | None
    joins: bool
    ready: list[Any] = field(default_factory=list)
    mask: Any = None


@dataclass
class Encoding:
    """One run of an encode function; hooks of the vision tower may call the model, too."""

    name: str = ""
    inside: Context = field(default_factory=Context)
    collected: dict | None = None  # by the tower's taps
    part: Any = None  # `cells.Part`, of what the tower is to run on


class Passes(threading.local):
    """What this thread is doing."""

    def __init__(self) -> None:
        self.calls = Context()
        self._stack: list[Pass | Generation | Encoding] = []

    @property
    def _top(self) -> Pass | Generation | Encoding | None:
        return self._stack[-1] if self._stack else None

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._stack)

    @property
    def current(self) -> Pass | None:
        """The innermost pass, where it is what is under way."""
        return self._top if isinstance(self._top, Pass) else None

    @property
    def generation(self) -> Generation | None:
        """The generation of the user that prepares its next pass; None where something else is under way."""
        self._forget_dead()
        return self._top if isinstance(self._top, Generation) else None

    @property
    def context(self) -> Context:
        """Calls to which an encode function that runs now belongs."""
        self._forget_dead()
        this = self.current
        if this is not None and DECODER not in this.entered and DECODER not in this.left:
            return this.context
        return self._inside

    @property
    def joins(self) -> bool | None:
        """Whether what is under way was given pictures that the caller encoded; None where nothing is."""
        top = self._top
        return top.joins if isinstance(top, Pass | Generation) else None

    @property
    def _inside(self) -> Context:
        """Calls to which a forward that is entered now belongs."""
        return self.calls if self._top is None else self._top.inside

    def enter(self, level: int) -> Pass:
        """A part of the model begins to run; the pass that it belongs to."""
        self._forget_dead()
        this = self.current
        if this is None or level <= max(this.entered) or level in this.left:
            top = self._top
            this = Pass(self._inside, top if isinstance(top, Generation) else None)
            self._stack.append(this)
        this.entered[level] = _frame()
        return this

    def begin_step(self, cache: Any) -> None:
        """The pass that was entered is a step of decoding: only where it was entered is it left."""
        this: Any = self.current
        this.step, this.entered = cache, dict.fromkeys((HEAD, BASE, DECODER), this.entered[HEAD])

    def in_step(self, kwargs: Mapping) -> bool:
        """Whether a call is of a step of decoding that is under way."""
        this = self.current
        if this is None or this.step is None or this.step is not cache_of(kwargs):
            return False
        return _is_running(this.entered[HEAD])

    def idle(self, kwargs: Mapping) -> bool:
        """Whether a step of decoding is under way in which nothing is changed between decoder layers or after them."""
        this = self.current
        return this is not None and this.step is not None and this.shortening is None and this.layers is None

    def leave(self, level: int) -> Pass | None:
        """A part of the model has run; the pass that it belonged to."""
        while (this := self.current) is not None and level not in this.entered:
            self._stack.pop()  # it ended by an exception that somebody caught
        if this is None:
            return None
        if this.step is None:
            del this.entered[level]
        else:
            this.entered.clear()
        this.left.add(level)
        if not this.entered:
            self._stack.pop()
        return this

    @contextlib.contextmanager
    def generating(self, n_rows: int | None, n_prompt: int | None, joins: bool) -> Iterator[None]:
        """A generation of the user runs."""
        self._forget_dead()
        context = Context() if isinstance(self._top, Generation) else self._inside
        context.main = None
        generation = Generation(context, n_rows, n_prompt, joins)
        try:
            with self._pushed(generation):
                yield
        finally:
            for cache in generation.ready:
                mark_ready(cache, False)
            context.call, context.main = context.shown, None

    @contextlib.contextmanager
    def encoding(self, name: str) -> Iterator[Encoding]:
        """An encode function runs."""
        this = Encoding(name)
        with self._pushed(this):
            yield this

    @property
    def encode_function(self) -> str:
        """The encode function that runs; "" where none does."""
        return self._top.name if isinstance(self._top, Encoding) else ""

    @property
    def collecting(self) -> dict | None:
        """What the tower's taps have collected of the picture that is being encoded; None where nothing is."""
        top = self._top
        return top.collected if isinstance(top, Encoding) else None

    @property
    def part(self) -> Any:
        """The part of the pictures that the tower is to run on; None for all, and where nothing is encoded."""
        top = self._top
        return top.part if isinstance(top, Encoding) else None

    @contextlib.contextmanager
    def _pushed(self, scope: Generation | Encoding) -> Iterator[None]:
        depth = len(self._stack)
        self._stack.append(scope)
        try:
            yield
        finally:
            del self._stack[depth:]

    def _forget_dead(self) -> None:
        """Forget passes that ended by an exception."""
        while (this := self.current) is not None and not any(map(_is_running, this.entered.values())):
            self._stack.pop()


def _frame() -> FrameType | None:
    """The frame of the module whose hook runs."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != _MODULE_FILE:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType | None) -> bool:
    found: FrameType | None = sys._getframe(1)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None


# ---------------------------------------------------------------------------------------- pauses

_DEPTHS: ContextVar[Mapping[int, int]] = ContextVar("tokprune_pauses", default={})  # noqa: B039 - never changed


class Pauses:
    """Blocks in which an attachment is paused.

    A block counts for its thread, for what runs in a copy of its context (asyncio.to_thread), and, in the thread that
    made the attachment, for threads that are started while it is open (a streamer's).
    """

    def __init__(self) -> None:
        self._holder = threading.current_thread()
        self._alive: list[set[threading.Thread]] = []  # threads that were there when the holder's blocks were opened

    @property
    def is_holder(self) -> bool:
        """Whether this is the thread that made the attachment."""
        return threading.current_thread() is self._holder

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Paused inside of this block."""
        self._add(1)
        alive = set(threading.enumerate()) if self.is_holder else None
        if alive is not None:
            self._alive.append(alive)
        try:
            yield
        finally:
            self._add(-1)
            if alive is not None:
                self._alive.remove(alive)

    @property
    def hold_here(self) -> bool:
        """Whether what runs here is paused."""
        if _DEPTHS.get().get(id(self)):
            return True
        if not self._alive:
            return False
        this = threading.current_thread()
        return any(this not in alive for alive in self._alive)

    def _add(self, n: int) -> None:
        depths = dict(_DEPTHS.get())
        depths[id(self)] = depths.get(id(self), 0) + n
        _DEPTHS.set({key: depth for key, depth in depths.items() if depth})
