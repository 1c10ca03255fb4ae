"""The maths: one paper, one file. This table is all that importing tokprune knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..errors import OptionError, TokPruneError
from ..registry import Registry
from .base import Method

METHODS = Registry(
    what="method",
    table={
        "blind": "tokprune.methods.blind:Blind",
        "cdpruner": "tokprune.methods.cdpruner:CDPruner",
        "damro_filter": "tokprune.methods.damro_filter:DAMROFilter",
        "divprune": "tokprune.methods.divprune:DivPrune",
        "fopru": "tokprune.methods.fopru:FoPru",
        "globalcom2": "tokprune.methods.globalcom2:GlobalCom2",
        "hired": "tokprune.methods.hired:HiRED",
        "pool": "tokprune.methods.pool:Pool",
        "prumerge": "tokprune.methods.prumerge:PruMerge",
        "prumerge_plus": "tokprune.methods.prumerge_plus:PruMergePlus",
        "random": "tokprune.methods.random_:Random",
        "tokencorr": "tokprune.methods.tokencorr:TokenCorr",
        "tome": "tokprune.methods.tome:ToMe",
        "uniform": "tokprune.methods.uniform:Uniform",
        "visionzip": "tokprune.methods.visionzip:VisionZip",
        "vtc_cls": "tokprune.methods.vtc_cls:VTCCLS",
    },
    aliases={"fastervlm": "vtc_cls:start_layer=-2:split=even"},
    group="tokprune.methods",
    listing="tokprune.list_methods()",
)

Spec = str | Method | Sequence[str | Method]


def build_method(method: Spec, options: Mapping[str, Any] | None = None) -> tuple[Method, str]:
    """The method object and its label; of a list, or names joined by "+", the filters and the method behind them.

    Raises:
        UnknownNameError, OptionError: as `Registry.build`.
        TokPruneError: more methods than one model can carry.
    """
    options = dict(options or {})
    if isinstance(method, str) and "+" in method:
        method = method.split("+")
    if isinstance(method, Sequence) and not isinstance(method, str):
        if options:
            last, (name, value) = method[-1] if len(method) else "vtc_cls", next(iter(options.items()))
            raise OptionError(
                f"keyword options with a list are ambiguous; write them in the list, as '{last}:{name}={value}'"
            )
        return _build_list(method)
    return _build_one(method, options)


def _build_list(parts: Sequence[str | Method]) -> tuple[Method, str]:
    if not parts:
        raise TokPruneError("an empty list; name at least one method, as ['vtc_cls']")
    pairs = [_build_one(part, {}) for part in parts]
    selecting = [label for built, label in pairs if not built.is_filter]
    filters: list[Any] = pairs[:-1]
    last, label = pairs[-1]
    if not selecting:
        raise TokPruneError(f"{label!r} only filters; put a method behind it, as [{label!r}, 'vtc_cls']")
    if len(selecting) > 1:
        raise TokPruneError(
            f"a list takes filters, then exactly one method that acts before the language model, not {len(selecting)} "
            f"({', '.join(selecting)}); leave all but one out"
        )
    if last.is_filter:
        names = [name for built, name in pairs if built.is_filter] + selecting
        raise TokPruneError(f"filters come before the method; type {names} (or {'+'.join(names)!r})")
    if not filters:
        return last, label
    from .chain import Chain  # here, so that importing tokprune imports no method

    chain = Chain(tuple(built for built, _ in filters), cast(Any, last))
    return chain, "+".join(label for _, label in pairs)


def _build_one(method: str | Method, options: dict[str, Any]) -> tuple[Method, str]:
    if isinstance(method, Method):
        if options:
            raise OptionError("give options to the method object itself, not to attach()")
        return method, str(method)
    if not isinstance(method, str):
        raise OptionError(f"method is a name, a specification or a Method object, not {type(method).__name__}")
    label = ":".join([method, *(f"{key}={value}" for key, value in options.items())])
    return METHODS.build(method, options), label
