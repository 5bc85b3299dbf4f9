"""The templates of every page, in one environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, content: dict[str, Any]) -> str:
    """Text of a page; names ending in .html.jinja escape every value for HTML."""
    environment = Environment(
        loader=PackageLoader("qwen3bench.reporting", ""),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": markdown, "plain": contained, "markup": Markup}
    environment.globals["asset"] = lambda name: Markup(Path(__file__).with_name(name).read_text("utf-8"))
    return environment.get_template(template).render(content)


def markdown(value: object) -> str:
    """Text for one line or table cell of markdown, with what would be read as markup escaped."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*<|~]|(?<=\])\()", r"\\\1", text)


def contained(text: str) -> str:
    """Text that cannot leave its table cell or become markup, for markdown that a terminal shows too."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(mark, safe)
    return " ".join(text.split())
