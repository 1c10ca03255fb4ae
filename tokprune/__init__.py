"""tokprune: give the language model of a multimodal LLM fewer visual tokens, without training."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path

from .attachment import Attachment, attach
from .compatibility import list_support
from .errors import TokPruneError
from .methods import METHODS as _METHODS
from .methods import build_method as _build_method
from .methods.base import Method

# A checkout's `tokprune/` shadows an installed wheel when Python starts in the repository root;
# `integrations/` and `eval/` are then found beside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "integrations" / "__init__.py").is_file():
    __path__.append(str(_root))

try:
    __version__ = _version("tokprune")
except _PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def get_method(spec: str, **options) -> Method:
    """A method object from its name or specification ("fopru:strategy=row").

    Raises:
        UnknownNameError: no such method.
        OptionError: no such option, or a value it does not take.
    """
    return _build_method(spec, options)[0]


def list_methods() -> list[str]:
    """Names that `attach` takes, aliases included."""
    return _METHODS.names()


def list_models() -> list[str]:
    """Values of `config.model_type` that `attach` takes."""
    from .integrations.transformers import MODELS

    return MODELS.names()


__all__ = [
    "Attachment",
    "Method",
    "TokPruneError",
    "attach",
    "get_method",
    "list_methods",
    "list_models",
    "list_support",
]
