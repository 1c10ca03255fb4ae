"""Reading folders that hold how a model was attached: methods with all options and files, budget, settings, versions.

`tokprune.json` says it; files that methods were made from lie beside it, named by what they hold, with their SHA-256 in
it. They are JSON or safetensors, so that nothing is run by reading them. Of the model only its kind and size is noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .budget import Budget
from .errors import SavedError, TokPruneError
from .methods import METHODS, Labelled, build_method
from .methods.base import Method
from .registry import check

NAME, FORMAT, VERSION = "tokprune.json", "tokprune", 1
MOST_BYTES, MOST_DIGITS, MOST_METHODS = 2**22, 20, 64  # of a JSON file, of a whole number in it, of one attachment
HOW = "write the folder anew with attachment.save(directory)"
PACKAGES = ("tokprune", "torch", "transformers")
BUDGETS = ("keep_ratio", "keep_tokens", "flops_ratio")
FILE = re.compile(r"[A-Za-z0-9_]{1,64}-[0-9a-f]{16}\.(json|safetensors)")
_KEYS: dict[str, Any] = {
    "format": str,
    "format_version": int,
    "label": str,
    "methods": list,
    "budget": (dict, type(None)),
    "positions": str,
    "newlines": str,
    "model": dict,
    "versions": dict,
}
_MODEL = {
    "model_type": str,
    "decoder_layers": int,
    "decoder_width": int,
    "tower_layers": int,
    "tower_has_cls": bool,
}

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Saved:
    """What a folder holds, checked in itself; `attach` checks it against the model.

    Args:
        folder: where it lies.
        method: what `attach` takes as its method.
        keywords: the other arguments of `attach`.
        model: kind and size of the model that it was saved from.
        versions: of the packages that it was saved with.
    """

    folder: Path
    method: Labelled
    keywords: dict[str, Any]
    model: dict[str, Any]
    versions: dict[str, str]

    def check(self, adapter: Any) -> None:
        """Raise SavedError where it was saved from a model of another family, depth or width."""
        here = facts_of(adapter)
        if here != self.model:
            raise SavedError(
                f"{str(self.folder)!r} was saved from {_in_words(self.model)}; this model is {_in_words(here)}. Attach "
                "to it with tokprune.attach(), then save that"
            )


def facts_of(adapter: Any) -> dict[str, Any]:
    """Kind and size of a model, as they are saved."""
    decoder, tower = adapter.decoder, adapter.tower
    values = (adapter.base.config.model_type, decoder.n_layers, decoder.width, tower.n_layers, tower.has_cls)
    return dict(zip(_MODEL, values, strict=True))


def _in_words(model: Mapping[str, Any]) -> str:
    return (
        f"a {model['model_type'][:40]!r} model of {model['decoder_layers']} decoder layers of width "
        f"{model['decoder_width']} and {model['tower_layers']} vision layers "
        f"with{'' if model['tower_has_cls'] else 'out'} [CLS]"
    )


def read_saved(directory: Folder) -> Saved:
    """Read and check what `saving.write_saved` wrote; nothing in it is executed.

    Raises:
        SavedError: there is nothing, or it is broken, foreign, or of a newer release.
    """
    folder = path_of(directory)
    path = folder / NAME
    try:
        return saved_of(json_of(path), folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SavedError(f"{str(path)!r}: there is no such file; {HOW}") from error
    except (OSError, ValueError, RecursionError) as error:  # TokPruneError and what json raises are ValueErrors
        raise SavedError(f"{str(path)!r} cannot be used: {line(error)}; {HOW}") from error


def path_of(directory: Any) -> Path:
    """The path of a folder.

    Raises:
        SavedError: it cannot be one.
    """
    text = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise SavedError(f"directory={directory!r} is no path of a folder")
    return Path(text)


def line(error: BaseException) -> str:
    """What an error says, in one line that a terminal can show."""
    text = " ".join((str(error) or type(error).__name__).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:600]


def version_of(package: str) -> str:
    """Of an installed package; "0+unknown" for a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


# ---- JSON


def json_of(path: Path) -> Any:
    """Strict JSON: no name twice, no NaN or infinity, no whole number of more than 20 digits.

    Raises:
        ValueError, RecursionError: it is not that.
        OSError: it cannot be read.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_BYTES:
        raise SavedError(f"it is no file of at most {MOST_BYTES} bytes")
    return json.loads(
        path.read_text(encoding="utf-8"),
        object_pairs_hook=_object,
        parse_int=_integer,
        parse_float=_finite,
        parse_constant=_finite,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SavedError("a name stands twice in one of its objects")
    return found


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise SavedError(f"the number {text[:MOST_DIGITS]}... is out of range")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise SavedError(f"the number {text[:MOST_DIGITS]} is not finite")
    return float(text)


def _checked(values: Any, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """An object of just these names and kinds of values; true is no number."""
    if not isinstance(values, dict):
        raise SavedError(f"{what} is {json.dumps(values)[:40]} and no object with {', '.join(kinds)}")
    for name in [*kinds, *values]:
        if name not in values:
            raise SavedError(f"{what} has no {name!r}")
        if name not in kinds:
            raise SavedError(f"{what} has {name[:40]!r}, which this release does not know")
        value, kind = values[name], kinds[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SavedError(f"{name!r} of {what} is {json.dumps(value)[:40]}")
    return values


# ---- what it says


def saved_of(values: Any, folder: Path) -> Saved:
    """From the values of `tokprune.json` in a folder.

    Raises:
        SavedError: they are not what is saved, or a file in the folder is not.
        OSError: a file cannot be read.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise SavedError(f"it is no object with the format {FORMAT!r}")
    version, versions = values.get("format_version"), values.get("versions")
    by = str(versions.get("tokprune"))[:40] if isinstance(versions, dict) else "of an unknown release"
    if isinstance(version, int) and version > VERSION:
        raise SavedError(
            f"its format is {version} and this release reads {VERSION}: tokprune {by} saved it; type pip install -U "
            "tokprune"
        )
    _checked(values, _KEYS, "the file")
    if version != VERSION:
        raise SavedError(f"its format_version is {version}, not {VERSION}")
    _checked(values["versions"], dict.fromkeys(PACKAGES, str), "'versions'")
    _checked(values["model"], _MODEL, "'model'")
    if not values["label"].isprintable():
        raise SavedError("its label cannot be printed")
    try:
        method = Labelled(_method_of(values["methods"], folder), values["label"])
    except TokPruneError as error:
        here = version_of("tokprune")
        raise SavedError(f"{error} (tokprune {by} saved it, this is {here})" if by != here else str(error)) from error
    settings = {"positions": values["positions"], "newlines": values["newlines"]}
    return Saved(folder, method, {**settings, **_keywords(values["budget"])}, values["model"], values["versions"])


def _keywords(budget: dict[str, Any] | None) -> dict[str, Any]:
    """The budget as `attach` takes it: by its name a number, or one for each of two methods."""
    if budget is None:
        return {}
    names = [name for name in BUDGETS if name in budget]
    if len(names) != 1:
        raise SavedError(f"'budget' holds {len(names)} of {', '.join(BUDGETS)}, not one")
    _checked(budget, {names[0]: (int, float, list), "flops_scope": str, "flops_text": int}, "'budget'")
    value = budget[names[0]]
    for number in value if isinstance(value, list) else [value]:
        Budget(**{**budget, names[0]: number})
    return budget


def _method_of(entries: list[Any], folder: Path) -> Method:
    if not 1 <= len(entries) <= MOST_METHODS:
        raise SavedError(f"'methods' names {len(entries)}, not 1 to {MOST_METHODS}")
    return joined([_part_of(entry, folder) for entry in entries])


def joined(parts: Sequence[Method]) -> Method:
    """One method object from filters and methods, as a list of them gives it."""
    return build_method(list(parts) if len(parts) > 1 else parts[0])[0]


def _part_of(entry: Any, folder: Path) -> Method:
    """A method from its name and options; a file that it needs is checked first."""
    entry = _checked(entry, {"name": str, "options": dict}, "a method")
    cls, options = _class_of(entry["name"]), {}
    for key, value in entry["options"].items():
        from_file = key == cls.needs_file and value != ""
        options[key] = str(_file_of(value, folder)) if from_file else decoded(value)
        check(cls, key, options[key])
    try:
        return cls(**options)
    except TokPruneError:
        raise
    except Exception as error:  # whatever another package's method raises
        raise SavedError(f"{entry['name']!r} cannot be made from its options: {line(error)}") from error


def _class_of(name: str) -> type[Method]:
    try:
        cls = METHODS.load(name)
    except TokPruneError as error:
        raise SavedError(f"{line(error)}. If another package brings it, install that") from error
    except Exception as error:  # whatever importing another package's method raises
        raise SavedError(f"the method {name[:40]!r} cannot be imported: {line(error)}; mend its package") from error
    if not isinstance(cls, type) or not issubclass(cls, Method):
        raise SavedError(f"the package that brings {name[:40]!r} gives no method")
    return cls


def decoded(value: Any) -> Any:
    """The value of an option, from JSON; text of a schedule is read by the method that takes one.

    Raises:
        SavedError: it is none.
    """
    if isinstance(value, dict) and value.keys() == {"tuple"} and isinstance(value["tuple"], list):
        return tuple(decoded(v) for v in value["tuple"])
    if isinstance(value, (dict, list)):
        raise SavedError(f"{json.dumps(value)[:80]} is no value of an option")
    return value


# ---- files beside it


def _file_of(reference: Any, folder: Path) -> Path:
    """The path of a file beside `tokprune.json` that holds what was saved.

    It may be a link, as in the hub's cache; what it leads to is told by its hash.
    """
    reference = _checked(reference, {"file": str, "sha256": str}, "the file of a method")
    name = reference["file"]
    if not FILE.fullmatch(name):
        raise SavedError(f"{name[:80]!r} is no name of a saved file; files lie in the folder itself")
    path = folder / name
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SavedError(f"{name!r} is no file")
        if digest_of(path) != reference["sha256"]:
            raise SavedError(f"{name!r} is not what was saved, by its SHA-256; fetch it again")
    except FileNotFoundError as error:
        raise SavedError(f"{name!r} is missing in the folder") from error
    if suffix_of(path) != path.suffix:
        raise SavedError(f"{name!r} is not what its name says")
    return path


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            found.update(part)
    return found.hexdigest()


def suffix_of(path: Path) -> str:
    """By what a file holds, ".json" or ".safetensors": neither runs anything when it is read.

    Raises:
        SavedError: it holds something else.
    """
    with contextlib.suppress(SafetensorError), safe_open(path, framework="pt"):
        return ".safetensors"
    try:
        json_of(path)
    except (ValueError, RecursionError) as error:
        raise SavedError(f"it is neither safetensors nor JSON of at most {MOST_BYTES} bytes") from error
    return ".json"
