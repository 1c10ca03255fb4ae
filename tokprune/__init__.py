"""tokprune: give the language model of a multimodal LLM fewer visual tokens, without training."""

from __future__ import annotations

from .core import interrupts as _interrupts  # noqa: F401 (before anything that takes long)

# isort: split
from collections.abc import Sequence as _Sequence
from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any
from typing import Literal as _Literal

from .core.budget import REFERENCE_TEXT as _REFERENCE_TEXT
from .core.budget import Scope as _Scope
from .core.errors import OptionError as _OptionError
from .core.errors import TokPruneError
from .methods import METHODS as _METHODS
from .methods import Spec as _Spec
from .methods import build_method as _build_method
from .methods.base import Method
from .prune.request import Newlines as _Newlines
from .prune.request import Positions as _Positions
from .prune.request import request_of as _request_of
from .prune.saved import Folder as _Folder
from .prune.saved import is_saved as _is_saved
from .prune.saved import read_saved as _read_saved
from .prune.select import select

if _TYPE_CHECKING:
    from torch.nn import Module as _Module

    from tokprune.integrations.transformers.attachment import Attachment
    from tokprune.integrations.transformers.support import Support

# A checkout's `tokprune/` shadows an installed wheel when Python starts in the repository root;
# `integrations/` and `eval/` are then found beside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "integrations" / "__init__.py").is_file():
    __path__.append(str(_root))

try:
    __version__ = _version("tokprune")
except _PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def attach(
    model: _Module,
    method: _Spec,
    *,
    keep_ratio: float | _Sequence[float] | None = None,
    keep_tokens: int | _Sequence[int] | None = None,
    flops_ratio: float | None = None,
    flops_scope: _Scope = "llm",
    flops_text: int = _REFERENCE_TEXT,
    positions: _Positions = "auto",
    newlines: _Newlines | _Literal["auto"] = "auto",
    replay: _Sequence[_Any] | None = None,
    **options: _Any,
) -> Attachment:
    """Let a model's language model see fewer visual tokens, until `detach` or the end of a `with` block.

    Args:
        model: a Hugging Face multimodal model; a PEFT model is unwrapped.
        method: a name ("vtc_cls"), a specification ("vtc_cls:start_layer=22"), a method object, or a list of
            them; or a saved folder ("./deploy"), which holds its budget. See `tokprune.list_methods()`. Start with
            "vtc_cls" where the vision tower has a [CLS] token and with "fopru" elsewhere.
        keep_ratio: fraction of each image's visual tokens to keep, in (0, 1]. Start with 0.25. For methods between
            decoder layers: what is left after the last cut, of what the language model is given. Two methods take a
            list, or a single fraction of which each gets the square root.
        keep_tokens: number of each image's visual tokens to keep, instead of a fraction.
        flops_ratio: fraction of the unpruned FLOPs to spend, in (0, 1], instead of a number of tokens. Each image keeps
            as many tokens as fit that budget, assuming a prompt of `flops_text` text tokens.
        flops_scope: "llm" counts the language model, "prefill" everything up to the first token.
        flops_text: text tokens of the assumed prompt.
        positions: "contiguous" renumbers the kept tokens without gaps, "original" leaves them their numbers;
            "auto" is what papers measure for the model's family.
        newlines: for models that end every row of a picture with a newline token: "keep_rows_with_tokens" keeps those
            of rows that keep a token, "keep" all, "drop" none; "auto" is the first, or what the method says. Newlines
            do not count against a budget.
        replay: what another attachment `kept`, one entry an image, to use again; it takes no budget.
        **options: options of the method, such as start_layer=22; and calibrate, which every method before the language
            model takes (docs/methods.md): True for RESTORE.

    Returns:
        The handle: a context manager with `report`, `kept`, `paused()` and `detach()`.

    Raises:
        TokPruneError: in one of its kinds, before the model is touched.
    """
    from .integrations.transformers.attachment import attach as attach_to

    if _is_saved(method):
        given = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens, "flops_ratio": flops_ratio, **options}
        given |= {k: None if v == "auto" else v for k, v in (("positions", positions), ("newlines", newlines))}
        return _attach_saved(model, str(method), given, replay)
    request = _request_of(
        method,
        options,
        keep_ratio=keep_ratio,
        keep_tokens=keep_tokens,
        flops_ratio=flops_ratio,
        flops_scope=flops_scope,
        flops_text=flops_text,
        positions=positions,
        newlines=newlines,
        replay=replay,
    )
    return attach_to(model, request)


def get_method(spec: str, **options) -> _Any:
    """A method object from its name or specification ("fopru:strategy=row"); for methods joined by "+", all of them.

    The path of a saved folder ("./deploy") gives what was saved there.

    Raises:
        UnknownNameError: no such method.
        OptionError: no such option, or a value it does not take.
    """
    return _read_saved(spec).method.method if _is_saved(spec) else _build_method(spec, options)[0]


def load(model: _Module, directory: _Folder) -> Attachment:
    """Attach to a model as it was saved with `attachment.save(directory)`.

    Methods with all their options, budget, positions and newlines are those that were saved. Nothing that lies in the
    folder is executed; a method that another package brings is imported from that package.

    Args:
        model: of the kind and size that it was saved from, not attached to.
        directory: the folder.

    Returns:
        The handle, as `attach` does.

    Raises:
        SavedError: the folder is broken, incomplete, of a newer release, or was saved from another kind of model.
        TokPruneError: in the kinds of `attach`, before the model is touched.
    """
    from .integrations.transformers.families import family_of

    saved = _read_saved(directory)
    saved.check(family_of(model).facts)
    return attach(model, saved.method, **saved.keywords)


def _attach_saved(model: _Module, folder: str, given: dict[str, _Any], replay: _Any) -> Attachment:
    """As `load`; what the folder holds cannot be given beside it. A replay takes its methods and no budget."""
    if also := next((name for name, value in given.items() if value is not None), None):
        raise _OptionError(
            f"{folder!r} is a saved folder and holds {also} already: leave {also} out, or attach its method by name"
        )
    if replay is None:
        return load(model, folder)
    saved = _read_saved(folder)
    keywords = {name: saved.keywords[name] for name in ("positions", "newlines")}
    return attach(model, saved.method, replay=replay, **keywords)


def list_methods() -> list[str]:
    """Names that `attach` takes, aliases included."""
    return _METHODS.names()


def list_models() -> list[str]:
    """Values of `config.model_type` that `attach` takes."""
    from .integrations.transformers.families import FAMILIES

    return FAMILIES.names()


def list_support() -> list[Support]:
    """Every method on every model family, from what methods need and families supply."""
    from .integrations.transformers.support import list_support as pairs

    return pairs()


_FROM_EVAL = {"bench": "api", "compare": "api", "explain": "api", "tune": "tune.door"}  # need the extra eval


def __getattr__(name: str) -> _Any:
    """Names that are imported when they are asked for: the type of the handle, and functions of tokprune.eval."""
    if name == "Attachment":
        from .integrations.transformers.attachment import Attachment

        return Attachment
    if name not in _FROM_EVAL:
        raise AttributeError(f"module 'tokprune' has no attribute {name!r}")
    try:
        return getattr(_import_module(f"tokprune.eval.{_FROM_EVAL[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"tokprune.{name} needs {error.name}: use pip install 'tokprune[eval]'") from error


__all__ = [
    "Attachment",
    "Method",
    "TokPruneError",
    "attach",
    "get_method",
    "list_methods",
    "list_models",
    "list_support",
    "load",
    "select",
]
