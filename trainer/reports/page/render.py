"""A page as one HTML file."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from urllib.parse import quote

from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup

from trainer.reports.page.content import Page
from trainer.reports.page.figures import legend_line


def render(page: Page) -> str:
    """The HTML of a page. It loads nothing, and the browser is told to run only its own script.

    Texts are escaped, so that a title such as `<script>` is shown as such.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().from_string(_asset("page.html"))
    # Both are part of this package and hold no markup of their own.
    style = Markup(_asset("page.css"))
    return template.render(page=page, style=style, script=Markup(script), script_hash=digest)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=BaseLoader(), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_url"] = lambda text: "data:text/plain;charset=utf-8," + quote(text)
    environment.globals["legend_line"] = legend_line
    return environment


def _asset(name: str) -> str:
    return (files("trainer.reports.page") / "assets" / name).read_text(encoding="utf-8")
