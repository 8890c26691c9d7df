"""kill -9 in every stage, then the same command again: it finishes, and the policy is that of an uninterrupted run."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from opgrpo_data.catalog import Catalog
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.store import Store
from tests.integration.harness import Running, opgrpo_json

# The file whose appearance means that a stage has just begun or is half-way; each is waited for in turn, then SIGKILL.
MARKS = {
    "init": "prompts/*.parquet",
    "rollout, between two shards": "trajectories/run=*/iter=000000/00000.parquet",
    "score": "trajectories/run=*/iter=000000/00001.parquet",
    "select": "rewards/*/run=*/iter=000000/00001.*.parquet",
    "train": "plans/run=*/iter=000000.parquet",
    "train, state written but not committed": "states/run=*/iter=000001/*.safetensors",
    "eval on the way": "updates/run=*/iter=000000.parquet",
    "rollout with replay": "trajectories/run=*/iter=000001/00000.parquet",
    "select with replay": "buffers/run=*/iter=000001.parquet",
    "train with replay": "plans/run=*/iter=000001.parquet",
    "eval at the end": "updates/run=*/iter=000001.parquet",
}


def run_until(mark: str, command: list[str | Path], store: Path) -> bool:
    """Start the run, kill it as soon as the mark is there.

    False when the mark was there before (the last kill came late: killing now would only hit the start-up, and prove
    nothing), or when the run ended before we could.
    """
    if any(store.glob(mark)):
        return False
    running = Running(*command)
    while running.process.is_alive():
        if any(store.glob(mark)):
            running.process.kill()
            running.wait()
            return True
        time.sleep(0.002)
    return False


def check_committed(store: Path) -> int:
    """Every committed trajectory reads back and verifies; returns how many there are."""
    opened = Store.open(str(store))
    rows = Catalog(opened).query("SELECT * FROM trajectories").to_pylist()
    for row in rows:
        location = LatentLocation.of(row)
        read_latents(opened.directory, location, 0, len(location.checksums) - 1)
        read_media(opened.directory, row)
    return len(rows)


def test_killed_in_every_stage(finished: tuple[Path, dict[str, Any]], config: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command: list[str | Path] = ["run", config, "--store", store]
    killed = [name for name, mark in MARKS.items() if run_until(mark, command, store)]
    # A slow look at the store can miss a mark or two, never a whole stage.
    assert len(killed) >= len(MARKS) - 2, f"too few kills hit: {killed}"
    assert {name.replace(",", "").split()[0] for name in killed} == {"init", "rollout", "score", "select", "train", "eval"}
    counts = check_committed(store)
    result = opgrpo_json("run", config, "--store", store, process=True)
    assert result["policy_id"] == finished[1]["policy_id"]
    assert check_committed(store) == 16 >= counts
    contents = [sorted(_names(path)) for path in (store, finished[0])]
    assert contents[0] == contents[1]


def _names(store: Path) -> itertools.chain[str]:
    """Committed files of a store, by name: indexes and documents, not the tars of attempts that were killed."""
    found = (store.glob(pattern) for pattern in ("**/*.parquet", "**/*.json", "**/*.safetensors", "**/*.png"))
    return itertools.chain.from_iterable((str(path.relative_to(store)) for path in paths) for paths in found)
