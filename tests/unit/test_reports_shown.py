"""Reports in a console and in a notebook: a few lines, grids, and pictures with the dropped tokens dim."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from house import ROOT
from PIL import Image
from tiny import batch, model
from transformers import AutoProcessor

import tokprune
from tokprune.core.errors import RunError
from tokprune.core.layout import Layout, Region, frames_layout, grid_layout
from tokprune.prune.explain import DIM, seen
from tokprune.prune.report import ImageReport, Report
from tokprune.prune.shown import MOST_IMAGES, as_seen
from tokprune.prune.videos import Clip

KEPT = (0, 5, 11)


def image(layout=None, kept=KEPT, **fields) -> ImageReport:
    layout = layout or grid_layout(3, 4)
    return ImageReport(torch.isin(torch.arange(len(layout.crop)), torch.tensor(kept)), layout, **fields)


def report(*images) -> Report:
    return Report(method="mine <b>", budget="keep_ratio=0.25", signals="", n_layers=2, images=list(images))


def grids(html: str) -> list[dict]:
    """For every drawn grid its size, and the rows and columns of kept and of dropped cells."""
    found = []
    for text in re.findall(r"<svg.*?</svg>", html):
        svg = ElementTree.fromstring(text)
        paths = {p.get("class"): p.get("d") for p in svg.iter() if p.tag.endswith("path")}
        cells = {k: [(int(r), int(c)) for c, r in re.findall(r"M(\d+) (\d+)", d)] for k, d in paths.items()}
        found.append({"size": tuple(map(int, svg.get("viewBox").split()[2:])), **cells})
    return found


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,(.*?)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


# ---- in a console


@pytest.mark.parametrize("method", ["vtc_cls", "fastv:layer=2"])
def test_a_call_is_a_few_lines(method):
    with torch.no_grad(), tokprune.attach(model("clip"), method, keep_ratio=0.25) as attachment:
        assert repr(attachment.report).endswith("no call yet")
        model("clip")(**batch())
        report = attachment.report
    assert len(repr(report).splitlines()) <= 9
    assert max(map(len, repr(report).splitlines())) <= 120
    assert re.sub(r"\n  ", "; ", repr(report)).replace("; ", ": ", 1) == str(report)
    # What it holds is shorter still.
    for part in (*report.images, *report.prefills, report.ledger, report.images[0].layout):
        assert len(repr(part)) <= 160, part
    assert "36 -> 9 visual tokens" in repr(report.images[0])


def test_parts_say_what_they_are():
    assert repr(image()) == "ImageReport(image, 12 -> 3 visual tokens, Layout(12 rows, grid 3 x 4))"
    crops = Layout((0, 1, 2, -1), (0, 0, 0, 0), (0, 0, 1, -1), (1, 2))
    assert repr(crops) == "Layout(4 rows, grid 1 x 1 and 1 x 2, 1 x 2 crops)"
    assert "1 -> 0 rows without a patch" in repr(image(crops, kept=(0,)))


# ---- in a notebook


def test_a_report_draws_its_grids():
    html = report(image())._repr_html_()
    (grid,) = grids(html)
    assert grid["size"] == (4, 3)
    assert grid["kept"] == [(0, 0), (1, 1), (2, 3)]
    assert len(grid["dropped"]) == 9
    assert "image 1: 12 -&gt; 3<" in html
    assert "mine &lt;b&gt; keep_ratio=0.25" in html
    assert "src=" not in html
    ElementTree.fromstring(html)


def test_a_grid_a_frame_and_a_grid_a_mosaic():
    video = grids(report(image(frames_layout(3, 2, 2), kept=(1, 6, 8), is_video=True))._repr_html_())
    assert [(g["size"], g["kept"]) for g in video] == [((2, 2), [(0, 1)]), ((2, 2), [(1, 0)]), ((2, 2), [(0, 0)])]
    crops = Layout((0, 1, 2, -1), (0, 0, 0, 0), (0, 0, 1, -1), (1, 2))
    both = grids(report(image(crops, kept=(0, 2, 3)))._repr_html_())
    assert [(g["size"], g["kept"]) for g in both] == [((1, 1), [(0, 0)]), ((2, 1), [(0, 1)])]


def test_of_many_pictures_the_first_are_drawn():
    html = report(*[image()] * (MOST_IMAGES + 2))._repr_html_()
    assert len(grids(html)) == MOST_IMAGES
    assert "and 2 more" in html


def test_a_report_without_a_call_says_so():
    assert "no call yet" in report()._repr_html_()


# ---- with pictures


def test_dropped_cells_of_a_picture_are_dim():
    shown = report(image()).show([Image.new("RGB", (400, 300), (200, 100, 50))])
    (pixels,) = pictures(shown._repr_html_())
    cells = pixels.reshape(3, 100, 4, 100, 3)[:, 50, :, 50].reshape(12, 3)
    for i, cell in enumerate(cells):
        assert tuple(cell) == ((200, 100, 50) if i in KEPT else tuple(int(v * DIM) for v in (200, 100, 50))), i
    assert repr(shown).startswith("mine <b> keep_ratio=0.25")


def test_a_clip_has_its_frames_beside_each_other():
    video = image(frames_layout(2, 2, 2), kept=(0, 7), is_video=True)
    clip = Clip((Image.new("RGB", (112, 112), "white"),) * 2, fps=1.0)
    (pixels,) = pictures(report(video).show([clip])._repr_html_())
    bright = [[pixels[r, x, 0] == 255 for r in (20, 90) for x in (left + 20, left + 90)] for left in (0, 116)]
    assert bright == [[True, False, False, False], [False, False, False, True]]


def stripes() -> Image.Image:
    """White, 200 x 100, with a black stripe of 50 columns at either side."""
    picture = Image.new("RGB", (200, 100), "white")
    picture.paste("black", (0, 0, 50, 100))
    picture.paste("black", (150, 0, 200, 100))
    return picture


SQUARE = Region(4, 4, tuple(range(16)))


@pytest.mark.parametrize(
    ("does", "size", "white"),
    [("do_center_crop", (100, 100), 1.0), ("", (200, 100), 0.5), ("do_pad", (200, 200), 0.25)],
)
def test_what_the_model_saw_of_a_wide_picture_is_the_processors_affair(does, size, white):
    processor = SimpleNamespace(image_processor=SimpleNamespace(**({does: True} if does else {})))
    seen = as_seen(stripes(), SQUARE, processor)
    assert seen.size == size
    assert np.asarray(seen).mean() / 255 == pytest.approx(white, abs=0.02)
    assert as_seen(stripes(), Region(2, 4, tuple(range(8)))).size == (200, 100)  # the grid has the picture's ratio


def test_a_real_processor_shows_the_same_part():
    processor = AutoProcessor.from_pretrained(ROOT / "eval/models/tiny-llava")
    with Image.open(ROOT / "docs/scene.png") as scene:
        picture = scene.convert("RGB").resize((300, 150))
    images = processor.image_processor
    pixels = images(picture, return_tensors="pt")["pixel_values"][0]
    given = seen(pixels, images.image_mean, images.image_std)
    placed = as_seen(picture, SQUARE, processor).resize(given.size, Image.Resampling.BICUBIC)
    away = np.abs(np.asarray(placed).astype(int) - np.asarray(given).astype(int)).mean()
    stretched = np.abs(np.asarray(picture.resize(given.size)).astype(int) - np.asarray(given).astype(int)).mean()
    assert away < 2 < 8 < stretched


def test_pictures_that_cannot_be_placed_are_refused():
    with pytest.raises(RunError, match="1 images, and 0 pictures"):
        report(image()).show([])
    with pytest.raises(RunError, match=r"picture 1 is 300 x 100 .* 4 x 3: give the processor"):
        report(image()).show([Image.new("RGB", (300, 100))])
    with pytest.raises(RunError, match="is no video"):
        report(image()).show([Clip((Image.new("RGB", (8, 8)),), fps=1.0)])
    with pytest.raises(RunError, match="is a video"):
        report(image(frames_layout(1, 2, 2), kept=(0,), is_video=True)).show([Image.new("RGB", (8, 8))])
