"""A row for each run, with its numbers counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from opgrpo_data.exchange import listing
from opgrpo_data.schema import DROPPED, table_of
from opgrpo_data.store import Store, now
from tests.opgrpo_data.exchange.made import drawn, filled, quarantined
from tests.opgrpo_data.factories import reward_row, rewards, shard_rows


def test_an_empty_store(tmp_path: Path) -> None:
    assert listing(Store.create(str(tmp_path))) == []


def test_runs_and_what_they_hold(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    store.add_run("run-1", {"config": {"name": "run", "seed": 8}, "command": [], "software": {}})
    drawn(store, "run-2", 0, "00000", 0)
    quarantined(store, "run-0-i0g0m0")
    quarantined(store, "run-0-i1g0m1")
    index = "trajectories/run=run-0/iter=000000/00000.parquet"
    row = {"index_file": index, "run_id": "run-0", "iteration": 0, "shard": "00000",
           "trajectories": 3, "bytes": 1, "reason": "age", "dropped_at": now()}  # fmt: skip
    store.publish_table("dropped/run=run-0/iter=000000/00000.parquet", table_of([row], DROPPED))
    more = rewards([reward_row("run-0-i0g0m0", 1.0, reward="smell"), reward_row("run-2-i0g0m0", 1.0, reward="smell")])
    store.publish_table("rewards/reward=smell/run=run-0/iter=000000/00000.v1.000.parquet", more)
    told = {row["run_id"]: row for row in listing(store)}
    assert list(told) == ["run-0", "run-1", "run-2"]
    rows = shard_rows(store)
    kept = [row for row in rows if row["run_id"] == "run-0" and not row["trajectory_id"].startswith("run-0-i0g0")]
    size = sum(row["latents_length"] + row["media_length"] for row in kept)
    created_at = told["run-0"].pop("created_at")
    assert created_at is not None
    assert told["run-0"] == {
        "run_id": "run-0", "iterations": 2, "trajectories": 12, "gigabytes": pytest.approx(size / 1e9),
        "rewards": "smell@1 1, taste@1 10", "kept_policies": 1, "quarantined": 1, "dropped": 3, "pinned": True,
    }  # fmt: skip
    assert {name: told["run-1"][name] for name in ("iterations", "trajectories", "rewards", "kept_policies", "pinned")} == {
        "iterations": 0, "trajectories": 0, "rewards": "", "kept_policies": 0, "pinned": False,
    }  # fmt: skip
    assert told["run-2"]["created_at"] is None
    assert (told["run-2"]["trajectories"], told["run-2"]["rewards"]) == (3, "smell@1 1")
