"""Stage `score` with a composite reward: parts are stored as rewards of their own, and judged once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import ConfigError
from pipelines.experiment import Experiment
from pipelines.score import reward_files, score
from pipelines.selection import select
from tests.pipelines.bad_rewards import Mood, brightness, digest
from tests.pipelines.helpers import flipped, forked, pictures_of, reopened, rows_of, small
from tests.pipelines.plain_rewards import warmth

MOODY = {"name": "tests.pipelines.bad_rewards:moody", "weight": 0.5}
WARM = {"name": "tests.pipelines.plain_rewards:warmth", "weight": 2.0}
Fork = Callable[..., Experiment]


@pytest.fixture
def fork(rolled: Path, tmp_path: Path) -> Fork:
    """A run of eight trajectories in two shards, not yet scored, with a composite of `parts`."""

    def build(*parts: dict[str, Any], **changes: Any) -> Experiment:
        reward = {"name": "composite", "options": {"parts": list(parts)}, **changes.pop("reward", {})}
        return forked(rolled, tmp_path, reward=reward, **changes)

    return build


def by_reward(experiment: Experiment) -> dict[str, dict[str, dict[str, Any]]]:
    """reward -> trajectory_id -> row; the last row of those that were tried again."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows_of(experiment, "rewards"):
        found.setdefault(row["reward"], {})[row["trajectory_id"]] = row
    return found


def values(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: row["value"] for name, row in rows.items()}


def test_the_composite_and_its_parts_are_stored(fork: Fork, mood: Mood) -> None:
    experiment = fork(MOODY, WARM)
    outcome = score(experiment, 0)
    assert (outcome.done, outcome.skipped, outcome.detail["failed"]) == (8, 0, 0)
    assert mood.batches == [4, 4]
    pictures, found = pictures_of(experiment), by_reward(experiment)
    assert {name: len(rows) for name, rows in found.items()} == {"composite": 8, "moody": 8, "warmth": 8}
    assert values(found["moody"]) == {name: brightness(picture) for name, picture in pictures.items()}
    assert values(found["warmth"]) == {name: warmth([picture], [""], [{}])[0] for name, picture in pictures.items()}
    for name, row in found["composite"].items():
        told = json.loads(row["detail"])
        assert told["parts"] == {"moody": found["moody"][name]["value"], "warmth": found["warmth"][name]["value"]}
        assert told["details"] == {"moody": {"height": 24}, "warmth": {}}
        assert row["value"] == 0.5 * told["parts"]["moody"] + 2.0 * told["parts"]["warmth"]
    assert all("reward=composite/" in path for path in reward_files(experiment, 0))
    mood.batches.clear()
    assert (score(experiment).done, score(experiment).skipped) == (0, 8)
    assert mood.batches == []


def test_the_stored_composite_is_what_the_reward_itself_gives(fork: Fork) -> None:
    experiment = fork(MOODY, WARM)
    score(experiment)
    pictures, rows = pictures_of(experiment), by_reward(experiment)["composite"]
    scores = experiment.reward(experiment.config.reward).score(list(pictures.values()), [""] * 8, [{}] * 8)
    assert {name: row["value"] for name, row in rows.items()} == dict(
        zip(pictures, [score.value for score in scores], strict=True)
    )
    assert [json.loads(rows[name]["detail"]) for name in pictures] == [dict(score.detail) for score in scores]


def test_a_part_that_is_stored_is_not_judged_again(rolled: Path, tmp_path: Path, fork: Fork, mood: Mood) -> None:
    """Scored before as the only reward, and then in a composite of other weights."""
    score(forked(rolled, tmp_path / "first"))
    assert mood.batches == [4, 4]
    experiment = forked(tmp_path / "first" / "store", tmp_path, reward={"name": "composite", "options": {"parts": [MOODY]}})
    assert score(experiment).done == 8
    heavier = forked(
        tmp_path / "store", tmp_path / "other", reward={"name": "composite", "options": {"parts": [{**MOODY, "weight": 3}]}}
    )
    assert score(heavier).done == 8
    assert mood.batches == [4, 4]
    found = by_reward(heavier)
    assert len({row["version"] for row in rows_of(heavier, "rewards") if row["reward"] == "composite"}) == 2
    assert len(found["moody"]) == 8
    assert sum(row["reward"] == "moody" for row in rows_of(heavier, "rewards")) == 8


def test_no_media_is_read_when_all_parts_are_stored(fork: Fork, tmp_path: Path) -> None:
    experiment = fork(WARM)
    score(experiment)
    other = forked(
        tmp_path / "store", tmp_path / "other", reward={"name": "composite", "options": {"parts": [{**WARM, "weight": 9}]}}
    )
    for row in rows_of(other, "trajectories"):
        Path(other.store.directory.path(row["media_file"])).unlink(missing_ok=True)
    assert (score(other).done, score(other).skipped) == (8, 8)


def test_another_version_of_a_part_scores_only_that_part(fork: Fork, mood: Mood, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = fork(MOODY, WARM)
    score(experiment)
    mood.version = "2"
    mood.batches.clear()
    judged: list[int] = []
    other = reopened(experiment)
    parts = other.reward(other.config.reward).parts  # type: ignore[attr-defined]
    monkeypatch.setattr(type(parts[1].reward), "score", lambda *_: judged.append(1))
    assert score(other).done == 8
    assert (mood.batches, judged) == ([4, 4], [])
    versions = sorted(row["version"] for row in rows_of(other, "rewards") if row["reward"] == "moody")
    assert versions == ["1"] * 8 + ["2"] * 8
    assert sum(row["reward"] == "warmth" for row in rows_of(other, "rewards")) == 8


def test_a_part_that_fails_is_tried_again_alone(fork: Fork, mood: Mood) -> None:
    experiment = fork(MOODY, WARM)
    pictures = pictures_of(experiment)
    bad = sorted(pictures)[3]
    mood.kind, mood.pictures = "raises", {digest(pictures[bad])}
    outcome = score(experiment)
    assert (outcome.done, outcome.detail["failed"]) == (8, 1)
    found = by_reward(experiment)
    assert found["moody"][bad]["error"] == "RuntimeError: the reward server is down"
    assert found["composite"][bad]["error"] == "part moody: RuntimeError: the reward server is down"
    assert found["warmth"][bad]["error"] is None
    assert [found["composite"][bad][column] for column in ("value", "detail")] == [None, None]
    select(experiment, 0)
    planned = {row["trajectory_id"] for row in rows_of(experiment, "plans")}
    assert planned == set(pictures) - {bad}
    mood.kind = "good"
    mood.batches.clear()
    again = score(experiment)
    assert (again.done, again.skipped, again.detail["failed"]) == (1, 7, 0)
    assert mood.batches == [1]
    assert by_reward(experiment)["composite"][bad]["value"] is not None
    assert sum(row["reward"] == "warmth" for row in rows_of(experiment, "rewards")) == 8


def test_damaged_media_is_an_error_of_every_part_that_lacks_it(fork: Fork, mood: Mood) -> None:
    experiment = fork(MOODY, WARM)
    row = rows_of(experiment, "trajectories")[0]
    flipped(Path(experiment.store.directory.path(row["media_file"])), row["media_offset"] + 40)
    assert score(experiment).detail["failed"] == 1
    errors = {r["reward"]: r["error"] for r in rows_of(experiment, "rewards") if r["error"] is not None}
    assert errors["moody"].startswith("media: ")
    assert errors == {"moody": errors["moody"], "warmth": errors["moody"], "composite": f"part moody: {errors['moody']}"}


def test_parts_failing_everywhere_are_an_error(fork: Fork, mood: Mood) -> None:
    mood.kind = "raises"
    experiment = fork(WARM, MOODY)
    with pytest.raises(ValueError, match="reward composite failed on all 8 samples: part moody: RuntimeError: the reward"):
        score(experiment)
    mood.kind = "good"
    mood.batches.clear()
    assert score(experiment).done == 8
    assert mood.batches == [4, 4]


def test_two_scorers_do_not_double_the_values(fork: Fork) -> None:
    """Another process scores the whole run while this one is at its first batch."""
    experiment = fork(MOODY, WARM)
    others: list[Experiment] = [reopened(experiment)]

    def meanwhile(pictures: Any, texts: Any, metadata: Any) -> list[float]:
        if others:
            assert score(others.pop()).done == 8
        return warmth(pictures, texts, metadata)

    part = experiment.reward(experiment.config.reward).parts[1].reward  # type: ignore[attr-defined]
    object.__setattr__(part, "function", meanwhile)
    outcome = score(experiment)
    assert (outcome.done, outcome.skipped) == (0, 8)
    counts = Counter(row["reward"] for row in rows_of(experiment, "rewards"))
    assert counts == {"composite": 8, "moody": 8, "warmth": 8}


@pytest.mark.parametrize("parts", ["zscore", "gdpo"])
def test_the_plan_normalises_the_parts(fork: Fork, parts: str) -> None:
    """Against NumPy, from the stored values: docs/maths.md, section 4."""
    experiment = fork(MOODY, WARM, train={"advantage_parts": parts, "advantage_clip": 100.0})
    score(experiment)
    select(experiment, 0)
    plan = {row["trajectory_id"]: row for row in rows_of(experiment, "plans")}
    found = by_reward(experiment)
    names = sorted(plan)
    matrix = np.array([[found[part][name]["value"] for part in ("moody", "warmth")] for name in names])
    groups = np.array([plan[name]["group_id"] for name in names])
    weights = np.array([0.5, 2.0])

    def by_group(column: Any) -> Any:
        members = [column[groups == group] for group in groups]
        return np.array([(v - m.mean()) / (m.std() + 1e-4) for v, m in zip(column, members, strict=True)])

    if parts == "zscore":
        expected = by_group((matrix - matrix.mean(0)) / (matrix.std(0) + 1e-4) @ weights)
    else:
        summed = np.stack([by_group(column) for column in matrix.T], axis=1) @ weights
        expected = summed / (summed.std() + 1e-4)
    assert [plan[name]["advantage"] for name in names] == pytest.approx(expected.tolist(), rel=1e-6)
    assert [plan[name]["reward"] for name in names] == [found["composite"][name]["value"] for name in names]


@pytest.mark.parametrize("parts", ["zscore", "gdpo"])
def test_only_a_composite_has_parts_to_normalise(parts: str) -> None:
    message = f"train.advantage_parts {parts} normalises the parts of a composite reward, and reward.name is .*: list them in"
    with pytest.raises(ConfigError, match=message):
        small(train={"advantage_parts": parts})
