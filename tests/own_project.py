"""The project of a reader who does what docs/add-an-optimization.md says at its beginning."""

from __future__ import annotations

import re
from pathlib import Path

_DOCUMENT = Path(__file__).parents[1] / "docs" / "add-an-optimization.md"


def write_own_project(directory: Path) -> None:
    """Write the two files that the document shows first: `mypackage/mymodule.py` and `own/opt/mine.yaml`."""
    text = _DOCUMENT.read_text(encoding="utf-8").partition("## 1. ")[0]
    shown = re.findall(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in shown] == ["mypackage/mymodule.py", "own/opt/mine.yaml"]
    for name, body in shown:
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text(body, encoding="utf-8")
