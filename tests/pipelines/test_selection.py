"""Stage `select`: plan and buffer from complete iterations only, and from stored numbers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opgrpo_data.errors import CorruptionError, StoreError
from pipelines.experiment import Experiment
from pipelines.score import score
from pipelines.selection import select
from tests.pipelines.bad_rewards import Mood, digest
from tests.pipelines.helpers import forked, pictures_of, rows_of


@pytest.fixture
def experiment(rolled: Path, tmp_path: Path) -> Experiment:
    """Eight trajectories in two shards, not yet scored."""
    return forked(rolled, tmp_path)


def _rewards(experiment: Experiment) -> dict[str, float]:
    return {row["trajectory_id"]: row["value"] for row in rows_of(experiment, "rewards") if row["error"] is None}


def _check_advantages(experiment: Experiment, plan: list[dict[str, Any]]) -> None:
    """(R - mean) / (population std + 1e-4) within each group, in NumPy."""
    rewards = _rewards(experiment)
    for group in {row["group_id"] for row in plan}:
        members = [row for row in plan if row["group_id"] == group]
        values = np.array([rewards[row["trajectory_id"]] for row in members])
        golden = (values - values.mean()) / (values.std() + 1e-4)
        np.testing.assert_allclose([row["advantage"] for row in members], golden, rtol=1e-9)
        assert [row["reward"] for row in members] == values.tolist()


def test_plan_and_buffer_of_a_complete_iteration(experiment: Experiment) -> None:
    score(experiment, 0)
    outcome = select(experiment, 0)
    assert (outcome.done, outcome.detail) == (1, {"planned": 8, "buffer": 2})
    plan, buffer, rewards = rows_of(experiment, "plans"), rows_of(experiment, "buffers"), _rewards(experiment)
    assert {row["trajectory_id"] for row in plan} == set(rewards)
    assert all((row["role"], row["importance_weight"], row["train_steps"]) == ("fresh", 1.0, [0, 1, 2]) for row in plan)
    _check_advantages(experiment, plan)
    for entry in buffer:
        group = [rewards[row["trajectory_id"]] for row in plan if row["prompt_id"] == entry["prompt_id"]]
        assert entry["reward"] == entry["decayed_reward"] == max(group)
        assert (entry["age"], entry["iteration"], entry["born_iteration"]) == (0, 0, 0)


def test_selecting_again_does_nothing_and_a_dry_run_writes_nothing(experiment: Experiment) -> None:
    score(experiment, 0)
    assert select(experiment, 0, dry_run=True).detail == {"planned": 8, "buffer": 2}
    assert rows_of(experiment, "plans") == rows_of(experiment, "buffers") == []
    select(experiment, 0)
    outcome = select(experiment, 0)
    assert (outcome.done, outcome.skipped) == (0, 1)


def test_a_missing_shard_is_refused(experiment: Experiment) -> None:
    score(experiment, 0)
    Path(experiment.store.directory.path(experiment.store.files("trajectories")[1])).unlink()
    with pytest.raises(StoreError, match="iteration 0 has 4 of 8 trajectories: run `opgrpo rollout` first"):
        select(experiment, 0)
    with pytest.raises(StoreError, match="iteration 1 has 0 of 8 trajectories: run `opgrpo rollout` first"):
        select(experiment, 1)


def test_missing_rewards_are_refused(experiment: Experiment) -> None:
    with pytest.raises(StoreError, match="iteration 0 has rewards for 0 of 8 trajectories: run `opgrpo score` first"):
        select(experiment, 0)
    score(experiment, 0)
    Path(experiment.store.directory.path(experiment.store.files("rewards")[0])).unlink()
    with pytest.raises(StoreError, match="iteration 0 has rewards for 4 of 8 trajectories"):
        select(experiment, 0)


def test_rewards_of_another_version_do_not_count(experiment: Experiment, mood: Mood) -> None:
    score(experiment, 0)
    mood.version = "2"
    with pytest.raises(StoreError, match="iteration 0 has rewards for 0 of 8 trajectories"):
        select(experiment, 0)


def test_a_sample_that_could_not_be_judged_leaves_its_group(experiment: Experiment, mood: Mood) -> None:
    pictures = pictures_of(experiment)
    bad = sorted(pictures)[0]
    mood.kind, mood.pictures = "raises", {digest(pictures[bad])}
    score(experiment, 0)
    select(experiment, 0)
    plan = rows_of(experiment, "plans")
    assert {row["trajectory_id"] for row in plan} == set(pictures) - {bad}
    assert bad not in {row["trajectory_id"] for row in rows_of(experiment, "buffers")}
    _check_advantages(experiment, plan)


def test_quarantined_trajectories_are_neither_planned_nor_replayed(experiment: Experiment) -> None:
    score(experiment, 0)
    rewards = _rewards(experiment)
    best = max(rewards, key=lambda key: rewards[key])
    experiment.store.quarantine(best, CorruptionError("file", "member", 1, 2))
    select(experiment, 0)
    assert best not in {row["trajectory_id"] for row in rows_of(experiment, "plans") + rows_of(experiment, "buffers")}


def test_buffer_entries_age_and_are_replaced_by_better_ones(replayed: Path, tmp_path: Path) -> None:
    """Three iterations: per prompt the highest reward decayed by 0.97 per iteration of age, ties to the older."""
    experiment = forked(replayed, tmp_path)
    rewards = _rewards(experiment)
    rows = rows_of(experiment, "trajectories")
    for now in range(3):
        entries = {row["prompt_id"]: row for row in rows_of(experiment, "buffers", now)}
        seen = [row for row in rows if row["iteration"] <= now]
        assert set(entries) == {row["prompt_id"] for row in seen}
        for prompt, entry in entries.items():
            worth = {
                row["trajectory_id"]: rewards[row["trajectory_id"]] * 0.97 ** (now - row["iteration"])
                for row in seen
                if row["prompt_id"] == prompt
            }
            assert entry["trajectory_id"] == max(worth, key=lambda key: worth[key])
            assert entry["decayed_reward"] == pytest.approx(worth[entry["trajectory_id"]])


def test_continuations_are_planned_with_their_weight(replayed: Path, tmp_path: Path) -> None:
    experiment = forked(replayed, tmp_path)
    plan = rows_of(experiment, "plans", 2)
    drawn = {row["trajectory_id"]: row for row in rows_of(experiment, "trajectories", 2)}
    assert sorted(row["role"] for row in plan) == ["continuation"] * 2 + ["fresh"] * 6
    for row in plan:
        prefix = drawn[row["trajectory_id"]]["prefix_steps"]
        assert prefix == (2 if row["role"] == "continuation" else 0)
        old, behaviour = (np.array(row[name][:prefix]) for name in ("old_logprob", "behaviour_logprob"))
        assert row["importance_weight"] == pytest.approx(np.clip(np.exp((old - behaviour).sum()), 0.0, 2.0))
    assert any(row["importance_weight"] != 1 for row in plan)
