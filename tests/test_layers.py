"""The layers: cli -> pipelines.commands -> pipelines -> opgrpo_data, never back, and nothing heavy where one waits for help."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opgrpo_data.store import Store

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "transformers", "peft"}
DATA_PLANE = sorted((ROOT / "opgrpo_data").rglob("*.py"))
COMMAND_LINE = [ROOT / "cli.py", *sorted((ROOT / "pipelines" / "commands").glob("*.py"))]
COMPUTE_PLANE = sorted({*(ROOT / "pipelines").rglob("*.py")} - {*COMMAND_LINE})


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        return [node.module]
    return []


def _imports(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    return {module.partition(".")[0] for module in _modules_anywhere(file)}


def _modules_anywhere(file: Path) -> set[str]:
    return {module for node in ast.walk(ast.parse(file.read_text())) for module in _modules(node)}


def _on_import(nodes: list[ast.stmt]) -> Iterator[str]:
    """Top-level packages that are imported when the file is: not those inside functions or under TYPE_CHECKING."""
    for node in nodes:
        yield from (module.partition(".")[0] for module in _modules(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _on_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from _on_import(getattr(node, field, []))


def _imported_at_once(file: Path) -> set[str]:
    return set(_on_import(ast.parse(file.read_text()).body))


def _named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_files_are_found() -> None:
    assert len(DATA_PLANE) > 8
    assert len(COMPUTE_PLANE) > 20


@pytest.mark.parametrize("file", DATA_PLANE, ids=_named)
def test_the_data_plane_knows_no_model(file: Path) -> None:
    assert not _imports(file) & {*HEAVY, "pipelines", "cli", "tests"}
    assert "webdataset" not in _imported_at_once(file)  # it imports torch


@pytest.mark.parametrize("file", COMPUTE_PLANE, ids=_named)
def test_the_compute_plane_knows_no_command_line(file: Path) -> None:
    assert not _imports(file) & {"cli", "typer", "tests"}
    assert not any(f"{module}.".startswith("pipelines.commands.") for module in _modules_anywhere(file))


@pytest.mark.parametrize("file", COMMAND_LINE, ids=_named)
def test_the_command_line_imports_lazily(file: Path) -> None:
    assert _imported_at_once(file) <= {*sys.stdlib_module_names, "typer", "pipelines"}
    at_once = [module for node in ast.parse(file.read_text()).body for module in _modules(node)]
    assert all(module.startswith("pipelines.commands") for module in at_once if module.startswith("pipelines"))


@pytest.mark.parametrize(
    "name",
    [
        "settings.py",
        "config.py",
        "registry.py",
        "prompts.py",
        "groups.py",
        "experiment.py",
        "imports.py",
        "fitting.py",
        "offline.py",
        "rescore.py",
        "score.py",
        "reuse.py",
        "selection.py",
    ],
)
def test_stages_that_need_no_model_do_not_import_one(name: str) -> None:
    assert not _imported_at_once(ROOT / "pipelines" / name) & HEAVY


def _loaded_by(code: str, *arguments: str) -> set[str]:
    """Names of all modules in a fresh process after it ran the command line."""
    script = (
        "import sys\n"
        "from cli import app\n"
        f"sys.argv = ['opgrpo', {', '.join(map(repr, arguments))}]\n"
        "try:\n    app()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"{code}\n"
        "print('MODULES', *sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_the_check_would_notice() -> None:
    assert "torch" in _loaded_by("import torch", "--help")


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["sql"]], ids=" ".join)
def test_quick_commands_import_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    if command == ["sql"]:
        Store.create(str(tmp_path / "store"))
        command = ["sql", "--store", str(tmp_path / "store"), "SELECT count(*) FROM trajectories"]
    loaded = _loaded_by("", *command)
    assert not loaded & {*HEAVY, "webdataset", "scipy"}
    if "--help" in command:
        assert not loaded & {"numpy", "pyarrow", "duckdb", "polars", "yaml"}
