"""Words of results stand in `wording` alone: no other module of reporting, and no template, holds a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3bench.reporting import wording

REPORTING = Path(wording.__file__).parents[1]
MODULES = sorted(REPORTING.glob("*.py"))
TEMPLATES = sorted(REPORTING.glob("*.jinja"))
VERDICTS = re.compile(r"\b(faster|slower|undecided|noise|noisy|winner|best|fastest)\b", re.IGNORECASE)
# What is no word of a result, by file: why it stands there.
ALLOWED = {
    "lookup.py": {"on average over the others", "beside others that differ"},  # values of a column, which findings hold
    "plot_across.py": {"noisy: …"},  # a label of a row
}


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """The texts that stand by themselves."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts(path: Path) -> Iterator[str]:
    """Literal texts of a module but those of docstrings and errors, a placeholder as `…`."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            skipped |= set(ast.walk(node))
        if isinstance(node, ast.JoinedStr) and node not in skipped:
            skipped |= set(ast.walk(node)) - {node}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def says_something(text: str) -> bool:
    """Whether a text is a sentence, a title, or names a verdict: five words, or a verdict's word among others."""
    words = [word for word in text.split() if re.search(r"[A-Za-z]{2}|…", word)]
    plain = [word for word in words if re.search(r"[A-Za-z]{2}", word)]
    if len(plain) >= 2 and text.rstrip().endswith("."):
        return True
    return (len(words) >= 5 and len(plain) >= 3) or (len(words) >= 2 and bool(VERDICTS.search(text)))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_of_reporting_holds_no_sentence(path: Path) -> None:
    found = {text for text in texts(path) if says_something(text)}
    assert found - ALLOWED.get(path.name, set()) == set()


def test_what_is_allowed_is_there() -> None:
    for name, allowed in ALLOWED.items():
        assert allowed <= set(texts(REPORTING / name))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_holds_no_sentence(path: Path) -> None:
    """Labels and headings only; what it says of results comes from `wording`."""
    text = re.sub(r"\{\{.*?\}\}", "…", path.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"<style>.*?</style>|\{%.*?%\}|<[^>]*>", "\n", text, flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines()]
    ended = [line for line in lines if len(line.split()) >= 4 and line.endswith(".")]
    assert ended + [line for line in lines if VERDICTS.search(line)] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('title = "No switch is shown to be faster everywhere"', True),
        ('title = f"{name} is slower"', True),
        ('text = f"{count} of {total} blocks were flagged"', True),
        ('said = "Nothing measured."', True),
        ('raise UserError(f"{path}: cannot be read; name another directory")', False),
        ('"""This module says a lot, and ends in a full stop."""', False),
        ('heading = "peak memory"', False),
        ('state = "faster"', False),
    ],
)
def test_a_planted_sentence_is_found(code: str, found: bool, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(code)
    assert any(says_something(text) for text in texts(path)) is found
