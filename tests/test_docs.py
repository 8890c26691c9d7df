"""The documentation is true: links lead somewhere, named functions exist, every command shown runs."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from opgrpo_data import schema
from pipelines.config import build_config
from tests.integration.harness import environment, opgrpo

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)")
# A shown run is executed with these settings in place of its hours: the command is the same.
SHORTER = [
    *("--set", "iterations=2", "--set", "eval.samples=16"),
    *("--set", "rollout.prompts_per_iteration=2", "--set", "rollout.group_size=6"),
]

# The same for modules: what a page shows runs for minutes or hours, the test for seconds.
SHORTER_MODULES = {
    "pipelines.embedded.pretrain": ["--vae-steps=2", "--clean-steps=2", "--noisy-steps=2", "--pairs=256", "--repeats=1"],
    "benchmarks.strings.pretrain": ["--vae-steps=2", "--clean-steps=2", "--noisy-steps=2", "--pairs=256", "--repeats=1"],
    "benchmarks.steps_to_target": ["--summary", "--samples=20"],
    "benchmarks.steps_to_target.conditioning": ["--summary"],
    "benchmarks.faults": ["--summary"],
    "benchmarks.store": ["--summary"],
}


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of the links of a page that lead into the repository."""
    return [(text, target) for text, target in LINK.findall(page.read_text()) if "://" not in target]


def commands(page: Path) -> list[str]:
    """Every command in the console blocks of a page, in order."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def definitions(path: Path) -> set[str]:
    """Names that a module defines at its top level."""
    body = ast.parse(path.read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [target for _, target in links(page) if not (page.parent / target).exists()]
    assert broken == []


def test_one_trajectory_is_a_dozen_files_and_names_what_is_there() -> None:
    page = ROOT / "docs" / "one_trajectory.md"
    walked = [(text.strip("`"), page.parent / target) for text, target in links(page) if target.endswith(".py")]
    assert 8 <= len({path for _, path in walked}) <= 14
    for name, path in walked:
        module, _, attribute = name.partition(".")
        assert module == path.stem
        assert attribute in definitions(path), f"{name} is not defined in {path.name}"


@pytest.mark.parametrize("name", sorted(name for name, value in vars(schema).items() if isinstance(value, pa.Schema)))
def test_format_page_names_every_column(name: str) -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    missing = [column for column in getattr(schema, name).names if f"`{column}`" not in page]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_shown_runs(
    page: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order on the page, in a folder with the examples and a store under the name that the pages use."""
    shutil.copytree(finished[0], tmp_path / "demo-store")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            done = subprocess.run(make(words), env=environment(), capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        elif words[0] == "python":
            module = words[2]
            quick = ["--iterations=1"] if "--quick" in words else SHORTER_MODULES.get(module, [])
            run_module(module, [*words[3:], *quick], monkeypatch)
        else:
            assert words[0] == "opgrpo", f"the pages show a command that the tests do not know how to run: {words}"
            runs = words[1] in ("run", "quickstart") or "--offline" in words
            shorter = SHORTER if runs and "--dry-run" not in words else []
            opgrpo(*words[1:], *shorter)


def test_configs_in_the_readme_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        build_config(yaml.safe_load(block), "README.md")


def run_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m` does, in this process: whatever starts processes of its own finds the warm server of the harness."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    code: str | int | None = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    assert not code, f"{module} {words} ended with {code}"


def make(words: list[str]) -> list[str]:
    """A make target in an environment that is installed already. `make test` is only read: we are running inside it."""
    if words[1] == "test":
        return [*words, "--dry-run"]
    options = " ".join(SHORTER)
    return [*words, f"BIN={Path(sys.executable).parent}", "--assume-old=.venv/installed", f"OPTIONS={options}"]
