"""attach() and the handle it returns: the only room that knows methods and model adapters both."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .budget import REFERENCE_TEXT, Budget, Scope
from .call import Call, Local, repeated_salts
from .compaction import Compaction, Ran, mark_dropped, without_marks
from .compatibility import checked_signals
from .errors import (
    AlreadyAttachedError,
    BadFeaturesError,
    BudgetError,
    NotCopyable,
    NothingPrunedError,
    OptionError,
    TokPruneError,
)
from .flops import Ops, SelectionCost
from .methods import Spec, build_method
from .methods.base import Method
from .report import ImageReport, Prefill, Report, describe_signals, without_beam_copies
from .types import Layout, Signal, VisualTokens


def attach(
    model: nn.Module,
    method: Spec,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    flops_ratio: float | None = None,
    flops_scope: Scope = "llm",
    positions: Literal["auto", "contiguous", "original"] = "auto",
    **options: Any,
) -> Attachment:
    """Let a model's language model see fewer visual tokens, until `detach` or the end of a `with` block.

    Args:
        model: a Hugging Face multimodal model; a PEFT model is unwrapped.
        method: a name ("vtc_cls"), a specification ("vtc_cls:start_layer=22"), a method object, or a list of
            them. See `tokprune.list_methods()`. Start with "vtc_cls" where the tower has a [CLS] token and
            with "fopru" elsewhere.
        keep_ratio: fraction of each image's visual tokens to keep, in (0, 1]. Start with 0.25.
        keep_tokens: number of each image's visual tokens to keep, instead of a fraction.
        flops_ratio: fraction of the unpruned FLOPs to spend, instead of a number of tokens, in (0, 1]; solved for
            each image beside 64 text tokens.
        flops_scope: "llm" counts the language model, "prefill" everything up to the first token.
        positions: "contiguous" renumbers the kept tokens without gaps, "original" leaves them their numbers;
            "auto" is what papers measure for the model's family.
        **options: options of the method, such as start_layer=22.

    Returns:
        The handle: a context manager with `report`, `paused()` and `detach()`.

    Raises:
        TokPruneError: in one of its kinds, before the model is touched.
    """
    from .integrations.transformers import adapter_for

    built, label = build_method(method, options)
    budget = _checked_budget(built, (keep_ratio, keep_tokens, flops_ratio), flops_scope)
    adapter = adapter_for(model)
    if flops_ratio is not None and adapter.shape is None:
        raise BudgetError("the FLOPs of this model are not known; use keep_ratio or keep_tokens")
    if positions not in ("auto", "contiguous", "original"):
        raise OptionError(f"positions={positions!r} is not one of 'auto', 'contiguous', 'original'")
    positions = adapter.default_positions if positions == "auto" else positions
    adapter.check_attention(positions)
    signals = checked_signals(built, label, adapter)
    current = [getattr(adapter.base, name) for name in adapter.encode_functions]
    owners = [a for a in (getattr(f, "_tokprune_attachment", None) for f in current) if a is not None]
    if owners:
        raise AlreadyAttachedError(
            f"this model already has an attachment ({owners[0].label}); call attachment.detach() first"
        )
    return Attachment(adapter, built, label, budget, positions, signals)


def _checked_budget(method: Method, given: tuple[Any, Any, Any], flops_scope: Scope) -> Budget | None:
    if method.takes_budget:
        return Budget(*given, flops_scope)
    if given != (None, None, None):
        raise BudgetError(f"{method} keeps no visual token; leave keep_ratio, keep_tokens and flops_ratio out")
    return None


class Attachment(NotCopyable):
    """The handle of an attached model; a context manager. Made by `attach`.

    Attributes:
        method: the method object.
        label: the method as it was asked for.
        budget: the budget, or None for a method without one.
        positions: "contiguous" or "original".
        salts: integers that seeded methods mix in, one an image or one for all; a harness sets one a sample.
    """

    def __init__(self, adapter, method: Method, label: str, budget: Budget | None, positions, signals):
        from .integrations.transformers.base import SignalTap

        self.adapter, self.method, self.label = adapter, method, label
        self.budget, self.positions = budget, positions
        self.salts: Sequence[int] = (0,)
        self._signals = signals
        self._n_keep = functools.lru_cache(maxsize=64)(self._count)  # a FLOPs budget is searched for
        self._cost: Any = adapter.shape and SelectionCost(adapter.shape, signals, method.cost)
        self._local = Local()
        self._tap = SignalTap(adapter, signals) if signals else None
        with contextlib.ExitStack() as stack:
            for name in adapter.encode_functions:
                self._wrap(name, stack)
            if self._tap:
                self._tap.install(stack)
            base = adapter.base
            stack.callback(base.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            stack.callback(base.register_forward_hook(self._after_model, with_kwargs=True).remove)
            Compaction(adapter.language_model, positions, self).install(stack)
            self._undo = stack.pop_all()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def __repr__(self):
        return f"Attachment({self.label!r}, {self.budget or 'no budget'}, positions={self.positions!r})"

    def detach(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._undo.close()

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
            budget=str(self.budget or ""),
            signals=describe_signals(self._signals),
            n_layers=len(self.adapter.language_model.layers),
            images=without_beam_copies(call.images, call.rows),
            encoded=call.images,
            prefills=list(call.prefills),
            clamped=call.clamped,
            shape=self.adapter.shape,
            bytes_per_value=self.adapter.language_model.dtype.itemsize,
        )

    @property
    def kept(self) -> list[Tensor]:
        """Indices of the kept rows of each image of the last call, ascending, int64 on the CPU."""
        return [image.kept for image in self.report.images]

    # ------------------------------------------------------------------------------ encoding pictures

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
            out, signals = self._collect(functools.partial(original, *args, **kwargs))
            features, put_back = split_features(out)
            bound = signature.bind(*args, **kwargs).arguments
            arguments = {**bound, **bound.get("kwargs", {})}
            layouts = self.adapter.layouts(arguments, features)
            packed = {s: self.adapter.pack(t.to(features[0].device), arguments) for s, t in signals.items()}
            marked, keeps = self._prune(features, layouts, packed, call)
        except BaseException:
            self._local.call = None  # what was half encoded must not be taken for the next call's
            raise
        for layout, keep in zip(layouts, keeps, strict=True):
            call.clamped |= self._asked_more(layout)
            call.images.append(self._image_report(layout, keep, collected=bool(signals)))
        return put_back(marked) if call.below_budget else out

    def _prune(
        self, features: list[Tensor], layouts: list[Layout], packed: dict[Signal, list[Tensor]], call: Call
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Marked features and keep of every image; the method sees the images of one layout at once."""
        marked, keeps = list(features), [f.new_ones(len(f), dtype=torch.bool) for f in features]
        salts = repeated_salts(tuple(self.salts), len(features))
        for layout in dict.fromkeys(layouts):
            n_keep = self._n_keep(layout)
            if n_keep >= layout.n_visual:
                continue  # before any method code: the model stays bit-identical
            group = [i for i, other in enumerate(layouts) if other == layout]
            stacked = torch.stack([features[i] for i in group])
            signals = {s: torch.stack([rows[i] for i in group]) for s, rows in packed.items()}
            call.below_budget = True
            call.bad.append(stacked.isnan().any())
            new, keep = self._select(stacked, layout, signals, [salts[i] for i in group], n_keep)
            call.dropped.append((~keep).any())
            for place, i in enumerate(group):
                marked[i], keeps[i] = new[place], keep[place]
        return marked, keeps

    def _collect(self, original: Callable[[], Any]) -> tuple[Any, dict[Signal, Tensor]]:
        keeps_all = self.budget is not None and 1 in (self.budget.keep_ratio, self.budget.flops_ratio)
        return self._tap.collect(original) if self._tap and not keeps_all else (original(), {})

    def _select(
        self, features: Tensor, layout: Layout, signals: dict, salts: list[int], n_keep: int
    ) -> tuple[Tensor, Tensor]:
        """Marked features and keep of a group; rows that show no patch are kept and never reach the method."""
        if layout.n_visual == len(layout.crop):
            selected = self.method.select(VisualTokens.of(features, layout, signals, salts), n_keep)
            return mark_dropped(selected.features, selected.keep), selected.keep
        visual = ops.on_device(layout.visual, features.device)
        tokens = VisualTokens.of(features[:, visual], layout.without_specials, signals, salts)
        selected = self.method.select(tokens, n_keep)
        keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        keep[:, visual] = selected.keep
        features = features.index_copy(1, visual, selected.features)
        return mark_dropped(features, keep), keep

    def _count(self, layout: Layout) -> int:
        if self.budget is None:
            return 0
        least = min(self.method.min_keep(layout), layout.n_visual)
        n_keep = self.budget.n_keep(layout.n_visual, functools.partial(self._flops, layout), least)
        if n_keep < least:
            raise BudgetError(
                f"{self.label!r} cannot keep {n_keep} of {layout.n_visual} tokens: {least} is its least here; "
                f"type keep_tokens={least} or more"
            )
        return n_keep

    def _flops(self, layout: Layout, n_keep: int) -> int:
        """What keeping so many tokens of an image costs, beside the reference text."""
        ledger = self._cost.prefill(layout, n_keep, REFERENCE_TEXT, self.adapter.crop_patches(layout))
        return getattr(ledger, self.budget.flops_scope if self.budget else "llm").flops

    def _image_report(self, layout: Layout, keep: Tensor, collected: bool) -> ImageReport:
        n_patches = self.adapter.crop_patches(layout)
        selector = self._cost.selector(layout, self._n_keep(layout), n_patches, collected) if self._cost else Ops()
        n_special = len(layout.crop) - layout.n_visual
        return ImageReport(layout.n_visual, n_special, keep, layout, n_patches, selector)

    def _asked_more(self, layout: Layout) -> bool:
        asked = self.budget.keep_tokens if self.budget else None
        return asked is not None and asked > layout.n_visual

    def _call_of_encode(self, name: str) -> Call:
        call = self._local.call
        if call is None or call.ran or name in call.encoded:
            call = self._local.call = Call()
        call.encoded.add(name)
        if self._local.rows is not None:
            call.rows = self._local.rows
        return call

    # --------------------------------------------------------------------------- the language model

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Count the prompt's placeholders, on the device."""
        self._local.placeholders = self._local.rows = None
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        wanted = self.adapter.placeholder_ids
        if ids is not None and ids.shape[1] > 1:
            self._local.placeholders = sum((ids == i).sum() for i in wanted)
            if kwargs.get("past_key_values") is not None:
                # generate() of older releases repeats the pictures of every beam and encodes them here.
                self._local.rows = ids
        elif embeds is not None and embeds.shape[1] > 1:
            rows = self.adapter.base.get_input_embeddings()(ops.on_device(wanted, embeds.device))
            self._local.placeholders = (embeds[:, :, None] == rows).all(-1).sum()

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, out) -> Any:
        """Take the marks out of the features that the model hands back."""
        self._local.placeholders = self._local.rows = None
        if isinstance(out, tuple):
            return tuple(without_marks(part) for part in out)
        if getattr(out, "image_hidden_states", None) is not None:
            out["image_hidden_states"] = without_marks(out.image_hidden_states)
        return None

    def flags(self) -> dict[str, Tensor]:
        """Scalars for the one synchronisation of a prefill."""
        flags = {}
        if self._local.placeholders is not None:
            flags["placeholders"] = self._local.placeholders
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
        is_chunk = placeholders < sum(i.n_visual + i.n_special for i in call.images)
        keeps_all = bool(call.images) and not call.below_budget
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
