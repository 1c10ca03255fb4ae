"""The maths: one paper, one file. This table is all that importing tokprune knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError, TokPruneError
from ..registry import Registry
from .base import Method

METHODS = Registry(
    what="method",
    table={
        "blind": "tokprune.methods.blind:Blind",
        "fopru": "tokprune.methods.fopru:FoPru",
        "pool": "tokprune.methods.pool:Pool",
        "random": "tokprune.methods.random_:Random",
        "uniform": "tokprune.methods.uniform:Uniform",
        "vtc_cls": "tokprune.methods.vtc_cls:VTCCLS",
    },
    aliases={"fastervlm": "vtc_cls:start_layer=-2"},
    group="tokprune.methods",
    listing="tokprune.list_methods()",
)

Spec = str | Method | Sequence[str | Method]


def build_method(method: Spec, options: Mapping[str, Any] | None = None) -> tuple[Method, str]:
    """The method object and its label.

    Raises:
        UnknownNameError, OptionError: as `Registry.build`.
        TokPruneError: more methods in a list than one model can carry.
    """
    options = dict(options or {})
    if isinstance(method, Sequence) and not isinstance(method, str):
        if options:
            raise OptionError(
                "keyword options with a list are ambiguous; write them in the list, as 'vtc_cls:start_layer=16'"
            )
        if len(method) != 1:
            raise TokPruneError(
                f"a list takes exactly one method that acts before the language model, not {len(method)}"
            )
        method = method[0]
    if isinstance(method, Method):
        if options:
            raise OptionError("give options to the method object itself, not to attach()")
        return method, str(method)
    if not isinstance(method, str):
        raise OptionError(f"method is a name, a specification or a Method object, not {type(method).__name__}")
    label = ":".join([method, *(f"{key}={value}" for key, value in options.items())])
    return METHODS.build(method, options), label
