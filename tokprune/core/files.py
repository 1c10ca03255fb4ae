"""Files that are written at once: they are there complete, or not at all, and are as readable as any other file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty file to write to, that takes the place of `path` when the block ends; it goes when the block fails.

    The file gets the permissions of the one that it replaces, or those that the umask leaves. A link stays a link. What
    is written for a device or a pipe, such as /dev/null, is copied into it.

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
        raise OSError(error.errno, error.strerror, str(path)) from error  # nobody knows the other name
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def is_special(path: str | Path) -> bool:
    """Whether there is a device or a pipe, which cannot be replaced and has no lock."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 at once; `errors` as `str.encode` takes it.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8", errors))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at once; the same content gives the same bytes.

    Args:
        path: of the file.
        tensors: by name; they may lie on any device.
        metadata: texts by name.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as new:
        try:
            save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, new, dict(metadata))
        except SafetensorError as error:  # how its Rust half reports a full or missing disk
            raise OSError(str(error)) from error
        _sort_header(new)


def _sort_header(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which are those of a hash table before."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(size)), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        sorted_ = header.encode("utf-8").ljust(size)
        if len(sorted_) == size:
            file.seek(8)
            file.write(sorted_)
