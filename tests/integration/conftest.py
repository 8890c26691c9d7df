"""Whole stages on the embedded world, as a user runs them: a small config and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = """
name: small
iterations: 2
prompts: {limit: 2}
rollout: {prompts_per_iteration: 2, group_size: 4, num_steps: 5, groups_per_shard: 1}
replay: {prefix_steps: 2}
reward: {name: scene_soft}
train: {window: 3}
eval: {samples: 16, num_steps: 4}
"""


def opgrpo(*arguments: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; with `check`, a failure shows what it said."""
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


def opgrpo_json(*arguments: str | Path) -> Any:
    """What a command prints with --json."""
    return json.loads(opgrpo(*arguments, "--json").stdout)


def environment() -> dict[str, str]:
    """One thread: two runs are compared bit for bit, and tests share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that runs in seconds."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store with one uninterrupted run of the small config, and the result that `opgrpo run` printed. Do not change it."""
    store = tmp_path_factory.mktemp("finished") / "store"
    result: dict[str, Any] = opgrpo_json("run", config, "--store", store)
    return store, result
