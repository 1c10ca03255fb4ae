"""Folders that hold how a model was attached: methods with all options and files, budget, settings, versions.

`tokprune.json` holds it, with the SHA-256 of the files that methods were made from, which are in the same folder. All
are JSON or safetensors, so nothing runs by reading them. Of the model only its kind and size is noted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..core.budget import Budget
from ..core.errors import PluginError, SavedError, TokPruneError
from ..core.files import digest_of, first_line, kind_of, read_json, read_small, replacing, write_json
from ..core.registry import check
from ..methods import METHODS, Labelled, build_method, with_calibration
from ..methods.base import Method
from ..methods.compose import Pair
from .request import Request

NAME, FORMAT, VERSION = "tokprune.json", "tokprune", 1
VERSION_KEY, MOST_METHODS = "format_version", 64
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

    def check(self, here: Mapping[str, Any]) -> None:
        """Raise SavedError where it was saved from a model of another family, depth or width than that of `here`."""
        if here != self.model:
            raise SavedError(
                f"{str(self.folder)!r} was saved from {_in_words(self.model)}; this model is {_in_words(here)}. Attach "
                "to it with tokprune.attach(), then save that"
            )


def _in_words(model: Mapping[str, Any]) -> str:
    return (
        f"a {model['model_type'][:40]!r} model of {model['decoder_layers']} decoder layers of width "
        f"{model['decoder_width']} and {model['tower_layers']} vision layers "
        f"with{'' if model['tower_has_cls'] else 'out'} [CLS]"
    )


def read_saved(directory: Folder) -> Saved:
    """Read and check what `write_saved` wrote; nothing in it is executed.

    Raises:
        SavedError: there is nothing, or it is broken, foreign, or of a newer release.
    """
    folder = path_of(directory)
    path = folder / NAME
    try:
        return saved_of(read_json(path, FORMAT, VERSION, VERSION_KEY), folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SavedError(f"{str(path)!r}: no such file; {HOW}") from error
    except (OSError, ValueError, RecursionError) as error:  # TokPruneError and what json raises are ValueErrors
        raise SavedError(f"{str(path)!r} cannot be used: {first_line(error)}; {HOW}") from error


def is_saved(method: Any) -> bool:
    """Whether what was given as a method is the path of a saved folder; a bare word is always a name."""
    if not isinstance(method, (str, os.PathLike)) or "\0" in os.fspath(method):
        return False
    path = os.fspath(method)
    is_path = isinstance(method, os.PathLike) or "/" in path or os.sep in path
    return is_path and os.path.isfile(os.path.join(path, NAME))


def takes_budget(method: Any) -> bool:
    """Whether a budget goes with what was given as a method; a saved folder holds its own.

    Raises:
        TokPruneError: there is no such method.
    """
    return not is_saved(method) and build_method(method)[0].takes_budget


def path_of(directory: Any) -> Path:
    """The path of a folder.

    Raises:
        SavedError: it cannot be one.
    """
    text = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise SavedError(f"directory={directory!r} is not the path of a folder")
    return Path(text)


def version_of(package: str) -> str:
    """Of an installed package; "0+unknown" for a checkout that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _checked(values: Any, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """An object with exactly these names and kinds of values; `true` is not a number."""
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
    _checked(values, _KEYS, "the file")
    _checked(values["versions"], dict.fromkeys(PACKAGES, str), "'versions'")
    by = values["versions"]["tokprune"][:40]
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


def _method_of(entries: list[Any], folder: Path) -> Method | Pair:
    if not 1 <= len(entries) <= MOST_METHODS:
        raise SavedError(f"'methods' names {len(entries)}, not 1 to {MOST_METHODS}")
    return joined([_part_of(entry, folder) for entry in entries])


def joined(parts: Sequence[Method]) -> Method | Pair:
    """One method object from filters and methods, as a list of them gives it."""
    return build_method(list(parts) if len(parts) > 1 else parts[0])[0]


def _part_of(entry: Any, folder: Path) -> Method:
    """A method from its name and options; a file that it needs is checked first."""
    entry = _checked(entry, {"name": str, "options": dict}, "a method")
    cls, options, given = _class_of(entry["name"]), {}, dict(entry["options"])
    calibrate = [given.pop("calibrate")] if "calibrate" in given else []
    for key, value in given.items():
        from_file = key == cls.needs_file and value != ""
        options[key] = str(_file_of(value, folder)) if from_file else decoded(value)
        check(cls, key, options[key])
    try:
        return with_calibration(cls(**options), calibrate, entry["name"])
    except TokPruneError:
        raise
    except Exception as error:  # whatever another package's method raises
        raise SavedError(f"{entry['name']!r} cannot be made from its options: {first_line(error)}") from error


def _class_of(name: str) -> type[Method]:
    if ":" in name:  # a folder from elsewhere names no code to run
        raise SavedError(f"no method named {name[:40]!r}; only names of tokprune and of installed packages are loaded")
    try:
        return METHODS.load(name)
    except PluginError as error:
        raise SavedError(first_line(error)) from error
    except TokPruneError as error:
        raise SavedError(f"{first_line(error)}. If another package brings it, install that") from error


def decoded(value: Any) -> Any:
    """The value of an option, from JSON; text of a schedule is read by the method that takes one.

    Raises:
        SavedError: it is not one.
    """
    if isinstance(value, dict) and value.keys() == {"tuple"} and isinstance(value["tuple"], list):
        return tuple(decoded(v) for v in value["tuple"])
    if isinstance(value, (dict, list)):
        raise SavedError(f"{json.dumps(value)[:80]} is not a value of an option")
    return value


# ---- files in the same folder


def _file_of(reference: Any, folder: Path) -> Path:
    """The path of a file that was saved with `tokprune.json`.

    It may be a link, as in the hub's cache; its hash says whether it is the right file.
    """
    reference = _checked(reference, {"file": str, "sha256": str}, "the file of a method")
    name = reference["file"]
    if not FILE.fullmatch(name):
        raise SavedError(f"{name[:80]!r} is not the name of a saved file; files lie in the folder itself")
    path = folder / name
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SavedError(f"{name!r} is not a file")
        if digest_of(path) != reference["sha256"]:
            raise SavedError(f"{name!r} is not what was saved, by its SHA-256; fetch it again")
    except FileNotFoundError as error:
        raise SavedError(f"{name!r} is missing in the folder") from error
    if kind_of(path) != path.suffix:
        raise SavedError(f"{name!r} is not what its name says")
    return path


# ---- writing


def write_saved(directory: Folder, facts: Mapping[str, Any], request: Request) -> None:
    """Write a folder that `saved.read_saved` reads; what was saved there before stays whole until this is.

    Args:
        directory: made where it is missing; files of other names stay in it.
        facts: kind and size of the model, as its family tells them.
        request: methods, budgets and settings in force.

    Raises:
        SavedError: it cannot be told in names and options, or it cannot be written.
    """
    if request.replay is not None:
        raise SavedError("a replay is of one call and is not saved; keep attachment.kept, and save what selected it")
    parts = list(request.method.members)
    named = [_uncalibrated(part) for part in parts]
    entries = [{"name": _name_of(part), "options": _options_of(part) | more} for part, more in named]
    if joined(parts) != request.method:
        raise SavedError(
            f"{request.method} is put together in a way that a list is not; give attach() a list of its parts"
        )
    values = {
        "label": request.label,
        "methods": entries,
        "budget": _budget_of(request.budget),
        "positions": request.positions,
        "newlines": request.newlines,
        "model": dict(facts),
        "versions": {name: version_of(name) for name in PACKAGES},
    }
    folder = path_of(directory)
    try:
        before, made = _files_before(folder), not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(folder, [part for part, _ in named], values, before)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        raise SavedError(
            f"cannot save to {str(folder)!r}: {first_line(error)}; name a folder that can be written"
        ) from error


def _write(folder: Path, parts: Sequence[Method], values: dict[str, Any], before: set[str]) -> None:
    """First the files, which replace none that holds something else, then `tokprune.json` in one step."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as text:
        staging = Path(text)
        for part, entry in zip(parts, values["methods"], strict=True):
            if part.needs_file and getattr(part, part.needs_file):
                reference = _write_file(part, entry["name"], staging)
                entry["options"][part.needs_file] = reference
                values["label"] = _relabelled(values["label"], part, reference["file"])
        write_json(staging / NAME, FORMAT, VERSION, values, VERSION_KEY)
        try:
            saved_of(read_json(staging / NAME, FORMAT, VERSION, VERSION_KEY), staging)
        except ValueError as error:
            raise SavedError(f"{values['label'][:200]!r} could not be loaded again: {first_line(error)}") from error
        now = {path.name for path in staging.iterdir()} - {NAME}
        new = {name for name in now if not (folder / name).exists()}
        try:
            for name in (*sorted(now), NAME):
                os.replace(staging / name, folder / name)
        except BaseException:
            _remove(folder, new)
            raise
    _remove(folder, before - now)


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _relabelled(label: str, method: Method, file: str) -> str:
    """The label with the file's name in the folder, where it names a file of this machine, or of an earlier folder."""
    option, given = method.needs_file, getattr(method, method.needs_file)
    for name in (given, Path(given).name):
        if f"{option}={name}" in label:
            return label.replace(f"{option}={name}", f"{option}={file}")
    return label


def _uncalibrated(method: Method) -> tuple[Method, dict[str, str]]:
    """The method that has a name, and `calibrate` as an option of it where it has that."""
    wrapper: Any = method
    return (wrapper.method, {"calibrate": wrapper.calibrate}) if method.keeps_positions else (method, {})


def _name_of(method: Method) -> str:
    name = METHODS.name_of(type(method))
    if name is None:
        raise SavedError(
            f"{type(method).__name__} has no name to save it under; register it through the entry point "
            f"{METHODS.group} of a package, and install that"
        )
    return name


def _options_of(method: Method) -> dict[str, Any]:
    """All options, so that another default in a later release changes nothing."""
    found = {}
    for option in (f for f in fields(method) if f.init):
        try:
            found[option.name] = _encoded(getattr(method, option.name))
        except SavedError as error:
            raise SavedError(f"{type(method).__name__}: {option.name}={error}") from None
    if type(method)(**{key: decoded(value) for key, value in found.items()}) != method:
        raise SavedError(f"{method} does not come back from the values of its options; save a method that does")
    return found


def _encoded(value: Any) -> Any:
    """A value of JSON; schedules are their text, tuples are marked."""
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    text = getattr(value, "text", None)
    if isinstance(text, str) and text:
        return text
    raise SavedError(f"{value!r} cannot be saved; finite numbers, text, true, false, None, tuples and schedules can")


def _budget_of(budget: Any) -> dict[str, Any] | None:
    """By its name a number, or one for each of two methods; a float comes back as it was."""
    if budget is None:
        return None
    budgets: tuple[Budget, ...] = budget if isinstance(budget, tuple) else (budget,)
    (name,) = {name for b in budgets for name in BUDGETS if getattr(b, name) is not None}
    numbers = [getattr(b, name) for b in budgets]
    plain = [int(n) if name == "keep_tokens" or isinstance(n, int) else float(n) for n in numbers]
    value = plain if isinstance(budget, tuple) else plain[0]
    return {name: value, "flops_scope": budgets[0].flops_scope, "flops_text": int(budgets[0].flops_text)}


def _write_file(method: Method, name: str, staging: Path) -> dict[str, str]:
    """The file of a method, under a name that no other content has."""
    partial = staging / "file"
    try:
        with replacing(partial) as new:
            method.write_file(new)
        digest, suffix = digest_of(partial), kind_of(partial)
    except ValueError as error:
        typed = f"{method.needs_file}={getattr(method, method.needs_file)!r}"
        raise SavedError(f"{typed} cannot be saved: {first_line(error)}") from error
    file = f"{re.sub('[^A-Za-z0-9_]', '_', name)[:64]}-{digest[:16]}{suffix}"
    os.replace(partial, staging / file)
    return {"file": file, "sha256": digest}


def _files_before(folder: Path) -> set[str]:
    """Files of what was saved there before.

    Raises:
        SavedError: another `tokprune.json` is there.
    """
    if not os.path.lexists(folder / NAME):
        return set()
    try:
        values = json.loads(read_small(folder / NAME))
    except (ValueError, RecursionError, FileNotFoundError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise SavedError(f"{str(folder / NAME)!r} is not a saved attachment and would be lost; name another folder")
    methods = values.get("methods")
    options = [m.get("options") for m in methods if isinstance(m, dict)] if isinstance(methods, list) else []
    references = [v for o in options if isinstance(o, dict) for v in o.values() if isinstance(v, dict)]
    return {r["file"] for r in references if isinstance(r.get("file"), str) and FILE.fullmatch(r["file"])}
