"""Pictures of a user: turned and converted as transformers does it, scaled or refused where that would ruin them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import refusal, tokprune_cli
from house import modules
from PIL import Image
from tokprune.eval.run.runner import Runner
from tokprune.eval.suites import export as lmms_export
from tokprune.eval.tasks import load_task
from tokprune.integrations.lmms_eval.prompts import pictures
from transformers.image_utils import load_image

from tokprune.core.errors import TokPruneError

ORIENTATION = 0x0112
DEEP = (np.arange(48 * 32).reshape(32, 48) * 42).astype(np.uint16)  # 0 to 64470
RGB = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
ALPHA = np.arange(32 * 48).reshape(32, 48).astype(np.uint8)


def of(mode: str) -> Image.Image:
    """A picture of 48 x 32 pixels that looks like something in this mode."""
    if mode in ("RGBA", "LA", "PA"):
        picture = Image.fromarray(RGB).convert({"RGBA": "RGB", "LA": "L", "PA": "P"}[mode]).convert(mode)
        picture.putalpha(Image.fromarray(ALPHA))
        return picture
    return Image.fromarray(RGB).convert(mode)


def file(path: Path, picture: Image.Image, **more) -> Path:
    picture.save(path, **more)
    return path


def turned(path: Path, orientation: int, picture: Image.Image | None = None) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file(path, picture or Image.fromarray(RGB), exif=exif)


def palette(path: Path, transparency: bytes | int) -> Path:
    return file(path, of("P"), transparency=transparency)


def several(path: Path) -> Path:
    return file(path, of("P"), save_all=True, append_images=[Image.new("P", (48, 32))], duration=50)


# What transformers loads well is loaded as it loads it.
GOOD: dict[str, Callable[[Path], Path]] = {
    **{f"turned {i} jpg": (lambda f, i=i: turned(f / "a.jpg", i)) for i in range(1, 9)},
    **{f"turned {i} png": (lambda f, i=i: turned(f / "a.png", i)) for i in (1, 3, 6)},
    **{f"turned {i} tiff": (lambda f, i=i: turned(f / "a.tiff", i)) for i in (1, 3, 6)},
    **{f"turned {i} webp": (lambda f, i=i: turned(f / "a.webp", i)) for i in (1, 3, 6)},
    "turned nonsense": lambda f: turned(f / "a.jpg", 77),
    "turned CMYK": lambda f: turned(f / "a.jpg", 6, of("CMYK")),
    "turned RGBA": lambda f: turned(f / "a.png", 8, of("RGBA")),
    **{f"mode {m}": (lambda f, m=m: file(f / "a.png", of(m))) for m in ("1", "L", "P", "LA", "RGB", "RGBA")},
    **{f"mode {m}": (lambda f, m=m: file(f / "a.tiff", of(m))) for m in ("CMYK", "YCbCr", "LAB")},
    "transparent colour": lambda f: palette(f / "a.png", 3),
    "transparent colours": lambda f: palette(f / "a.png", bytes(range(256))),
    "transparent grey": lambda f: file(f / "a.png", of("L"), transparency=7),
    "GIF that moves": lambda f: several(f / "a.gif"),
    "PNG that moves": lambda f: several(f / "a.png"),
    "WebP that moves": lambda f: several(f / "a.webp"),
    "all white": lambda f: file(f / "a.png", Image.new("RGB", (8, 8), "white")),
    "all clear": lambda f: file(f / "a.png", Image.new("RGBA", (8, 8))),
}


def float_file(path: Path, values: np.ndarray) -> Path:
    return file(path, Image.fromarray(values.astype(np.float32)))


# Conversions to RGB clip these: white or black is left.
SCALED: dict[str, tuple[Callable[[Path], Path], np.ndarray]] = {
    "16 bit PNG": (lambda f: file(f / "a.png", Image.fromarray(DEEP)), DEEP / 257),
    "16 bit TIFF": (lambda f: file(f / "a.tiff", Image.fromarray(DEEP)), DEEP / 257),
    "16 bit PGM": (lambda f: file(f / "a.pgm", Image.fromarray(DEEP)), DEEP / 257),
    "16 bit of the other end": (
        lambda f: file(f / "a.tiff", Image.frombytes("I;16B", (48, 32), DEEP.astype(">u2").tobytes())),
        DEEP / 257,
    ),
    "32 bit TIFF": (lambda f: file(f / "a.tiff", Image.fromarray(DEEP.astype(np.int32))), DEEP / 257),
    "16 bit, turned": (lambda f: turned(f / "a.png", 3, Image.fromarray(DEEP)), DEEP[::-1, ::-1] / 257),
    "16 bit, black": (lambda f: file(f / "a.png", Image.fromarray(0 * DEEP)), 0 * DEEP),
    "floats to 1": (lambda f: float_file(f / "a.tiff", DEEP / 65535), DEEP / 257),
    "floats to 255": (lambda f: float_file(f / "a.tiff", DEEP / 257), DEEP / 257),
}


def png_of_no_size(path: Path) -> Path:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    content = file(path, Image.fromarray(RGB)).read_bytes()
    return written(path, content[: int(share * len(content))])


def alpha_alone(path: Path, mode: str) -> Path:
    picture = Image.new(mode, (48, 32))
    picture.putalpha(Image.fromarray(ALPHA))
    return file(path, picture)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "floats below zero": (lambda f: float_file(f / "a.tiff", DEEP / 65535 - 0.5), "8-bit PNG"),
    "floats above 255": (lambda f: float_file(f / "a.tiff", DEEP), "8-bit PNG"),
    "floats and none": (lambda f: float_file(f / "a.tiff", np.where(DEEP > 99, np.nan, 1)), "8-bit PNG"),
    "floats without end": (lambda f: float_file(f / "a.tiff", np.where(DEEP > 99, np.inf, 1)), "8-bit PNG"),
    "32 bit, all of them": (lambda f: file(f / "a.tiff", Image.fromarray(DEEP.astype(np.int32) * 999)), "8-bit PNG"),
    "32 bit below zero": (lambda f: file(f / "a.tiff", Image.fromarray(DEEP.astype(np.int32) - 9)), "8-bit PNG"),
    "16 bit with values of 8": (lambda f: file(f / "a.png", Image.fromarray(DEEP % 256)), "8-bit PNG"),
    "32 bit with values of 8": (
        lambda f: file(f / "a.tiff", Image.fromarray((DEEP % 256).astype(np.int32))),
        "8-bit PNG",
    ),
    "all in the alpha": (lambda f: alpha_alone(f / "a.png", "RGBA"), "background"),
    "grey, all in the alpha": (lambda f: alpha_alone(f / "a.png", "LA"), "background"),
    **{f"cut at {share}": (lambda f, s=share: cut(f / "a.png", s), "a.png") for share in (0.01, 0.3, 0.9)},
    **{f"JPEG cut at {share}": (lambda f, s=share: cut(f / "a.jpg", s), "a.jpg") for share in (0.1, 0.9)},
    "empty": (lambda f: written(f / "a.png", b""), "a.png"),
    "a text": (lambda f: written(f / "a.jpg", b"hello"), "a.jpg"),
    "no columns": (lambda f: written(f / "a.ppm", b"P6\n0 4\n255\n"), "a.ppm"),
    "PNG without columns": (lambda f: png_of_no_size(f / "a.png"), "a.png"),
    "QOI without a body": (lambda f: written(f / "a.qoi", b"qoif" + struct.pack(">IIBB", 9, 9, 3, 0)), "a.qoi"),
}


def as_task(path: Path) -> Image.Image:
    line = {"file_name": path.name, "question": "what is it?", "answer": "a thing"}
    (path.parent / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    return load_task(str(path.parent)).image(path.name)


def as_export(path: Path) -> Image.Image:
    """What lmms-eval will see."""
    import datasets

    as_task(path)
    task = load_task(str(path.parent))
    name = lmms_export.export(task, task.samples(), path.parent / "out")
    parquet = str(path.parent / "out" / name / "test.parquet")
    (row,) = datasets.Dataset.from_parquet(parquet, cache_dir=str(path.parent / "cache"))
    namespace: dict = {}
    exec((path.parent / "out" / name / "utils.py").read_text(), namespace)
    (picture,) = namespace["doc_to_visual"](row)
    return picture


def as_document(path: Path) -> Image.Image:
    """As a task of lmms-eval hands it over."""
    (picture,) = pictures(Image.open(path), "t")
    return picture


WAYS = {"task": as_task, "export": as_export, "document": as_document}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", GOOD)
def test_pictures_are_loaded_as_transformers_loads_them(what, way, tmp_path):
    path = GOOD[what](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = load_image(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = WAYS[way](path)
    assert (found.mode, found.size) == (want.mode, want.size)
    assert (np.asarray(found) == np.asarray(want)).all()


def test_a_turned_picture_is_seen_to_be_turned(tmp_path):
    assert as_task(turned(tmp_path / "a.jpg", 6)).size == (32, 48)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", SCALED)
def test_deep_pictures_keep_what_they_show(what, way, tmp_path):
    write, want = SCALED[what]
    found = np.asarray(WAYS[way](write(tmp_path))).astype(float)
    assert found.shape == (*want.shape, 3)
    assert (abs(found - want[..., None]) <= 0.51).all()


@pytest.mark.parametrize("what", BAD)
def test_pictures_that_would_be_ruined_are_refused_in_one_line(what, tmp_path):
    write, told = BAD[what]
    path = write(tmp_path)
    line = refusal(tokprune_cli("explain", str(path)))
    assert f"cannot read the picture {path}: " in line
    assert told in line
    with pytest.raises(TokPruneError, match="cannot read the picture"):
        as_task(path)


def test_a_folder_without_frames_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.png").mkdir()
    assert "a.png: it is a folder without frames" in refusal(tokprune_cli("explain", str(tmp_path / "a.png")))


@pytest.mark.parametrize("what", [w for w in BAD if BAD[w][1] in ("8-bit PNG", "background")])
def test_documents_that_would_be_ruined_are_refused(what, tmp_path):
    write, told = BAD[what]
    with pytest.raises(TokPruneError, match=f"the task t .*{told}"):
        as_document(write(tmp_path))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "gif", "bmp", "ppm"])
def test_broken_bytes_are_a_picture_or_one_clear_error(suffix, tmp_path):
    """Whatever Pillow makes of them, EXIF included."""
    rng = random.Random(suffix)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "somebody"
    held = io.BytesIO()
    options = {"exif": exif} if suffix in ("jpg", "png", "tiff", "webp") else {}
    Image.fromarray(RGB).save(held, {"jpg": "jpeg"}.get(suffix, suffix), **options)
    for _ in range(150):
        content = bytearray(held.getvalue())
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(min(len(content), 300))] = rng.randrange(256)
        path = written(tmp_path / f"a.{suffix}", bytes(content))
        with warnings.catch_warnings(), contextlib.suppress(TokPruneError):
            warnings.simplefilter("ignore")
            assert as_task(path).mode == "RGB"


def test_explain_sees_what_the_task_sees(tmp_path, monkeypatch):
    """A turned picture keeps the same tokens as the same picture that was turned before it was saved."""
    monkeypatch.chdir(tmp_path)
    upright = Image.fromarray(RGB).resize((96, 64))
    file(tmp_path / "upright.png", upright)
    turned(tmp_path / "turned.png", 8, upright.transpose(Image.Transpose.ROTATE_270))
    kept = []
    for name in ("upright", "turned"):
        done = tokprune_cli("explain", f"{name}.png", "--json", f"{name}.json", "--out", f"{name}-kept.png")
        assert done.returncode == 0, done.stderr
        kept.append(json.loads((tmp_path / f"{name}.json").read_text())["methods"][0]["kept"])
        kept.append(np.asarray(Image.open(tmp_path / f"{name}-kept.png")).tolist())
    assert kept[0] == kept[2]
    assert kept[1] == kept[3]


def test_compare_sees_the_picture_upright(tmp_path):
    path = turned(tmp_path / "a.png", 6)
    as_task(path)
    runner, task = Runner.load("tiny-llava"), load_task(str(tmp_path))
    given = runner.prepare(task, task.samples(), [path.name])["pixel_values"]
    want = runner.processor(images=[load_image(str(path))], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert (given == want).all()


def test_one_function_opens_pictures():
    """Nothing else in the package opens or converts one."""
    found = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                opens = node.func.attr == "open" and getattr(node.func.value, "id", "") == "Image"
                if opens or node.func.attr in ("convert", "exif_transpose"):
                    found.add(name)
    assert found == {"tokprune.prune.pictures"}


def test_the_picture_of_a_run_that_vanishes_is_one_clear_error(folder):
    task = load_task(str(folder))
    (folder / "1.png").unlink()
    for read in (task.image, task.checksum):
        with pytest.raises(TokPruneError, match=r"cannot read the picture .*1\.png"):
            read("1.png")
