"""Writing folders that hold how a model was attached; `saved` says what is in them and reads them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .budget import Budget
from .errors import SavedError
from .files import replacing
from .methods import METHODS
from .methods.base import Method
from .methods.chain import Chain, Pipeline
from .saved import (
    BUDGETS,
    FILE,
    FORMAT,
    MOST_DIGITS,
    NAME,
    PACKAGES,
    VERSION,
    Folder,
    decoded,
    digest_of,
    facts_of,
    joined,
    json_of,
    line,
    path_of,
    saved_of,
    suffix_of,
    version_of,
)
from .stages import Stages


def write_saved(directory: Folder, adapter: Any, method: Method, stages: Stages, positions: str, newlines: str) -> None:
    """Write a folder that `saved.read_saved` reads; what was saved there before stays whole until this is.

    Args:
        directory: made where it is missing; files of other names stay in it.
        adapter: of the model.
        method: an object, a chain or a pipeline.
        stages: the label, and the budgets.
        positions: as they are in force.
        newlines: as they are in force.

    Raises:
        SavedError: it cannot be told in names and options, or it cannot be written.
    """
    if stages.replay is not None:
        raise SavedError("a replay is of one call and is not saved; keep attachment.kept, and save what selected it")
    parts = _parts(method)
    entries = [{"name": _name_of(part), "options": _options_of(part)} for part in parts]
    if joined(parts) != method:
        raise SavedError(f"{method} is put together in a way that a list is not; give attach() a list of its parts")
    values = {
        "format": FORMAT,
        "format_version": VERSION,
        "label": stages.label,
        "methods": entries,
        "budget": _budget_of(stages.budget),
        "positions": positions,
        "newlines": newlines,
        "model": facts_of(adapter),
        "versions": {name: version_of(name) for name in PACKAGES},
    }
    folder = path_of(directory)
    try:
        before, made = _files_before(folder), not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(folder, parts, values, before)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        raise SavedError(f"cannot save to {str(folder)!r}: {line(error)}; name a folder that can be written") from error


def _write(folder: Path, parts: Sequence[Method], values: dict[str, Any], before: set[str]) -> None:
    """First the files, which replace none that holds something else, then `tokprune.json` in one step."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as text:
        staging = Path(text)
        for part, entry in zip(parts, values["methods"], strict=True):
            if part.needs_file and getattr(part, part.needs_file):
                reference = _write_file(part, entry["name"], staging)
                entry["options"][part.needs_file] = reference
                values["label"] = _relabelled(values["label"], part, reference["file"])
        (staging / NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        try:
            saved_of(json_of(staging / NAME), staging)
        except ValueError as error:
            raise SavedError(f"{values['label'][:200]!r} could not be loaded again: {line(error)}") from error
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


def _parts(method: Method) -> list[Method]:
    if isinstance(method, Pipeline):
        return [*_parts(method.first), *_parts(method.decoder)]
    return [*method.filters, method.method] if isinstance(method, Chain) else [method]


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
    if isinstance(value, int) and abs(value) < 10**MOST_DIGITS:
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
        digest, suffix = digest_of(partial), suffix_of(partial)
    except ValueError as error:
        typed = f"{method.needs_file}={getattr(method, method.needs_file)!r}"
        raise SavedError(f"{typed} cannot be saved: {line(error)}") from error
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
        values = json_of(folder / NAME)
    except (ValueError, RecursionError, FileNotFoundError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise SavedError(f"{str(folder / NAME)!r} is no saved attachment and would be lost; name another folder")
    methods = values.get("methods")
    options = [m.get("options") for m in methods if isinstance(m, dict)] if isinstance(methods, list) else []
    references = [v for o in options if isinstance(o, dict) for v in o.values() if isinstance(v, dict)]
    return {r["file"] for r in references if isinstance(r.get("file"), str) and FILE.fullmatch(r["file"])}
