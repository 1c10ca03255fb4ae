"""The notebooks of the documentation run from the top, and were stored with what they print."""

from __future__ import annotations

from itertools import groupby

import nbformat
import pytest
from house import ROOT
from nbclient.exceptions import CellExecutionError
from notebooks import FOLDER, NOTEBOOKS, VARIES, run

MACHINE = ("/tmp/", "/root", "/home/", "/Users/", "site-packages", "Traceback")


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    """Text of the outputs of a cell, whichever way a stream was cut on a busy machine."""
    return "".join(
        out["text"] if out.output_type == "stream" else out.data.get("text/plain", "") for out in cell.outputs
    )


def kinds(cell) -> list[list[str]]:
    """What each output can be shown as, neighbouring pieces of a stream as one."""
    return [kind for kind, _ in groupby(sorted(out.get("data", ["text"])) for out in cell.outputs)]


def test_there_are_two():
    assert [path.name for path in NOTEBOOKS] == ["compare.ipynb", "quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_stored_with_its_outputs(path):
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.get("name") == "stderr"]
    assert not [word for word in MACHINE if word in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_prints_what_is_stored(path):
    stored, new = code(nbformat.read(path, as_version=4)), code(run(path))
    for before, now in zip(stored, new, strict=True):
        assert kinds(now) == kinds(before), "run make notebooks"
        if VARIES not in before.metadata.get("tags", ()):
            assert printed(now) == printed(before), "run make notebooks"


@pytest.mark.slow
def test_a_cell_that_raises_is_seen(tmp_path):
    broken = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import tokprune\ntokprune.attach(None, 'nothing')")]
    )
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="nothing"):
        run(tmp_path / "broken.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_site_has_it(path):
    assert f": notebooks/{path.stem}.md\n" in (ROOT / "mkdocs.yml").read_text()
    for target in ("../models.md", "../guide.md", "../benchmarks.md", "compare.ipynb"):
        assert (FOLDER / target).exists(), target
