"""The host Hugging Face transformers.

Read `attachment`, `observer`, `encode`, `shorten`; then `layers/` and `families/`. `passes` holds the state of a call
and `caches` what a KV cache holds, `prompt` finds pictures in a prompt, `tower_taps` reads the vision tower, `compat`
has everything private of transformers, `support` says which method runs on which model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment import Attachment, attach
    from .compat import (
        NEWEST,
        OLDEST,
        as_cache,
        attention_implementation,
        cache_of,
        features_of,
        is_newer_than_tested,
        torchvision_fault,
    )
    from .families import FAMILIES, all_families, family_class, family_of, shape_from_config
    from .families.base import ModelFamily
    from .families.sizes import Sizes, pil_image_processor
    from .processing import inputs_of, load_processor, without_videos
    from .support import Support, list_support

# Names by module, which is imported when one of them is asked for: torch and transformers take seconds.
_NAMES = {
    ".attachment": "Attachment attach",
    ".compat": "NEWEST OLDEST as_cache attention_implementation cache_of features_of is_newer_than_tested "
    "torchvision_fault",
    ".families": "FAMILIES all_families family_class family_of shape_from_config",
    ".families.base": "ModelFamily",
    ".families.sizes": "Sizes pil_image_processor",
    ".processing": "inputs_of load_processor without_videos",
    ".support": "Support list_support",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """A name of the door."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


__all__ = [
    "FAMILIES",
    "NEWEST",
    "OLDEST",
    "Attachment",
    "ModelFamily",
    "Sizes",
    "Support",
    "all_families",
    "as_cache",
    "attach",
    "attention_implementation",
    "cache_of",
    "family_class",
    "family_of",
    "features_of",
    "inputs_of",
    "is_newer_than_tested",
    "list_support",
    "load_processor",
    "pil_image_processor",
    "shape_from_config",
    "torchvision_fault",
    "without_videos",
]
