"""The hooks of an attachment: pictures are encoded and marked, the prompt is counted, promises are checked."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.core import ops
from tokprune.core.errors import (
    BadFeaturesError,
    NotCopyable,
    NothingPrunedError,
    OptionError,
    TokPruneError,
    UnsupportedModelError,
)
from tokprune.core.signals import Kind, Signal
from tokprune.methods.base import mistaken
from tokprune.prune.copies import salts_of
from tokprune.prune.report import Prefill
from tokprune.prune.request import Request

from .caches import BY_COLUMN, Again, at_full_length, columns_on, given_again, with_text_positions, without_marks
from .calibrate import Calibrator
from .cells import Part, TowerShortener
from .compat import (
    LAYERS_STATE,
    STATIC_SINCE,
    cache_of,
    is_at_least,
    is_static,
    past_length,
    position_deltas,
    replace_features,
)
from .encode import Encoded, Pruner, by_image, unencoded
from .families.base import ModelFamily
from .hooks import Hooks
from .layers.select import LayerSelector
from .layers.shorten import LayerShortener
from .passes import BASE, DECODER, HEAD, Call, Context, Pass, Passes, Pauses
from .prompt import Place, joined_runs, matching_rows, numbers_of, placeholders, places_of, same_places, text_of
from .shorten import Ran, Shortener
from .static import StaticSteps
from .tower_taps import TowerTap, split_features


class Observer(NotCopyable):
    """Everything that an attachment does while the model runs.

    Args:
        family: of the model.
        request: what was asked for.
        signals: what is collected from the vision tower.
    """

    def __init__(self, family: ModelFamily, request: Request, signals: frozenset[Signal]):
        self.family, self.request, self.signals = family, request, signals
        self.salts: Sequence[int] = (0,)
        self.passes, self.pauses = Passes(), Pauses()
        self.newest: Context | None = None  # of the thread that began a call last
        self.on_done: Callable[[Call], None] = lambda call: None  # told of every call of the user that has ended
        self._pruner, self._budgets = Pruner(family, request, signals), Budgets()
        self.cutter = LayerSelector(family, request, self) if request.between else None
        self._reads_prompt = family.images_from_prompt or any(s.kind is Kind.TEXT_EMBEDS for s in signals)
        reads_states = self.pruner.reads_states
        self._pixels = [s for s in signals if s.kind is Kind.PIXELS]
        taps = len(signals) > len(self._pixels) or reads_states
        self._tap = TowerTap(family, signals, self.passes, reads_states) if taps else None
        bias = request.attention_bias
        calibrator = None if bias is None else Calibrator(family, bias)
        self._shortener = Shortener(family, request.positions, self, calibrator)
        self.hooks = Hooks(family.model)

    def install(self) -> None:
        """Put the hooks on the model; where one fails, none stays."""
        try:
            self._install(self.hooks)
        except BaseException:
            self.hooks.close()
            raise

    def _install(self, hooks: Hooks) -> None:
        family = self.family
        for name in family.encode_functions:
            original = getattr(family.base, name)
            encode = functools.partial(self._encode, name, original, inspect.signature(original))
            hooks.replace(family.base, name, encode)
        if hasattr(family.model, "generate"):
            hooks.replace(family.model, "generate", functools.partial(self._generate, family.model.generate))
        if self.cutter is None and is_at_least(STATIC_SINCE):
            self._install_static(hooks)
        for owner, name in family.position_functions:
            hooks.replace(owner, name, functools.partial(self._positions, getattr(owner, name)))
        if self._tap:
            self._tap.install(hooks)
        if self.pruner.selects_pixels:
            TowerShortener(family, self.passes).install(hooks)
        if family.model is not family.base:
            hooks.before(family.model, functools.partial(self._enter, HEAD))
            hooks.after(family.model, functools.partial(self._leave, HEAD))
        in_step = self.passes.in_step
        hooks.before(family.base, self._before_model, in_step)
        hooks.after(family.base, self._after_model, in_step)
        hooks.before(family.language_model, functools.partial(self._enter, DECODER), in_step)
        if self._reads_prompt:  # before compaction, which looks for marks
            hooks.before(family.language_model, self._mark_late, in_step)
        if self.cutter:
            LayerShortener(family.language_model, self._shortener, self.cutter, self.cutter.first).install(hooks)
            self.cutter.tap.install(hooks, self.cutter.tapped, self.passes.idle)
        else:
            self._shortener.install(hooks)
        hooks.after(family.language_model, functools.partial(self._leave, DECODER), in_step)

    def _install_static(self, hooks: Hooks) -> None:
        model, steps = self.family.model, StaticSteps(self.request.positions, self.passes, self.pauses)
        for name, ours in (
            ("prepare_inputs_for_generation", steps.prepare),
            ("_prepare_static_cache", steps.make_cache),
        ):
            if hasattr(model, name):
                hooks.replace(model, name, functools.partial(ours, getattr(model, name)))

    @property
    def pruner(self) -> Pruner:
        """Of the budget that counts in this thread."""
        return self._budgets.pruner or self._pruner

    @contextlib.contextmanager
    def using(self, request: Request) -> Iterator[None]:
        """Another budget of the method before the language model, in this thread."""
        before = self._budgets.pruner
        self._budgets.pruner = Pruner(self.family, request, self.signals)
        try:
            yield
        finally:
            self._budgets.pruner = before

    @property
    def paused(self) -> bool:
        """Whether this thread is to see the bare model."""
        return self.pauses.hold_here

    # ------------------------------------------------------------------------------- calls

    def _generate(self, original: Callable, *args, **kwargs) -> Any:
        """Note that the passes to come are one call of the user."""
        found = (x for x in (*args[:1], *map(kwargs.get, PROMPTS)) if isinstance(x, Tensor) and x.ndim > 1)
        n_rows, n_prompt = next(found, torch.empty(0, 0)).shape[:2]
        with self.passes.generating(n_rows or None, n_prompt or None, _brings_features(kwargs)):
            out = original(*args, **kwargs)
        self._done()
        return out

    def _done(self) -> None:
        """Tell of a call of the user that has ended, once."""
        call = None if self.passes.busy else self.passes.calls.shown
        if call is not None and call.ran and not call.told:
            call.told = True
            self.on_done(call)

    def _positions(self, original: Callable, *args, **kwargs) -> Any:
        """Positions as if the cache held everything that was passed."""
        named = next((x for x in args if isinstance(x, Mapping)), kwargs)
        cache = cache_of(named)
        with at_full_length(cache):
            found = original(*args, **kwargs)
        if columns_on(cache) is None:
            return found
        return with_text_positions(found, position_deltas(self.family.base))

    def _begin(self, context: Context) -> Call:
        call = context.begin()
        call.budget = self.pruner.request.budget_text
        if context is self.passes.calls:
            self.newest = context
        return call

    def _enter(self, level: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        this = self.passes.enter(level)
        cache = cache_of(kwargs)
        if level == HEAD and not self.family.ready_masks and _is_step(args, kwargs, cache):
            self.passes.begin_step(cache)
            return
        this.joins |= _brings_features(kwargs)
        asked, generation = kwargs.get("logits_to_keep"), this.generation
        if level != HEAD or generation is None or generation.n_prompt is None or not isinstance(asked, int):
            return
        if cache is not None and not past_length(cache):
            # Assisted decoding passes draft tokens with the prompt in its first pass, and asks for their logits.
            passed = _passed(args, kwargs)
            n_draft = 0 if passed is None else passed.shape[1] - generation.n_prompt
            this.n_candidates = max(0, min(asked - 1, n_draft))

    def _leave(self, level: int, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        this = self.passes.leave(level)
        if level == DECODER and this is not None and this.call is not None and this.call.marks:
            _let_go(this.call, [cache_of(x) for x in (kwargs, out) if isinstance(x, Mapping)])
        self._done()

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Count the prompt's placeholders, on the device; take what the cache holds already out of the prompt."""
        this = self.passes.enter(BASE)
        this.joins |= _brings_features(kwargs)
        this.asked = kwargs
        passed = _passed(args, kwargs)
        if passed is None or passed.shape[1] <= 1:
            return None
        family = self.family
        placeholder_ids = tuple(family.placeholder_ids.values())
        again = given_again(args, kwargs, placeholder_ids, not family.recurrent_caches, family.first_position)
        if again is not None:
            this.n_again, args, kwargs = again.n, again.args, again.kwargs
            this.asked = kwargs
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        this.by_hand, this.ids = ids is None, ids
        this.masks = placeholders(ids, embeds, self.family.placeholder_ids, self.family.base)
        if ids is not None and this.generation is not None and this.generation.n_rows not in (None, len(ids)):
            # generate() of older releases repeats the pictures of every beam and encodes them here.
            this.rows = ids
        return None if again is None else (args, kwargs)

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        """Take the marks out of the features that the model hands back."""
        this = self.passes.leave(BASE)
        if this is not None and this.facts and (call := this.call) is not None:
            call.prefill_s += time.perf_counter() - this.started
        out = replace_features(out, without_marks)
        self._done()
        return Again.expanded(out, this.n_again) if this and this.n_again else out

    # ------------------------------------------------------------------------------- pictures

    def _encode(self, name: str, original: Callable, signature: inspect.Signature, *args, **kwargs) -> Any:
        """Encode pictures and mark the rows of dropped tokens."""
        outer = self.passes.encode_function
        if self.paused or (outer and self.family.nested_encoders.get(outer) == name):  # the outermost acts
            return original(*args, **kwargs)
        if kwargs.get("return_dict") is False:
            raise OptionError(f"{name}(return_dict=False) cannot carry marks; leave it out, or use attachment.paused()")
        self.hooks.check()
        context = self.passes.context
        call, started = self._call_of_encode(name, context), time.perf_counter()
        try:
            bound = signature.bind(*args, **kwargs).arguments
            arguments = {**bound, **bound.get("kwargs", {})}
            keeps = self._before_tower(name, arguments, call)
            part = Part(torch.cat(keeps)) if keeps else None
            out, collected = self._collect(name, functools.partial(original, *args, **kwargs), part)
            features, put_back = split_features(out)
            collected |= {signal: self.family.cells(name, arguments) for signal in self._pixels if part is None}
            if self.family.images_from_prompt:
                features = self.family.pieces(name, arguments, features)
            encoded = Encoded(name, arguments, features, collected)
            if self._reads_prompt and not (self.pruner.keeps_all and not self.family.images_from_prompt):
                call.pending.append(encoded)
                return out
            pictures = by_image(self.family, encoded)
            start = len(call.images)
            if part is not None:
                marked = self.pruner.mark(pictures, keeps, call)
            else:
                marked = self.pruner.prune(pictures, salts_of(tuple(self.salts), len(pictures), start), call)
            call.by_name[name] = range(start, len(call.images))
        except BaseException:
            context.call = None  # what was half encoded must not be taken for the next call's
            raise
        call.encode_s += time.perf_counter() - started
        return put_back(marked) if call.touched else out

    def _before_tower(self, name: str, arguments: Mapping[str, Any], call: Call) -> list[Tensor]:
        """What stays of every picture, (N,) bool, where that is decided before the tower runs; else nothing."""
        if not self.pruner.selects_pixels:
            return []
        pictures, start = unencoded(self.family, name, arguments), len(call.images)
        return self.pruner.chosen(pictures, salts_of(tuple(self.salts), len(pictures), start), start)

    def _collect(self, name: str, original: Callable[[], Any], part: Part | None = None) -> tuple[Any, dict]:
        if self._tap and not self.pruner.keeps_all:
            return self._tap.collect(original, name)
        with self.passes.encoding(name) as encoding:
            encoding.part = part
            out = original()
        if part is not None and not part.ran:
            raise TokPruneError(
                "the vision tower was not called while a picture was encoded, so nothing could leave before it; "
                "use a method that selects after it, such as 'divprune'"
            )
        return out, {}

    def _call_of_encode(self, name: str, context: Context) -> Call:
        call, this = context.call, self.passes.current
        joins = self.passes.joins
        if call is None or call.ran or name in call.encoded or (call.by_hand and joins is False):
            call = self._begin(context)
            call.by_hand = joins is None
        call.encoded.add(name)
        if this is not None and this.rows is not None:
            call.rows = this.rows
        return call

    def _mark_late(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Select and mark where the prompt had to be known; a prompt that comes again gets the same marks."""
        this, embeds = self.passes.current, kwargs.get("inputs_embeds")
        call = this.call if this else None
        if self.paused or this is None or call is None or embeds is None or embeds.shape[1] == 1:
            return None
        if call.pending:
            try:
                self._find_pictures(this, call, embeds)
                asked = this.asked if self.family.ready_masks else kwargs  # which columns are padding
                self._select_late(this, call, embeds, asked.get("attention_mask"))
            except BaseException as error:
                keeps_all = self.pruner.keeps_all and (self.cutter is None or self.cutter.keeps_all)
                if keeps_all and isinstance(error, TokPruneError):
                    call.pending = []  # a part of a prompt of which everything is kept
                    return None
                this.context.call = None
                raise
        elif past_length(cache_of(kwargs)) or not _comes_again(this, call, embeds):
            return None
        if not call.touched:
            return None
        embeds = embeds.clone()
        for place, marked, _ in call.marks:
            for row in place.rows:
                embeds[row, ops.on_device(place.columns, embeds.device)] = marked.to(embeds)
        return args, {**kwargs, "inputs_embeds": embeds}

    def _find_pictures(self, this: Pass, call: Call, embeds: Tensor) -> None:
        """Find pictures that were merged by hand, where no placeholder tells of them."""
        if any(bool(mask.any()) for mask in this.masks.values()):
            return
        if not this.by_hand and BASE in this.entered:
            return
        found = {e.name: matching_rows(embeds, e.features) for e in call.pending}
        if not any(bool(mask.any()) for mask in found.values()):
            raise NothingPrunedError(
                f"pictures were encoded for {self.request.label!r}, and inputs_embeds shows neither image placeholders "
                "nor their features; pass input_ids with pixel_values, or run text alone inside attachment.paused()"
            )
        none = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        this.masks = {name: found.get(name, none) for name in self.family.placeholder_ids}

    def _select_late(self, this: Pass, call: Call, embeds: Tensor, attention_mask: Tensor | None) -> None:
        """Select for everything that was encoded for this prompt."""
        masks = this.masks
        if not any(bool(mask.any()) for mask in masks.values()):
            return  # text alone: what was encoded is for a prompt to come
        for encoded in call.pending:
            mask, n_encoded = masks[encoded.name], sum(map(len, encoded.features))
            if self.family.images_from_prompt:
                places, told = self._images(this, places_of(mask, n_encoded, None), embeds)
                pictures = by_image(self.family, encoded, told)
            else:
                pictures = by_image(self.family, encoded)
                places = places_of(mask, n_encoded, [len(p.features) for p in pictures])
            for signal in self.signals:
                if signal.kind is Kind.TEXT_EMBEDS:
                    rows = [p.rows[0] for p in places]
                    n_draft = this.n_candidates
                    end = embeds.shape[1] - n_draft
                    inside = [mask[:, :end] for mask in masks.values()]
                    valid = None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - n_draft]
                    text = text_of(embeds[:, :end], inside, valid, rows)
                    for picture, own in zip(pictures, text, strict=True):
                        picture.signals[signal] = own.to(picture.features.device)
            start = len(call.images)
            marked = self.pruner.prune(pictures, salts_of(tuple(self.salts), len(places), start), call)
            call.by_name[encoded.name] = range(start, len(call.images))
            call.marks += zip(places, marked, (p.features for p in pictures), strict=True)
        call.pending, call.masks = [], masks

    def _images(self, this: Pass, runs: list[Place], embeds: Tensor) -> tuple[list[Place], list[Any]]:
        """Places of images from those of runs of placeholders, and what the family says of each."""
        if not self.family.joins_runs:
            return runs, [len(run.columns) for run in runs]
        return joined_runs(runs, numbers_of(this.ids, embeds), self.family.images_in)

    # ------------------------------------------------------------------------------- the language model

    def flags(self) -> dict[str, Tensor]:
        """Scalars for the one synchronisation of a prefill."""
        flags: dict[str, Tensor] = {}
        this = self.passes.current
        if this is None:
            return flags
        if this.masks:
            # Encode functions may share a placeholder, which is one column.
            flags["placeholders"] = torch.stack(list(this.masks.values())).any(0).sum()
        call = this.call
        if call and call.bad and not self.paused:
            flags["bad_features"] = torch.stack(call.bad).any()
            flags["dropped"] = torch.stack(call.dropped).any()
        if call and call.mistakes and not self.paused:
            flags["mistake"] = torch.stack(call.mistakes).amax()
        return flags

    def visual_sizes(self) -> Tensor:
        """How many tokens every column of this prompt stands for, (B, S) float32; 0 for text.

        Raises:
            UnsupportedModelError: nothing tells which columns are visual.
        """
        this = self.passes.current
        call, masks = (this.call, this.masks) if this else (None, {})
        if call is None or not (this and this.facts.get("placeholders")):
            raise UnsupportedModelError(
                "calibrate needs to know which columns are visual, and this prompt shows no placeholders; pass "
                "input_ids with pixel_values to the model, or leave calibrate out"
            )
        sizes = torch.stack(list(masks.values())).any(0).float()
        for name, numbers in call.by_name.items():
            own = [call.sizes[i] for i in numbers]
            if all(size is None for size in own):
                continue
            lengths = [len(call.images[i].layout.crop) for i in numbers]
            places = places_of(masks[name], sum(lengths), lengths)
            for place, size in zip(places, own, strict=True):
                if size is not None:
                    columns = ops.on_device(place.columns, sizes.device)
                    for row in place.rows:
                        sizes[row, columns] = size.to(sizes)
        return sizes

    def before_prefill(self, facts: Mapping[str, int], starts_call: bool) -> None:
        """Raise where what happened is not what was asked for."""
        if self.paused:
            if facts["marked"]:
                raise TokPruneError(
                    "the features were encoded while the attachment was active and are used while it is paused; "
                    "encode them again inside paused()"
                )
            return
        self.hooks.check()
        this, placeholders = self.passes.current, facts.get("placeholders", 0)
        assert this is not None  # noqa: S101 - the hook before this one began it
        context, shows_pictures = this.context, bool(facts["marked"] or placeholders)
        if context.waiting is not None and shows_pictures:
            context.call, context.waiting = context.waiting, None
        call = this.call
        if starts_call and not shows_pictures and call and not call.ran and call.by_hand and facts.get("dropped"):
            context.waiting, call = call, None  # its pictures are for a prompt to come
        if call is None or (starts_call and call.ran and not shows_pictures):
            call = self._text_alone(this)
        encoded_now = bool(call.images) and not (starts_call and call.ran)
        if starts_call:
            call.prefills.clear()  # without a cache every step passes the whole prompt again
        this.facts = facts
        if facts.get("bad_features"):
            this.context.call = None
            raise BadFeaturesError("the vision tower or the projector produced NaN; run it in float32 or bfloat16")
        if code := facts.get("mistake"):
            this.context.call = None
            raise mistaken(self.request.before, code)
        # A chunk of a prompt may hold kept tokens alone; then it is enough that this call dropped some.
        is_chunk = placeholders < sum(len(i.layout.crop) for i in call.images)
        keeps_all = self.pruner.keeps_all or (bool(call.images) and not call.below_budget)
        as_promised = facts["marked"] or keeps_all or (encoded_now and is_chunk and facts.get("dropped"))
        if placeholders and not as_promised:
            raise NothingPrunedError(
                f"the prompt has image placeholders and {self.request.label!r} asks for fewer tokens, but nothing was "
                "dropped: the features were not encoded under this attachment. Pass pixel_values, or encode "
                "them again, or use attachment.paused()"
            )

    def _text_alone(self, this: Pass) -> Call:
        """The call of a pass over text: a new one, or, inside of a generation about something else, a separate one."""
        if this.generation is not None and this.context.main is not None:
            this.aside = Call()
            return this.aside
        return self._begin(this.context)

    def after_prefill(self, ran: Ran) -> None:
        """Note the lengths of a pass over a prompt; draft tokens are excluded."""
        this = self.passes.current
        call = this.call if this else None
        if call is None or this is None or self.paused:
            return
        call.ran = True
        if this.generation is not None and this.context.main is None:
            this.context.main = call
        facts = this.facts
        if facts.get("placeholders") and not call.counts:
            call.counts = {name: mask.sum(1) for name, mask in this.masks.items()}
        if ran.past_inner == 0 or facts.get("marked") or facts.get("placeholders"):
            call.prefills.append(Prefill(**vars(ran)))


class Budgets(threading.local):
    """The pruner of a budget for this thread alone; None for that of the attachment."""

    pruner: Pruner | None = None


PROMPTS = ("inputs", "input_ids", "inputs_embeds")


def _passed(args: tuple, kwargs: Mapping) -> Tensor | None:
    """What a call of the model is about: ids, or embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if ids is not None else kwargs.get("inputs_embeds")


STEP_INPUTS = frozenset(("input_ids", "attention_mask", "cache", "past_key_values", "logits_to_keep", *BY_COLUMN))
PLAIN = (int, str, type(None))


def _is_step(args: tuple, kwargs: Mapping, cache: Any) -> bool:
    """Whether a call of the model with its head is one more token of text on a cache that was pruned."""
    if columns_on(cache) is None and not hasattr(cache, LAYERS_STATE):
        return False
    ids = kwargs.get("input_ids", args[0] if args else None)
    if len(args) > 1 or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or is_static(cache):
        return False
    others = (value for name, value in kwargs.items() if name not in STEP_INPUTS)
    return all(isinstance(value, PLAIN) for value in others) and past_length(cache) > 0


def _brings_features(kwargs: Mapping) -> bool:
    """Whether a call is given pictures that the caller encoded."""
    return any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "inputs_embeds"))


def _let_go(call: Call, caches: Sequence[Any]) -> None:
    """Forget features after a pass with a cache; without one, or where the caller holds them, they come again."""
    if not call.by_hand and any(cache is not None for cache in caches):  # an empty cache may be false
        call.marks.clear()


def _comes_again(this: Pass, call: Call, embeds: Tensor) -> bool:
    """Whether this is the prompt of a call, with its pictures; without a cache it is passed at every step."""
    if not call.marks or not same_places(call.masks, this.masks):
        return False
    pairs = ((embeds[row, list(p.columns)], rows) for p, _, rows in call.marks for row in p.rows)
    return all(torch.equal(there, rows.to(there)) for there, rows in pairs)
