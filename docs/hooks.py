"""Hooks of mkdocs: every notebook becomes a page, with the outputs that it was stored with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, config: Any) -> Files:
    """Beside a notebook, which can be downloaded, its page and its pictures."""
    for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
        page = notebook.src_uri.removesuffix(".ipynb")
        text, extra = MarkdownExporter().from_filename(
            notebook.abs_src_path, {"unique_key": Path(page).name, "output_files_dir": Path(page).name}
        )
        files.append(File.generated(config, f"{page}.md", content=text))
        for name, content in extra["outputs"].items():
            files.append(File.generated(config, str(Path(page).parent / name), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages."""
    return re.sub(r"\]\(([\w/.-]+)\.ipynb\)", r"](\1.md)", markdown)
