"""Stage `score`: whatever a reward does, good samples keep their values and bad ones can be tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from opgrpo_data.errors import StoreError
from pipelines.experiment import Experiment
from pipelines.score import reward_files, score
from tests.pipelines.bad_rewards import BAD_MOODS, Mood, brightness, digest
from tests.pipelines.helpers import flipped, forked, pictures_of, rows_of


@pytest.fixture
def experiment(rolled: Path, tmp_path: Path) -> Experiment:
    """Eight trajectories in two shards, not yet scored."""
    return forked(rolled, tmp_path)


def test_every_sample_gets_its_value(experiment: Experiment, mood: Mood) -> None:
    outcome = score(experiment, 0)
    assert (outcome.done, outcome.skipped) == (8, 0)
    speed = outcome.detail.pop("samples_per_second")
    assert speed > 0
    assert speed == round(speed, 1)
    assert outcome.detail == {"reward": "moody", "version": "1", "failed": 0}
    pictures, rows = pictures_of(experiment), rows_of(experiment, "rewards")
    assert {row["trajectory_id"]: row["value"] for row in rows} == {key: brightness(p) for key, p in pictures.items()}
    assert len(rows) == 8
    assert all(row["detail"] == '{"height":24}' and row["error"] is None for row in rows)
    assert all((row["reward"], row["version"]) == ("moody", "1") for row in rows)
    assert mood.batches == [4, 4]


def test_scoring_again_does_nothing(experiment: Experiment, mood: Mood) -> None:
    score(experiment)
    before = sorted(Path(experiment.store.directory.url).rglob("*"))
    mood.batches.clear()
    outcome = score(experiment)
    assert (outcome.done, outcome.skipped) == (0, 8)
    assert outcome.detail == {"reward": "moody", "version": "1", "failed": 0}
    assert mood.batches == []
    assert sorted(Path(experiment.store.directory.url).rglob("*")) == before


def test_dry_run_counts_and_writes_nothing(experiment: Experiment, mood: Mood) -> None:
    outcome = score(experiment, dry_run=True)
    assert (outcome.done, outcome.skipped) == (8, 0)
    assert "samples_per_second" not in outcome.detail
    assert rows_of(experiment, "rewards") == []
    assert mood.batches == []


def test_an_iteration_without_trajectories_has_nothing_to_score(experiment: Experiment) -> None:
    with pytest.raises(StoreError, match="iteration 1 has no trajectories to score: run `opgrpo rollout` first"):
        score(experiment, 1)


def test_batches_have_the_configured_size(rolled: Path, tmp_path: Path, mood: Mood) -> None:
    experiment = forked(rolled, tmp_path, reward={"batch_size": 3})
    score(experiment)
    assert mood.batches == [3, 1, 3, 1]


@pytest.mark.parametrize("kind", [*BAD_MOODS, "one too many"])
def test_one_bad_sample_costs_nobody_else_theirs(experiment: Experiment, mood: Mood, kind: str) -> None:
    pictures = pictures_of(experiment)
    bad = sorted(pictures)[3]
    mood.kind, mood.pictures = kind, {digest(pictures[bad])}
    outcome = score(experiment)
    assert (outcome.done, outcome.detail["failed"]) == (8, 1)
    rows = {row["trajectory_id"]: row for row in rows_of(experiment, "rewards")}
    assert len(rows) == 8
    error = rows.pop(bad)
    assert (error["value"], error["detail"]) == (None, None)
    expected = {
        "raises": "RuntimeError: the reward server is down",
        "nan": "the value is nan, not a finite number",
        "infinite": "the value is inf, not a finite number",
        "not JSON": "TypeError: Object of type object is not JSON serializable",
        "not a number": "TypeError: must be real number, not str",
        "NaN in the detail": "ValueError: Out of range float values are not JSON compliant",
        "one too many": "ValueError: it returned 2 scores for 1 samples",
    }[kind]
    assert error["error"].startswith(expected)
    assert all(row["value"] == brightness(pictures[key]) and row["error"] is None for key, row in rows.items())


def test_a_retry_scores_only_what_failed(experiment: Experiment, mood: Mood) -> None:
    pictures = pictures_of(experiment)
    bad = set(sorted(pictures)[:2])
    mood.kind, mood.pictures = "raises", {digest(pictures[key]) for key in bad}
    assert score(experiment).detail["failed"] == 2
    assert (score(experiment, dry_run=True).done, score(experiment, dry_run=True).skipped) == (2, 6)
    mood.kind = "good"
    mood.batches.clear()
    outcome = score(experiment)
    assert (outcome.done, outcome.skipped, outcome.detail["failed"]) == (2, 6, 0)
    assert sum(mood.batches) == 2
    values = [row for row in rows_of(experiment, "rewards") if row["error"] is None]
    assert sorted(row["trajectory_id"] for row in values) == sorted(pictures)
    assert score(experiment).done == 0


def test_a_reward_that_fails_on_everything_is_an_error(experiment: Experiment, mood: Mood) -> None:
    mood.kind = "raises"
    with pytest.raises(ValueError, match="reward moody failed on all 8 samples: RuntimeError: the reward server is down"):
        score(experiment)
    mood.kind = "good"
    assert (score(experiment).done, score(experiment).skipped) == (8, 8)


def test_another_version_scores_everything_again(experiment: Experiment, mood: Mood) -> None:
    score(experiment)
    mood.version = "2"
    assert score(experiment).done == 8
    assert sorted(row["version"] for row in rows_of(experiment, "rewards")) == ["1"] * 8 + ["2"] * 8
    assert all(".v2." in path for path in reward_files(experiment, 0))
    assert score(experiment).done == 0
    mood.version = "1"
    assert score(experiment).done == 0


@pytest.mark.parametrize("version", ["1/2", "", "../1", ".1"])
def test_a_version_that_is_no_name_is_refused(experiment: Experiment, mood: Mood, version: str) -> None:
    mood.version = version
    with pytest.raises(ValueError, match=r"version .* cannot be part of a path"):
        score(experiment)


def test_damaged_media_is_an_error_row_and_the_reward_never_sees_it(experiment: Experiment, mood: Mood) -> None:
    row = rows_of(experiment, "trajectories")[0]
    flipped(Path(experiment.store.directory.path(row["media_file"])), row["media_offset"] + 40)
    assert score(experiment).detail["failed"] == 1
    errors = [r for r in rows_of(experiment, "rewards") if r["error"] is not None]
    assert [r["trajectory_id"] for r in errors] == [row["trajectory_id"]]
    assert errors[0]["error"].startswith("media: ")
    assert f"member {row['trajectory_id']}.png: expected crc32" in errors[0]["error"]
    assert sorted(mood.batches) == [3, 4]
