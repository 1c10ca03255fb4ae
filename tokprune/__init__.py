"""tokprune: give the language model of a multimodal LLM fewer visual tokens, without training."""

from . import interrupts as _interrupts  # noqa: F401 (before anything that takes long)

# isort: split
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path

from torch.nn import Module as _Module

from .attachment import Attachment, attach
from .compatibility import list_support
from .errors import TokPruneError
from .methods import METHODS as _METHODS
from .methods import build_method as _build_method
from .methods.base import Method
from .saved import Folder as _Folder
from .saved import read_saved as _read_saved

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
    from .integrations.transformers import adapter_for

    saved = _read_saved(directory)
    saved.check(adapter_for(model))
    return attach(model, saved.method, **saved.keywords)


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
    "load",
]
