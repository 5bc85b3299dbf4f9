"""The rules of the house that a machine can hold: who imports whom, who loads torch, names that tell apart."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen3bench"
WITHOUT_TORCH = ("config", "record", "campaign", "analysis", "reporting")
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
# An interface is one name in several modules: `apply` of a switch, `main` of a process.
INTERFACES = {("opt", "apply"), ("", "main"), ("worker", "main")}
# Documented for all their underscore: those of named tuples, `os._exit`, where PyTorch's compiler has its settings.
DOCUMENTED = {"_asdict", "_dynamo", "_exit", "_fields", "_inductor", "_replace"}


def modules(*packages: str) -> list[str]:
    """Names of the modules of each package (\"\": the entries), as they are imported."""
    files = [path for name in packages for path in sorted((PACKAGE / name).glob("**/*.py" if name else "*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.slow
def test_reading_and_supervising_load_no_torch() -> None:
    names = modules("", *WITHOUT_TORCH)
    assert {"qwen3bench.verify", "qwen3bench.config.cli", "qwen3bench.campaign.launch"} <= set(names)
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_two_modules_have_one_name() -> None:
    homes = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        homes[path.stem].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1 and name != "__init__"} == {}


def test_no_public_name_is_defined_twice() -> None:
    homes = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE)
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                room = where.parts[0] if len(where.parts) > 1 else ""
                if (room, node.name) not in INTERFACES:
                    homes[node.name].append(str(where))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package and of its contracts."""
    shutil.copytree(PACKAGE, tmp_path / "qwen3bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(directory: Path) -> tuple[int, str]:
    """Exit status and text of import-linter on the package in `directory`."""
    command = [str(LINT_IMPORTS), "--no-cache", "--no-logo"]
    environment = os.environ | {"PYTHONPATH": str(directory), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_import_points_down(copied: Path) -> None:
    status, text = lint_imports(copied)
    assert status == 0, text


PLANTED = {
    "upward": ("analysis/effects.py", "import qwen3bench.campaign.launch", "analysis is not allowed to import"),
    "upward, late": (
        "record/reader.py",
        "def late() -> None:\n    from qwen3bench.config import settings",
        "record is not allowed to import",
    ),
    "upward, for types": (
        "config/choices.py",
        "if TYPE_CHECKING:\n    from qwen3bench.model.qwen3 import Qwen3",
        "config is not allowed to import",
    ),
    "between siblings": ("worker/clock.py", "import qwen3bench.campaign.passes", "worker is not allowed to import"),
    "a circle": (
        "reporting/wording/sentences.py",
        "import qwen3bench.reporting.pages",
        "cycles are allowed in qwen3bench.rep",
    ),
    "of no layer": ("fresh.py", "", "qwen3bench.fresh"),
    "torch": ("reporting/units.py", "import torch", "reporting is not allowed to import torch"),
}


@pytest.mark.parametrize(("path", "line", "told"), PLANTED.values(), ids=PLANTED.keys())
def test_an_import_that_does_not_is_an_error(copied: Path, path: str, line: str, told: str) -> None:
    with (copied / "qwen3bench" / path).open("a") as file:
        file.write(f"\n{line}\n")
    status, text = lint_imports(copied)
    assert status == 1
    assert told in text


def private_names(path: Path) -> Iterator[str]:
    """What a file uses of others that begins with an underscore, as `line: name`."""

    def private(name: str) -> bool:
        return name.startswith("_") and not name.endswith("__") and name != "_" and name not in DOCUMENTED

    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        found: list[str] = []
        match node:
            case ast.ImportFrom(module=module, names=names):
                found = [*(module or "").split("."), *(each.name for each in names)]
            case ast.Import(names=names):
                found = [part for each in names for part in each.name.split(".")]
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name):
                found = [name]
            case ast.Call(func=ast.Attribute(attr="setattr" | "delattr") | ast.Name(id="setattr" | "getattr")):
                texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
                found = [part for text in texts if isinstance(text, str) for part in text.split(".")]
        yield from (f"{node.lineno}: {name}" for name in found if private(name))  # type: ignore[attr-defined]


def test_private_names_are_found(tmp_path: Path) -> None:
    code = """
        from qwen3bench._a import b
        from qwen3bench.a import _c, d
        d._e(self._mine, d.f, cell._replace(x=1), d.__dict__)
        monkeypatch.setattr(d, "_g", 1)
        monkeypatch.setattr("qwen3bench._h.i", 1)
    """
    path = tmp_path / "code.py"
    path.write_text(textwrap.dedent(code))
    assert sorted(private_names(path)) == ["2: _a", "3: _c", "4: _e", "5: _g", "6: _h"]


def test_tests_use_nothing_private() -> None:
    used = {str(path.relative_to(ROOT)): list(private_names(path)) for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert {path: names for path, names in used.items() if names} == {}
