"""An offline run, killed in every stage: the same command again finishes it, alike, and leaves what is stored as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipelines.config import load_config
from tests.integration.harness import opgrpo_json
from tests.integration.test_kill import run_until

SETTINGS = ["iterations=2", "name=later", "algorithm=offline", "eval.every=null", "eval.samples=2"]


def frozen(store: Path) -> dict[str, bytes]:
    """Every file of trajectories and rewards."""
    files = [path for folder in ("trajectories", "rewards") for path in (store / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def test_killed_in_every_stage(finished: tuple[Path, dict[str, Any]], config: Path, tmp_path: Path) -> None:
    run = load_config(config, SETTINGS).run_id
    marks = {
        "init": f"plans/run={run}-offline/iter=000000.parquet",
        "select": f"densities/run={run}/iter=000000.parquet",
        "train, state written but not committed": f"states/run={run}/iter=000001/*.safetensors",
        "eval at the end": f"updates/run={run}/iter=000001.parquet",
    }
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    stores = [tmp_path / name for name in ("killed", "whole")]
    for store in stores:
        shutil.copytree(finished[0], store)
    before = frozen(stores[0])
    command: list[str | Path] = ["run", config, "--store", stores[0], *options]
    killed = [name for name, mark in marks.items() if run_until(mark, command, stores[0])]
    assert len(killed) >= len(marks) - 2, f"too few kills hit: {killed}"
    ended = [opgrpo_json("run", config, "--store", store, *options, process=store is stores[0]) for store in stores]
    assert ended[0]["policy_id"] == ended[1]["policy_id"] != finished[1]["policy_id"]
    assert frozen(stores[0]) == frozen(stores[1]) == before


def test_the_commands(finished: tuple[Path, dict[str, Any]], config: Path, tmp_path: Path) -> None:
    """Another reward for what is stored, a policy trained on it without a rollout, and an estimate of what it is worth."""
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    scored = opgrpo_json("score", "--reward", "jpeg_compressibility", "--store", store, "--quiet")
    assert (scored["stage"], scored["done"], scored["skipped"]) == ("score", 16, 0)
    options = ["--set", "reward.name=jpeg_compressibility", "--set", "train.objective=forward", "--set", "eval.every=null"]
    result = opgrpo_json("train", config, "--offline", "--store", store, "--set", "eval.samples=2", *options)
    assert (result["iterations"], result["reward"]) == (2, "jpeg_compressibility")
    found = opgrpo_json("evaluate-offline", result["policy_id"], "--store", store)
    assert (found["reward"], found["trajectories"], found["meaningful"]) == (
        "jpeg_compressibility",
        14,
        False,
    )  # two continue a prefix
