"""How pages are made of the templates in `templates/`."""

from __future__ import annotations

from pathlib import Path

import jinja2


def template(name: str, **filters: object) -> jinja2.Template:
    """A template: what it shows is escaped, and a name that it is not given is an error.

    Args:
        name: of its file.
        **filters: functions that it calls by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)  # type: ignore[arg-type]
    return environment.get_template(name)
