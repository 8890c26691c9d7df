"""Fixtures that several folders share: a small config, and one finished run of it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tests compare results bit for bit and share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.integration.harness import opgrpo_json
from tests.s3 import moto_endpoint, proxy, s3, s3_server

__all__ = ["config", "finished", "moto_endpoint", "proxy", "s3", "s3_server"]

SMALL = """
name: small
iterations: 2
prompts: {limit: 2}
rollout: {prompts_per_iteration: 2, group_size: 4, num_steps: 5, groups_per_shard: 1}
replay: {prefix_steps: 2}
reward: {name: scene_soft}
train: {window: 3}
eval: {samples: 16, num_steps: 4, every: 1}
"""


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Policies collect garbage when they let text encoders go: a second each, if it goes through all imported modules."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Extensions count what is left when the interpreter ends and print it as leaks."""
    gc.unfreeze()


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
    result: dict[str, Any] = opgrpo_json("run", config, "--store", store, process=True)
    return store, result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules beside this file first: a test of a page takes long, and at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
