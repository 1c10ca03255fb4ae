"""The methods, one paper per file. Importing tokprune reads this table only; a method is imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ..core.errors import OptionError, TokPruneError
from ..core.registry import Registry
from ..core.tokens import Stage
from .base import Method
from .compose import Chain, DecoderChain, Pair

METHODS = Registry(
    what="method",
    table={
        "blind": "tokprune.methods.blind:Blind",
        "cdpruner": "tokprune.methods.cdpruner:CDPruner",
        "damro_filter": "tokprune.methods.damro_filter:DAMROFilter",
        "dart": "tokprune.methods.dart:DART",
        "divprune": "tokprune.methods.divprune:DivPrune",
        "dycoke": "tokprune.methods.dycoke:DyCoke",
        "dyvte": "tokprune.methods.dyvte:DyVTE",
        "evs": "tokprune.methods.evs:EVS",
        "fastv": "tokprune.methods.fastv:FastV",
        "fastvid": "tokprune.methods.fastvid:FastVID",
        "fopru": "tokprune.methods.fopru:FoPru",
        "framefusion": "tokprune.methods.framefusion:FrameFusion",
        "globalcom2": "tokprune.methods.globalcom2:GlobalCom2",
        "hiprune": "tokprune.methods.hiprune:HiPrune",
        "hired": "tokprune.methods.hired:HiRED",
        "holov": "tokprune.methods.holov:HoloV",
        "mmtok": "tokprune.methods.mmtok:MMTok",
        "pixelprune": "tokprune.methods.pixelprune:PixelPrune",
        "pool": "tokprune.methods.pool:Pool",
        "prumerge": "tokprune.methods.prumerge:PruMerge",
        "prumerge_plus": "tokprune.methods.prumerge_plus:PruMergePlus",
        "pyramiddrop": "tokprune.methods.pyramiddrop:PyramidDrop",
        "random": "tokprune.methods.random_:Random",
        "schedule": "tokprune.methods.schedule_:FromFile",
        "scope": "tokprune.methods.scope:SCOPE",
        "sink_filter": "tokprune.methods.sink_filter:SinkFilter",
        "sparsevlm": "tokprune.methods.sparsevlm:SparseVLM",
        "tokencorr": "tokprune.methods.tokencorr:TokenCorr",
        "tome": "tokprune.methods.tome:ToMe",
        "uniform": "tokprune.methods.uniform:Uniform",
        "vidcom2": "tokprune.methods.vidcom2:VidCom2",
        "visionzip": "tokprune.methods.visionzip:VisionZip",
        "vispruner": "tokprune.methods.vispruner:VisPruner",
        "visual_exit": "tokprune.methods.visual_exit:VisualExit",
        "vtc_cls": "tokprune.methods.vtc_cls:VTCCLS",
    },
    aliases={"fastervlm": "vtc_cls:start_layer=-2:split=even"},
    group="tokprune.methods",
    listing="tokprune.list_methods()",
    base=Method,
)

# Papers of aliases, which are not those of their classes.
ALIAS_SOURCES = {"fastervlm": "arXiv:2412.01818"}


@dataclass(frozen=True)
class Labelled:
    """A method object with a label of its own, instead of the one made from its options.

    Args:
        method: the object, a chain or a pair too.
        label: as it was requested when it was saved.
    """

    method: Method | Pair
    label: str


Spec = str | Method | Pair | Labelled | Sequence[str | Method]


def build_method(method: Spec, options: Mapping[str, Any] | None = None) -> tuple[Method | Pair, str]:
    """The method object and its label; a list, or names joined by "+", gives filters and the methods after them.

    Raises:
        UnknownNameError, OptionError: as `Registry.build`.
        TokPruneError: more methods than one model can carry.
    """
    options = dict(options or {})
    if isinstance(method, Labelled):
        return method.method, method.label
    if isinstance(method, Pair) and not options:
        return method, str(method)
    if isinstance(method, str) and "+" in method:
        method = method.split("+")
    if isinstance(method, Sequence) and not isinstance(method, str):
        if options:
            last, (name, value) = method[-1] if len(method) else "vtc_cls", next(iter(options.items()))
            raise OptionError(f"keyword options with a list are ambiguous; use '{last}:{name}={value}'")
        return _build_list(method)
    return _build_one(method, options)


def _build_list(parts: Sequence[str | Method]) -> tuple[Method | Pair, str]:
    if not parts:
        raise TokPruneError("the list of methods is empty; use at least one, as ['vtc_cls']")
    pairs = [_build_one(part, {}) for part in parts]
    by_stage = [[p for p in pairs if p[0].stage is stage] for stage in (Stage.PRE_LLM, Stage.DECODER)]
    built = [_build_stage(own) for own in by_stage if own]
    if [p for own in by_stage for p in own] != pairs:
        names = [name for own in by_stage for _, name in sorted(own, key=lambda pair: not pair[0].is_filter)]
        raise TokPruneError(f"methods before the language model come first; use {names} (or {'+'.join(names)!r})")
    if len(built) == 1:
        return built[0]
    before, between = built[0], built[1]
    if before[0].attention_bias is not None:
        raise OptionError(
            f"{before[1]!r} adds to attention scores through a mask, which {between[1]!r} makes anew at its cuts; "
            "leave one of them out, or use calibrate=merge or calibrate=positions"
        )
    return Pair(before[0], between[0]), "+".join(label for _, label in built)


def _build_stage(pairs: list[tuple[Method, str]]) -> tuple[Method, str]:
    """Filters and the method after them, of one stage."""
    selecting = [label for built, label in pairs if not built.is_filter]
    filters: list[Any] = pairs[:-1]
    last, label = pairs[-1]
    decoder = last.stage is Stage.DECODER
    if not selecting:
        instead = "fastv" if decoder else "vtc_cls"
        raise TokPruneError(f"{label!r} is a filter and needs a method after it: [{label!r}, {instead!r}]")
    if len(selecting) > 1:
        where = "between decoder layers" if decoder else "before the language model"
        raise TokPruneError(
            f"a list takes filters, then exactly one method that acts {where}, not {len(selecting)} "
            f"({', '.join(selecting)}); leave all but one out"
        )
    if last.is_filter:
        names = [name for built, name in pairs if built.is_filter] + selecting
        raise TokPruneError(f"filters come before the method; use {names} (or {'+'.join(names)!r})")
    if not filters:
        return last, label
    label = "+".join(label for _, label in pairs)
    parts = tuple(built for built, _ in filters)
    if last.keeps_positions:  # what is calibrated is the chain
        calibrated: Any = last
        return replace(calibrated, method=Chain(parts, calibrated.method)), label
    kind = DecoderChain if decoder else Chain
    return kind(parts, cast(Any, last)), label


def _build_one(method: Any, options: dict[str, Any]) -> tuple[Method, str]:
    if not isinstance(method, (Method, str)):
        raise OptionError(f"method is a name, a specification or a Method object, not {type(method).__name__}")
    label = ":".join([str(method), *(f"{key}={value}" for key, value in options.items())])
    options, given = dict(options), []
    if "calibrate" in options:
        given.append(options.pop("calibrate"))
    if isinstance(method, Method):
        if options:
            raise OptionError("give options to the method object itself, not to attach()")
        return with_calibration(method, given, label), label
    if "calibrate=" in method:
        parts = METHODS.parts(method)
        given += [part.partition("=")[2] for part in parts[1:] if part.startswith("calibrate=")]
        method = ":".join(part for part in parts if not part.startswith("calibrate="))
    return with_calibration(METHODS.build(method, options), given, label), label


def with_calibration(method: Method, given: Sequence[Any], label: str) -> Method:
    """The method with its `calibrate`, which all methods before the language model take."""
    if not given:
        return method
    if len(given) > 1:
        raise OptionError(f"calibrate is given twice, in {label!r}; use it once")
    from .restore import calibrated  # imported when it is used, as methods are

    return calibrated(method, given[0])
