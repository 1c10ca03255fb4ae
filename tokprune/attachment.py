"""attach() and the handle it returns: the only room that knows methods and model adapters both."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import ops
from .between import Between
from .budget import REFERENCE_TEXT, Scope
from .call import Call, Local, repeated_salts
from .compaction import Compaction, Ran, without_marks
from .compat import cache_of, past_length, replace_features, warn_if_untested
from .compatibility import checked_signals
from .cuts import DecoderSelector
from .errors import (
    AlreadyAttachedError,
    BadFeaturesError,
    NotCopyable,
    NothingPrunedError,
    OptionError,
    TokPruneError,
)
from .methods import Spec, build_method
from .methods.base import Method
from .prompt import placeholders, places_of, same_places, text_of
from .report import Prefill, Report, describe_signals, without_beam_copies
from .saving import Folder, write_saved
from .selection import Encoded, Newlines, Selector, by_image
from .stages import Stages, one_of, stages_of
from .types import Kind


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

    Attributes:
        method: the method object.
        label: the method as it was asked for.
        budget: the budget, or None for a method without one; a pair for two methods that take one each.
        positions: "contiguous" or "original".
        newlines: which newlines stay.
        salts: integers that seeded methods mix in, one an image or one for all; a harness sets one a sample.
    """

    def __init__(self, adapter, method: Method, stages: Stages, positions, newlines: Newlines, signals):
        from .integrations.transformers.base import SignalTap

        self.adapter, self.positions, self._stages = adapter, positions, stages
        self._selector = selector = Selector(adapter, stages, newlines, signals)
        self.method, self.label, self.budget = method, stages.label, stages.budget
        self.newlines = selector.newlines
        self.salts: Sequence[int] = (0,)
        self._signals = signals
        self._reads_prompt = adapter.images_from_prompt or any(s.kind is Kind.TEXT_EMBEDS for s in signals)
        self._local = Local()
        self._cutter = DecoderSelector(adapter, stages, self.newlines, self) if stages.decoder else None
        self._tap = SignalTap(adapter, signals, selector.reads_states) if signals or selector.reads_states else None
        with contextlib.ExitStack() as stack:
            for name in adapter.encode_functions:
                self._wrap(name, stack)
            if self._tap:
                self._tap.install(stack)
            base, language_model = adapter.base, adapter.language_model
            if adapter.model is not base:
                stack.callback(adapter.model.register_forward_pre_hook(self._before_head, with_kwargs=True).remove)
            stack.callback(base.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            stack.callback(base.register_forward_hook(self._after_model, with_kwargs=True).remove)
            if self._reads_prompt:  # before compaction, which looks for marks
                stack.callback(language_model.register_forward_pre_hook(self._mark_late, with_kwargs=True).remove)
            compaction = Compaction(language_model, positions, self)
            if self._cutter:
                Between(language_model, compaction, self._cutter, self._cutter.first).install(stack)
                self._cutter.tap.install(stack, self._cutter.tapped)
            else:
                compaction.install(stack)
            self._undo = stack.pop_all()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def __repr__(self):
        return f"Attachment({self.label!r}, {self._stages.budget_text or 'no budget'}, positions={self.positions!r})"

    def detach(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._undo.close()

    def save(self, directory: Folder) -> None:
        """Write methods with all options, budget, positions, newlines and the methods' files to a folder, for `load`.

        Nothing of the model is written. What was saved there before is replaced, other files stay. Salts are not saved.

        Raises:
            SavedError: a replay, a method without a name in the registry, or a folder that cannot be written.
        """
        write_saved(directory, self.adapter, self.method, self._stages, self.positions, self.newlines)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The bare model inside a `with` block of this thread; nests. Pruned caches are still served."""
        self._local.paused += 1
        try:
            yield
        finally:
            self._local.paused -= 1

    @property
    def report(self) -> Report:
        """What the last call of this thread did."""
        call = self._local.call or Call()
        return Report(
            method=self.label,
            budget=self._stages.budget_text,
            signals=describe_signals(self._signals),
            n_layers=len(self.adapter.language_model.layers),
            images=without_beam_copies(call.images, call.rows),
            encoded=call.images,
            prefills=list(call.prefills),
            clamped=call.clamped,
            between=self._cutter is not None,
            shape=self.adapter.shape,
            bytes_per_value=self.adapter.language_model.dtype.itemsize,
        )

    @property
    def kept(self) -> list[Any]:
        """Indices of the kept rows of each image of the last call, ascending, int64 on the CPU.

        Where decoder layers are cut, {layer: indices}: what is left from that layer on, 0 for before the first.
        """
        return [image.kept_by_layer if self._cutter else image.kept for image in self.report.images]

    def _wrap(self, name: str, stack: contextlib.ExitStack) -> None:
        base = self.adapter.base
        original = getattr(base, name)
        signature = inspect.signature(original)

        encode = functools.partial(self._encode, name, original, signature)
        functools.update_wrapper(encode, original)  # generate() reads the signature
        encode._tokprune_attachment = self  # type: ignore[attr-defined]
        if name in vars(base):
            stack.callback(setattr, base, name, original)
        else:
            stack.callback(delattr, base, name)
        setattr(base, name, encode)

    def _encode(self, name: str, original: Callable, signature: inspect.Signature, *args, **kwargs) -> Any:
        """Encode pictures and mark the rows of dropped tokens."""
        from .integrations.transformers.base import split_features

        if self._local.paused:
            return original(*args, **kwargs)
        if kwargs.get("return_dict") is False:
            raise OptionError(f"{name}(return_dict=False) cannot carry marks; leave it out, or use attachment.paused()")
        call = self._call_of_encode(name)
        try:
            out, collected = self._collect(functools.partial(original, *args, **kwargs))
            features, put_back = split_features(out)
            bound = signature.bind(*args, **kwargs).arguments
            encoded = Encoded(name, {**bound, **bound.get("kwargs", {})}, features, collected)
            if self._reads_prompt and not (self._keeps_all and not self.adapter.images_from_prompt):
                call.pending.append(encoded)
                return out
            images = by_image(self.adapter, encoded)
            start = len(call.images)
            marked, _ = self._selector.prune(images, repeated_salts(tuple(self.salts), len(images.features)), call)
            call.by_name[name] = range(start, len(call.images))
        except BaseException:
            self._local.call = None  # what was half encoded must not be taken for the next call's
            raise
        return put_back(marked) if call.touched else out

    def _collect(self, original: Callable[[], Any]) -> tuple[Any, dict]:
        return self._tap.collect(original) if self._tap and not self._keeps_all else (original(), {})

    @property
    def _keeps_all(self) -> bool:
        budget = self._stages.first_budget
        return budget is not None and 1 in (budget.keep_ratio, budget.flops_ratio)

    def _mark_late(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Select and mark where the prompt had to be known; a prompt that comes again gets the same marks."""
        call, embeds = self._local.call, kwargs.get("inputs_embeds")
        if self._local.paused or call is None or embeds is None or embeds.shape[1] == 1:
            return None
        if call.pending and self._local.masks:
            try:
                self._select_late(call, embeds, kwargs.get("attention_mask"))
            except BaseException as error:
                if self._keeps_all and isinstance(error, TokPruneError):
                    call.pending = []  # a part of a prompt of which everything is kept
                    return None
                self._local.call = None
                raise
        elif past_length(cache_of(kwargs)) or not self._comes_again(call, embeds):
            return None
        if not call.touched:
            return None
        embeds = embeds.clone()
        for place, marked, _ in call.marks:
            for row in place.rows:
                embeds[row, ops.on_device(place.columns, embeds.device)] = marked.to(embeds)
        return args, {**kwargs, "inputs_embeds": embeds}

    def _comes_again(self, call: Call, embeds: Tensor) -> bool:
        """Whether this is the prompt of this call, with its pictures; without a cache it is passed at every step."""
        if not same_places(call.masks, self._local.masks):
            return False
        pairs = ((embeds[row, list(p.columns)], rows) for p, _, rows in call.marks for row in p.rows)
        return all(torch.equal(there, rows.to(there)) for there, rows in pairs)

    def _select_late(self, call: Call, embeds: Tensor, attention_mask: Tensor | None) -> None:
        """Select for everything that was encoded for this prompt."""
        masks = self._local.masks
        if not any(bool(mask.any()) for mask in masks.values()):
            return  # text alone: what was encoded is for a prompt to come
        for encoded in call.pending:
            mask, n_encoded = masks[encoded.name], sum(map(len, encoded.features))
            if self.adapter.images_from_prompt:
                places = places_of(mask, n_encoded, None)
                images = by_image(self.adapter, encoded, [len(p.columns) for p in places])
            else:
                images = by_image(self.adapter, encoded)
                places = places_of(mask, n_encoded, [len(f) for f in images.features])
            for signal in self._signals:
                if signal.kind is Kind.TEXT_EMBEDS:
                    rows = [p.rows[0] for p in places]
                    end = embeds.shape[1] - self._local.n_candidates
                    inside = [mask[:, :end] for mask in masks.values()]
                    valid = None if attention_mask is None else attention_mask[:, :end]
                    text = text_of(embeds[:, :end], inside, valid, rows)
                    images.signals[signal] = list(text.to(images.features[0].device))
            salts, start = repeated_salts(tuple(self.salts), len(places)), len(call.images)
            marked, _ = self._selector.prune(images, salts, call)
            call.by_name[encoded.name] = range(start, len(call.images))
            call.marks += zip(places, marked, images.features, strict=True)
        call.pending, call.masks = [], masks

    def _call_of_encode(self, name: str) -> Call:
        call = self._local.call
        if call is None or call.ran or name in call.encoded:
            call = self._local.call = Call()
        call.encoded.add(name)
        if self._local.rows is not None:
            call.rows = self._local.rows
        return call

    def _before_head(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Assisted decoding proposes tokens behind the prompt already in its first pass, and asks for their logits."""
        cache, asked = cache_of(kwargs), kwargs.get("logits_to_keep")
        proposes = cache is not None and not past_length(cache) and isinstance(asked, int) and asked > 1
        self._local.n_candidates = asked - 1 if proposes and asked else 0

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Count the prompt's placeholders, on the device."""
        self._local.masks, self._local.rows = {}, None
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        passed = ids if ids is not None else embeds
        if passed is None or passed.shape[1] <= 1:
            return
        self._local.masks = placeholders(ids, embeds, self.adapter.placeholder_ids, self.adapter.base)
        if ids is not None and cache_of(kwargs) is not None:
            # generate() of older releases repeats the pictures of every beam and encodes them here.
            self._local.rows = ids

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, out) -> Any:
        """Take the marks out of the features that the model hands back."""
        self._local.masks, self._local.rows = {}, None
        return replace_features(out, without_marks)

    def flags(self) -> dict[str, Tensor]:
        """Scalars for the one synchronisation of a prefill."""
        flags = {}
        if self._local.masks:
            flags["placeholders"] = torch.stack([mask.sum() for mask in self._local.masks.values()]).sum()
        call = self._local.call
        if call and call.bad and not self._local.paused:
            flags["bad_features"] = torch.stack(call.bad).any()
            flags["dropped"] = torch.stack(call.dropped).any()
        return flags

    def before_prefill(self, facts: Mapping[str, int], starts_call: bool) -> None:
        """Raise where what happened is not what was asked for."""
        if self._local.paused:
            if facts["marked"]:
                raise TokPruneError(
                    "the features were encoded while the attachment was active and are used while it is paused; "
                    "encode them again inside paused()"
                )
            return
        call, placeholders = self._local.call, facts.get("placeholders", 0)
        if call is None or (starts_call and call.ran and not (facts["marked"] or placeholders)):
            call = self._local.call = Call()
        encoded_now = bool(call.images) and not (starts_call and call.ran)
        if starts_call:
            call.prefills.clear()  # without a cache every step passes the whole prompt again
        self._local.facts = facts
        if facts.get("bad_features"):
            self._local.call = None
            raise BadFeaturesError("the vision tower or the projector produced NaN; run it in float32 or bfloat16")
        # A chunk of a prompt may hold kept tokens alone; then it is enough that this call dropped some.
        is_chunk = placeholders < sum(len(i.layout.crop) for i in call.images)
        keeps_all = self._keeps_all or (bool(call.images) and not call.below_budget)
        as_promised = facts["marked"] or keeps_all or (encoded_now and is_chunk and facts.get("dropped"))
        if placeholders and not as_promised:
            raise NothingPrunedError(
                f"the prompt has image placeholders and {self.label!r} asks for fewer tokens, but nothing was "
                "dropped: the features were not encoded under this attachment. Pass pixel_values, or encode "
                "them again, or use attachment.paused()"
            )

    def after_prefill(self, ran: Ran) -> None:
        """Note the lengths of a pass over a prompt; candidates of assisted decoding are none."""
        call = self._local.call
        if call is None or self._local.paused:
            return
        call.ran = True
        facts = self._local.facts
        if ran.past_inner == 0 or facts.get("marked") or facts.get("placeholders"):
            call.prefills.append(Prefill(**vars(ran)))
