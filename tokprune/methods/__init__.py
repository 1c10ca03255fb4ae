"""The maths: one paper, one file. This table is all that importing tokprune knows of them."""

from ..registry import Registry

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
