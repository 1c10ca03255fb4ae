"""The notebooks of docs/notebooks, run from the top as a user would. As a program, it stores what they print."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
VARIES = "varies"  # tag of a cell whose output is not the same every time: times, folders
# Warnings of other packages name folders of this machine; without a hub no model is looked for anywhere else.
SETTINGS = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


def run(path: Path) -> NotebookNode:
    """A notebook with new outputs.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(FOLDER)}}
    )
    notebook = client.execute(env=SETTINGS)
    notebook.metadata["language_info"] = {"name": "python", "file_extension": ".py"}  # whatever Python it was
    return notebook


if __name__ == "__main__":
    for each in NOTEBOOKS:
        nbformat.write(run(each), each)
