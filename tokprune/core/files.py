"""Reading and writing the files of this package.

Writing is atomic: a file is complete or absent, with the usual permissions. Size and format are checked before
reading; JSON and safetensors hold no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, which replaces `path` when the block ends; it is removed if the block fails.

    The file gets the permissions of the one that it replaces, or those of the umask. A link stays a link. For a device
    or a pipe, such as /dev/null, the content is copied into it.

    Raises:
        OSError: it cannot be written.
    """
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "new"
            new.touch()
            yield new
            with new.open("rb") as written, open(path, "wb") as opened:
                shutil.copyfileobj(written, opened)
        return
    target = Path(os.path.realpath(path))
    new = target.with_name(f".{target.name[:60]}.{secrets.token_hex(8)}.writing")
    try:
        new.touch(exist_ok=False)
        mode = stat.S_IMODE((target if target.is_file() else new).stat().st_mode)
        yield new
        new.chmod(mode)  # libraries may have put a file of their own in its place, for its owner alone
        os.replace(new, target)
    except OSError as error:
        if error.filename != str(new):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the temporary name means nothing to users
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def is_special(path: str | Path) -> bool:
    """Whether the path is a device or a pipe, which cannot be replaced or locked."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 atomically; `errors` as in `str.encode`.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8", errors))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; the same content gives the same bytes.

    Args:
        path: of the file.
        tensors: by name, on any device.
        metadata: texts by name.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file  # imports torch

    with replacing(path) as new:
        try:
            save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, new, dict(metadata))
        except SafetensorError as error:  # how its Rust half reports a full or missing disk
            raise OSError(str(error)) from error
        _sort_header(new)


def _sort_header(path: Path) -> None:
    """Sort the header of a safetensors file, whose order is that of a hash table."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(size)), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        sorted_ = header.encode("utf-8").ljust(size)
        if len(sorted_) == size:
            file.seek(8)
            file.write(sorted_)


MOST_BYTES = 2**22  # of a JSON file; far above any of ours


def read_json(path: str | Path, form: str, version: int, key: str = "version") -> dict[str, Any]:
    """Read a JSON object of this package.

    Args:
        path: of the file.
        form: what its "format" has to be.
        version: the newest that this release reads.
        key: under which the file has its version.

    Raises:
        ValueError: it is something else, too large, or of a newer release.
        OSError: it cannot be read.
    """
    values = json.loads(read_small(path))
    if not isinstance(values, dict) or values.get("format") != form:
        raise ValueError(f"not a JSON object with the format {form!r}")
    found = values.get(key)
    if isinstance(found, int) and found > version:
        by = values.get("versions")
        by = f" (saved by tokprune {str(by.get('tokprune'))[:40]})" if isinstance(by, dict) else ""
        raise ValueError(f"its format is {found} and this release reads {version}{by}; use pip install -U tokprune")
    if found != version or isinstance(found, bool):
        raise ValueError(f"its {key} is {str(found)[:20]}, not {version}")
    return values


def read_small(path: str | Path) -> str:
    """The text of a regular file of at most 4 MiB.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_BYTES:
        raise ValueError(f"not a file of at most {MOST_BYTES} bytes")
    return Path(path).read_text(encoding="utf-8")


def write_json(path: str | Path, form: str, version: int, values: Mapping[str, Any], key: str = "version") -> None:
    """Write a JSON object that `read_json` reads.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps({"format": form, key: version, **values}, indent=1) + "\n")


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        found = hashlib.sha256()
        for part in iter(lambda: file.read(2**20), b""):
            found.update(part)
    return found.hexdigest()


def kind_of(path: str | Path) -> str:
    """The kind of a file by its content, ".json" or ".safetensors".

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    with contextlib.suppress(SafetensorError), safe_open(path, framework="pt"):
        return ".safetensors"
    try:
        json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"neither safetensors nor JSON of at most {MOST_BYTES} bytes") from error
    return ".json"


def first_line(error: BaseException) -> str:
    """What an error says, in one line that a terminal can show."""
    text = " ".join((str(error) or type(error).__name__).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:600]
