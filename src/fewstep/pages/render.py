"""Renders a report page from its template, which extends base.html."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(template: Path, **values: object) -> str:
    """The page of a template, which lies beside the module that fills it in. Values are escaped: prompts and file names
    are whatever the user wrote."""
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template.name).render(values)
