"""Another reward for stored trajectories: judged from what is stored, and found by runs that are configured with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opgrpo_data.errors import StoreError
from opgrpo_data.schema import DROPPED, table_of
from opgrpo_data.store import Store, now
from pipelines.experiment import Experiment, Outcome
from pipelines.progress import Progress
from pipelines.rescore import rescore, run_of, stored_prompts
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.settings import RewardConfig
from tests.pipelines.bad_rewards import Mood, brightness, digest
from tests.pipelines.helpers import created, flipped, forked, pictures_of, rows_of, small
from tests.pipelines.plain_rewards import warmth

MOODY = RewardConfig(name="tests.pipelines.bad_rewards:moody")
WARM = RewardConfig(name="tests.pipelines.plain_rewards:warmth")


@pytest.fixture
def experiment(rolled: Path, tmp_path: Path) -> Experiment:
    """Eight trajectories in two shards, not yet scored."""
    return forked(rolled, tmp_path)


def again(store: Store, config: RewardConfig, run: str | None = None, dry_run: bool = False) -> Outcome:
    """`rescore`, quietly."""
    return rescore(store, config, run=run, dry_run=dry_run, progress=Progress(quiet=True))


def values(experiment: Experiment, reward: str) -> dict[str, Any]:
    """By trajectory_id; None where it failed."""
    return {row["trajectory_id"]: row["value"] for row in rows_of(experiment, "rewards") if row["reward"] == reward}


def test_every_stored_trajectory_gets_the_value(experiment: Experiment, mood: Mood) -> None:
    score(experiment)
    mood.batches.clear()
    pictures = pictures_of(experiment)
    outcome = again(experiment.store, WARM)
    assert (outcome.stage, outcome.iteration, outcome.done, outcome.skipped) == ("score", None, 8, 0)
    assert {name: outcome.detail[name] for name in ("reward", "failed")} == {"reward": "warmth", "failed": 0}
    assert values(experiment, "warmth") == {name: warmth([p], [""], [{}])[0] for name, p in pictures.items()}
    assert (again(experiment.store, WARM).done, again(experiment.store, WARM).skipped) == (0, 8)
    assert mood.batches == []


def test_a_run_finds_what_was_scored_for_it(experiment: Experiment, mood: Mood) -> None:
    assert again(experiment.store, MOODY).done == 8
    assert mood.batches == [4, 4]
    assert (score(experiment).done, score(experiment).skipped) == (0, 8)
    assert select(experiment, 0).detail == {"planned": 8, "buffer": 2}
    pictures = pictures_of(experiment)
    assert {row["trajectory_id"]: row["reward"] for row in rows_of(experiment, "plans")} == {
        name: brightness(picture) for name, picture in pictures.items()
    }


def test_the_reward_hears_the_stored_prompts(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and metadata of the embedded world, from the table of the store: its own reward judges by them."""
    strict = RewardConfig(name="scene_strict")
    assert again(experiment.store, strict).done == 8
    mine = values(experiment, "scene_strict")
    for path in experiment.store.files("rewards"):
        Path(experiment.store.directory.path(path)).unlink()
    experiment.config = experiment.config.model_copy(update={"reward": strict})
    score(experiment)
    assert values(experiment, "scene_strict") == mine
    assert set(mine.values()) <= {0.0, 1.0}


def test_one_run_of_several(experiment: Experiment, mood: Mood) -> None:
    other = Experiment.init(experiment.store.directory.url, small(name="other"), Progress(quiet=True))
    rollout(other, 0)
    assert again(experiment.store, MOODY, run="oth").done == 8
    assert set(values(experiment, "moody")) == {
        row["trajectory_id"] for row in rows_of(other, "trajectories") if row["run_id"] == other.run_id
    }
    assert again(experiment.store, MOODY).done == 8


def test_a_run_is_named_by_the_beginning_of_its_id(experiment: Experiment) -> None:
    shutil.copytree(
        experiment.store.directory.path(f"trajectories/run={experiment.run_id}"),
        experiment.store.directory.path(f"trajectories/run={experiment.run_id}0"),
    )
    assert run_of(experiment.store, experiment.run_id) == experiment.run_id
    assert run_of(experiment.store, f"{experiment.run_id}0") == f"{experiment.run_id}0"
    with pytest.raises(StoreError, match=r"several runs begin with 'small': \['small-\w+', 'small-\w+0'\]; it has"):
        run_of(experiment.store, "small")
    with pytest.raises(StoreError, match=r"no run of this store with trajectories is '\*'; it has \['small-"):
        run_of(experiment.store, "*")


def test_a_dry_run_counts_and_writes_nothing(experiment: Experiment, mood: Mood) -> None:
    assert again(experiment.store, MOODY, dry_run=True).done == 8
    assert rows_of(experiment, "rewards") == []
    assert mood.batches == []


def test_a_store_without_trajectories(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no trajectories to score: run `opgrpo rollout` first"):
        again(created(tmp_path, small()).store, MOODY)


def test_failures_are_error_rows_and_tried_again(experiment: Experiment, mood: Mood) -> None:
    pictures = pictures_of(experiment)
    bad = sorted(pictures)[3]
    mood.kind, mood.pictures = "raises", {digest(pictures[bad])}
    assert again(experiment.store, MOODY).detail["failed"] == 1
    assert values(experiment, "moody")[bad] is None
    mood.kind = "good"
    assert (again(experiment.store, MOODY).done, again(experiment.store, MOODY).done) == (1, 0)


def test_damaged_media_is_an_error_row(experiment: Experiment, mood: Mood) -> None:
    row = rows_of(experiment, "trajectories")[0]
    flipped(Path(experiment.store.directory.path(row["media_file"])), row["media_offset"] + 40)
    assert again(experiment.store, MOODY).detail["failed"] == 1
    [error] = [r for r in rows_of(experiment, "rewards") if r["error"] is not None]
    assert error["error"].startswith("media: ")


def drop(experiment: Experiment) -> str:
    """Drop the first shard as `opgrpo gc` does; returns its index file."""
    index = experiment.store.files("trajectories")[0]
    rows = experiment.store.read_tables("trajectories", [index]).to_pylist()
    for file in {row[column] for row in rows for column in ("latents_file", "media_file")}:
        Path(experiment.store.directory.path(file)).unlink()
    row = {"index_file": index, "trajectories": len(rows), "reason": "test", "dropped_at": now()}
    experiment.store.publish_table(index.replace("trajectories/", "dropped/", 1), table_of([row], DROPPED))
    return index


def test_dropped_media_are_counted_and_not_tried(experiment: Experiment, mood: Mood) -> None:
    drop(experiment)
    outcome = again(experiment.store, MOODY)
    assert (outcome.done, outcome.skipped, outcome.detail["dropped"], outcome.detail["failed"]) == (4, 0, 4, 0)
    assert len(rows_of(experiment, "rewards")) == 4
    outcome = again(experiment.store, MOODY, dry_run=True)
    assert (outcome.done, outcome.skipped, outcome.detail["dropped"]) == (0, 4, 4)


def test_a_composite_of_stored_parts_needs_no_media(experiment: Experiment, mood: Mood) -> None:
    again(experiment.store, MOODY)
    drop(experiment)
    parts = RewardConfig(name="composite", options={"parts": [{"name": MOODY.name, "weight": 2.0}]})
    outcome = again(experiment.store, parts)
    assert (outcome.done, outcome.skipped) == (8, 0)
    assert "dropped" not in outcome.detail
    assert values(experiment, "composite") == {name: 2 * value for name, value in values(experiment, "moody").items()}


def test_a_prompt_that_is_lost_is_an_error_row(experiment: Experiment, mood: Mood) -> None:
    for path in experiment.store.files("prompts"):
        Path(experiment.store.directory.path(path)).unlink()
    with pytest.raises(ValueError, match=r"failed on all 8 samples: prompt: the store has no prompt \w+; restore the files"):
        again(experiment.store, MOODY)
    assert mood.batches == []


def test_a_worker_scores_for_the_store_too(experiment: Experiment) -> None:
    assert again(experiment.store, RewardConfig(name="jpeg_compressibility", workers=1, batch_size=3)).done == 8


def test_stored_metadata_reaches_the_reward_as_it_was(experiment: Experiment) -> None:
    rows = experiment.store.read_tables("prompts", experiment.store.files("prompts")).to_pylist()
    prompts = stored_prompts(experiment.store)
    assert {name: dict(prompt.metadata) for name, prompt in prompts.items()} == {
        row["prompt_id"]: json.loads(row["metadata"]) for row in rows
    }
    assert all(prompt.prompt_id == name for name, prompt in prompts.items())
