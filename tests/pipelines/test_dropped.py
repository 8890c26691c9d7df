"""Dropped trajectories: a run whose store is collected all the time trains as ever; what is gone is chosen by nobody."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from opgrpo_data.schema import DROPPED, table_of
from opgrpo_data.store import index_of
from opgrpo_data.upkeep.garbage import collect
from opgrpo_data.upkeep.verify import verify
from pipelines.experiment import Experiment
from pipelines.groups import shard_tasks
from pipelines.loop import STAGES
from pipelines.replay import admit, buffer_entries
from pipelines.reuse import reusable
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.train import train
from tests.pipelines.bad_rewards import Mood
from tests.pipelines.helpers import created, grid_of, rows_of, shared_policy, small

BOTH: dict[str, Any] = {"replay": {"members": 1, "reuse_iterations": 1, "prefix_steps": 2, "decay": 0.1}}
"""Continuations from the buffer, and whole groups of the iteration before."""


def drop(experiment: Experiment, index: str) -> set[str]:
    """Drop a shard, as `opgrpo gc` does; returns the ids of its trajectories."""
    store = experiment.store
    rows = store.read_tables("trajectories", [index]).to_pylist()
    store.publish_table(index.replace("trajectories/", "dropped/"), table_of([{"index_file": index}], DROPPED))
    for path in {row[f"{kind}_file"] for row in rows for kind in ("latents", "media")}:
        store.directory.remove(path)
    return {row["trajectory_id"] for row in rows}


def iterated(experiment: Experiment, iterations: int, *, collected: bool = False) -> Experiment:
    """Run whole iterations, and perhaps collect garbage before every stage."""
    for iteration in range(iterations):
        for stage in STAGES:
            if collected:
                collect(experiment.store, delete=True, grace=timedelta(days=1), keep_iterations=1)
            stage(experiment, iteration)
    return experiment


def test_a_run_does_not_notice_that_garbage_is_collected(tmp_path: Path) -> None:
    config = small(**BOTH, prompts={"limit": 2}, rollout={"group_size": 3, "num_steps": 3})
    left_alone = iterated(created(tmp_path / "left", config), 4)
    collected = iterated(created(tmp_path / "collected", config), 4, collected=True)
    assert collected.store.dropped_shards()
    assert collected.store.quarantined() == set()
    for kind in ("plans", "buffers", "updates"):
        other = {"latents_file", "media_file"}  # these names are random
        pairs = zip(rows_of(collected, kind), rows_of(left_alone, kind), strict=True)
        for ours, theirs in pairs:
            assert {k: v for k, v in ours.items() if k not in other} == {k: v for k, v in theirs.items() if k not in other}
    assert verify(collected.store, deep=True).findings == []


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """One trained iteration, and the next one drawn and scored."""
    begun = iterated(created(tmp_path, small(**BOTH)), 1)
    rollout(begun, 1)
    score(begun, 1)
    return begun


def test_neither_buffer_nor_plan_takes_them(experiment: Experiment) -> None:
    [held] = {row["trajectory_id"] for row in rows_of(experiment, "buffers")[:1]}
    place = next(row["latents_file"] for row in rows_of(experiment, "trajectories") if row["trajectory_id"] == held)
    gone = drop(experiment, index_of(place)) | drop(experiment, experiment.store.files("trajectories", iteration=1)[0])
    assert not gone & {row["trajectory_id"] for row in reusable(experiment, 1)}
    select(experiment, 1)
    for kind in ("plans", "buffers"):
        rows = rows_of(experiment, kind, 1)
        assert rows
        assert not gone & {row["trajectory_id"] for row in rows}
    assert train(experiment, 1).done == 1
    assert experiment.store.quarantined() == set()


def test_a_dropped_parent_is_passed_over_and_not_called_damaged(experiment: Experiment) -> None:
    config, prompts = experiment.config, experiment.prompts["train"]
    # Iteration 1 visits the other prompts.
    tasks = shard_tasks(config, experiment.run_id, prompts, 0, buffer_entries(experiment, 1))
    continued = [member for task in tasks for member in task.members if member.parent is not None]
    grid = grid_of(shared_policy(), experiment.config)
    assert len(admit(experiment, continued, grid)) == len(continued) > 1
    parent = continued[0].parent
    assert parent is not None
    gone = drop(experiment, index_of(parent["latents_file"]))
    admitted = [replayed.member.parent for replayed in admit(experiment, continued, grid)]
    assert 0 < len(admitted) < len(continued)
    assert not gone & {row["trajectory_id"] for row in admitted if row is not None}
    assert experiment.store.quarantined() == set()


def test_an_import_leaves_them_out(experiment: Experiment, tmp_path: Path) -> None:
    entries = rows_of(experiment, "buffers")
    gone = drop(experiment, index_of(entries[0]["latents_file"]))
    config = small(name="importing", replay={"import_buffer": experiment.store.directory.url, "prefix_steps": 2})
    importing = created(tmp_path / "other", config)
    taken = {row["trajectory_id"] for row in rows_of(importing, "buffers")}
    assert taken == {row["trajectory_id"] for row in entries} - gone


def test_scoring_anew_passes_over_them(experiment: Experiment, mood: Mood) -> None:
    gone = drop(experiment, experiment.store.files("trajectories", iteration=0)[0])
    mood.version = "2"
    outcome = score(experiment)
    assert (outcome.done, outcome.detail["dropped"]) == (12, len(gone))
    assert not gone & {row["trajectory_id"] for row in rows_of(experiment, "rewards") if row["version"] == "2"}
