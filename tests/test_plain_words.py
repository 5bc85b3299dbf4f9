"""Plain words: no sentence that a user reads has more than 25 words, whatever it stands in."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3bench.reporting import wording

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen3bench"
WORDING = Path(wording.__file__).parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPORTS = sorted((ROOT / "results" / "reference").glob("*/report.md"))
TEMPLATES = sorted((PACKAGE / "reporting").glob("*.jinja"))
HELP = ROOT / "configs" / "hydra" / "help" / "qwen3bench.yaml"
MOST_WORDS = 25
# Figures of speech that the glossary lacks, each with the plain word.
# Figures of speech that no glossary of the field holds.
METAPHORS = (
    *("under the hood", "out of the box", "rule of thumb", "boils down", "sweet spot", "low-hanging", "silver bullet"),
    *("game changer", "heavy lifting", "hungry", "shines?", "juggles?", "footprint", "drowns?", "buys", "kicks in"),
    *("pays off", "pay off", "blazing", "secret sauce", "bread and butter", "magic bullet", "crunch"),
)


def sentences_in(text: str) -> list[str]:
    """Sentences of a paragraph: they end with a full stop, with a colon before a capital, or between links."""
    text = " ".join(text.split())
    return [each for each in re.split(r"(?<=[.!?])[\"”)*]*\s+|(?<=:)\s+(?=[A-Z“])|\s·\s", text) if each]


def words_in(sentence: str) -> list[str]:
    """Words; a placeholder, or code one after another, counts once, and what stands in brackets does not."""
    plain = re.sub(r"`[^`]*`|\{[^{}]*\}", "code", sentence)
    plain = re.sub(r"\([^()]*\)|\[[^]]*\]", "", plain)
    plain = re.sub(r"code(?:,? (?:and )?code)+", "code", plain)
    return [word for word in plain.split() if re.search(r"\w", word)]


def too_long(text: str) -> list[str]:
    return [f"{len(words_in(each))}: {each}" for each in sentences_in(text) if len(words_in(each)) > MOST_WORDS]


def paragraphs(markdown: str) -> Iterator[str]:
    """Prose of a document: no code, no tables, no headings; an item of a list is a paragraph."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->|!\[[^]]*\]\([^)]*\)", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]*>", "", text)
    text = re.sub(r"^(\||#| {4}).*$", "", text, flags=re.MULTILINE)
    yield from (part for part in re.split(r"\n\s*\n|^\s*(?:[-*>]|\d+\.)\s", text, flags=re.MULTILINE) if part.strip())


def prose_of(path: Path) -> list[str]:
    return list(paragraphs(path.read_text("utf-8")))


@pytest.mark.parametrize("path", [*DOCUMENTS, *REPORTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_has_no_long_sentence(path: Path) -> None:
    assert len(prose_of(path)) >= 2
    assert [said for part in prose_of(path) for said in too_long(part)] == []


def literals(node: ast.AST) -> Iterator[str]:
    """Texts in a tree, whole ones, with `{}` for what is put in."""
    inside: set[ast.AST] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.JoinedStr) and each not in inside:
            inside |= set(ast.walk(each))
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in each.values)
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and each not in inside:
            yield each.value


def errors_in(source: str) -> Iterator[str]:
    """Texts that a module raises, and those that it makes an error of, line by line."""
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        if isinstance(node, ast.Raise) or name.endswith("Error") or name == "error":
            for text in literals(node):
                yield from text.splitlines()


def test_an_error_message_has_no_long_sentence() -> None:
    found = {path.name: list(errors_in(path.read_text("utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert sum(map(len, found.values())) >= 100
    long = {name: [said for text in texts for said in too_long(text)] for name, texts in found.items()}
    assert {name: said for name, said in long.items() if said} == {}


ENTRIES = (
    "qwen3bench",
    "qwen3bench.compare",
    "qwen3bench.report",
    "qwen3bench.describe",
    "qwen3bench.verify",
    "qwen3bench.aa",
)


@pytest.mark.slow
@pytest.mark.parametrize("module", ENTRIES)
def test_a_help_text_has_no_long_sentence(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "python -m" in done.stdout
    found = [said for part in re.split(r"\n\s*\n| {3,}|\n(?=\S|\s+\d)", done.stdout) for said in too_long(part)]
    assert found == []


def test_options_of_the_command_line_are_said_briefly() -> None:
    texts = [HELP.read_text("utf-8")]
    texts += [
        text for name in ("compare", "report") for text in literals(ast.parse((PACKAGE / f"{name}.py").read_text()))
    ]
    assert [said for text in texts for line in text.splitlines() for said in too_long(line)] == []


@pytest.mark.parametrize("path", sorted(WORDING.glob("*.py")), ids=lambda path: path.name)
def test_what_reports_say_has_no_long_sentence(path: Path) -> None:
    """Whole texts; what is put together of parts is read in the reports."""
    tree = ast.parse(path.read_text("utf-8"))
    assert [said for text in literals(tree) for said in too_long(text)] == []


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_has_no_long_sentence(path: Path) -> None:
    text = re.sub(r"<style>.*?</style>|\{%.*?%\}", "\n", path.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}", "{}", text, flags=re.DOTALL)
    assert [said for line in re.sub(r"<[^>]*>", "\n", text).splitlines() for said in too_long(line)] == []


def test_no_metaphor_is_said_to_a_reader() -> None:
    banned = re.compile(rf"\b(?:{'|'.join(METAPHORS)})\b", re.IGNORECASE)
    texts = {path.name: part for path in [*DOCUMENTS, *REPORTS] for part in prose_of(path) if banned.search(part)}
    for path in [*WORDING.glob("*.py"), *(PACKAGE / "config").glob("*.py"), *PACKAGE.glob("*.py"), *TEMPLATES, HELP]:
        if found := banned.search(path.read_text("utf-8")):
            texts[path.name] = found[0]
    assert texts == {}


LONG = (
    "This sentence has one word after another and it does not end before the reader has long lost what its subject "
    "was, as nobody can hold so much."
)


def test_a_planted_long_sentence_is_found() -> None:
    assert len(LONG.split()) > MOST_WORDS
    assert too_long(LONG)
    assert too_long(f"Short. {LONG} Short.") == [f"{len(words_in(LONG))}: {LONG}"]
    assert not too_long(LONG.replace(" and it", ". It"))
    assert [text for text in errors_in(f"raise UserError(f'{{x}} {LONG}')") if too_long(text)]
    assert [part for part in paragraphs(f"- item\n- {LONG}\n") if too_long(part)]
    assert not [part for part in paragraphs(f"| {LONG} |\n\n```\n{LONG}\n```\n") if too_long(part)]
