"""Stage `score`: judge the media of trajectories that lack a reward, and commit the values beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opgrpo_data import ids
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import checked_name
from opgrpo_data.schema import REWARDS, table_of
from opgrpo_data.shards import read_media
from pipelines import media
from pipelines.experiment import Experiment, Outcome
from pipelines.rewards.base import Media, Reward, Score


def score(experiment: Experiment, iteration: int | None = None, dry_run: bool = False) -> Outcome:
    """Score what lacks a value of this reward and version: one iteration, or None for the whole run.

    A sample whose reward fails gets an error row; the next `score` tries it again.
    """
    reward = experiment.reward(experiment.config.reward)
    shards = experiment.store.files("trajectories", run=experiment.run_id, iteration=iteration)
    if not shards:
        where = f"run {experiment.run_id}" if iteration is None else f"iteration {iteration}"
        raise StoreError(f"{where} has no trajectories to score: run `opgrpo rollout` first")
    bar = experiment.progress.bar(shards, f"score {'' if iteration is None else iteration}")
    tallies = [_score_shard(experiment, reward, shard, dry_run) for shard in bar]
    done, skipped = sum(tally.done for tally in tallies), sum(tally.skipped for tally in tallies)
    errors = [error for tally in tallies for error in tally.errors]
    if errors and len(errors) == done and not skipped:
        raise ValueError(f"reward {reward.name} failed on all {done} samples: {errors[0]}. Correct it and score again")
    if errors:
        experiment.progress.warn(f"reward {reward.name} failed on {len(errors)} of {done} samples, first: {errors[0]}")
    detail = {"reward": reward.name, "version": reward.version, "failed": len(errors)}
    return Outcome("score", iteration, done, skipped, detail)


@dataclass(frozen=True)
class Tally:
    """What was scored of a shard: trajectories judged now, those that had a value before, and what went wrong now."""

    done: int
    skipped: int
    errors: list[str]


def _score_shard(experiment: Experiment, reward: Reward, shard: str, dry_run: bool) -> Tally:
    store = experiment.store
    rows = store.read_tables("trajectories", [shard]).to_pylist()
    while True:
        earlier = _reward_files(experiment, reward, shard)
        scored = experiment.scored_ids(list(earlier.values()))
        missing = [row for row in rows if row["trajectory_id"] not in scored]
        skipped = len(rows) - len(missing)
        if dry_run or not missing:
            return Tally(len(missing), skipped, [])
        results = _judge_all(experiment, reward, missing, experiment.config.reward.batch_size)
        attempt = max(earlier, default=-1) + 1
        if store.publish_table(f"{_stem(reward, shard)}.{attempt:03d}.parquet", table_of(results, REWARDS)):
            return Tally(len(missing), skipped, [row["error"] for row in results if row["error"] is not None])
        # Another scorer was faster: see what it left.


def _stem(reward: Reward, shard: str) -> str:
    """Where the values of one reward for one shard lie, up to the number of the attempt."""
    folder = f"rewards/reward={checked_name(reward.name, 'reward')}"
    return f"{folder}/{shard.removeprefix('trajectories/').removesuffix('.parquet')}.v{checked_name(reward.version, 'version')}"


def _reward_files(experiment: Experiment, reward: Reward, shard: str) -> dict[int, str]:
    """Files with values of one reward and version for one shard, by the number of the attempt."""
    stem = f"{_stem(reward, shard)}."
    found = ((path.removeprefix(stem).removesuffix(".parquet"), path) for path in experiment.store.directory.list(f"{stem}*"))
    return {int(attempt): path for attempt, path in found if attempt.isdecimal()}


def reward_files(experiment: Experiment, iteration: int) -> list[str]:
    """Every file with values of the run's reward, in its present version, for one iteration."""
    reward = experiment.reward(experiment.config.reward)
    shards = experiment.store.files("trajectories", run=experiment.run_id, iteration=iteration)
    return [path for shard in shards for path in _reward_files(experiment, reward, shard).values()]


def _judge_all(experiment: Experiment, reward: Reward, rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    readable: list[tuple[dict[str, Any], Media]] = []
    for row in rows:
        try:
            readable.append((row, media.decode(read_media(experiment.store.directory, row))))
        except (CorruptionError, ValueError) as error:
            results.append(_row(reward, row["trajectory_id"], Judgement(None, None, f"media: {error}")))
    for start in range(0, len(readable), batch_size):
        batch = readable[start : start + batch_size]
        prompts = [experiment.prompt_of[row["prompt_id"]] for row, _ in batch]
        judged = judge(
            reward,
            [picture for _, picture in batch],
            [prompt.text for prompt in prompts],
            [prompt.metadata for prompt in prompts],
        )
        results += [_row(reward, row["trajectory_id"], judgement) for (row, _), judgement in zip(batch, judged, strict=True)]
    return results


@dataclass(frozen=True)
class Judgement:
    """What became of one sample: a value with its detail (JSON text), or an error."""

    value: float | None
    detail: str | None
    error: str | None


def judge(
    reward: Reward, pictures: Sequence[Media], texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> list[Judgement]:
    """Score samples. A batch that raises is tried again one by one: one bad sample must not cost its neighbours theirs."""
    try:
        scores = reward.score(pictures, texts, metadata)
        if len(scores) != len(pictures):
            raise ValueError(f"it returned {len(scores)} scores for {len(pictures)} samples")
        return [_judgement(score) for score in scores]
    except Exception as error:  # whatever a user's reward raises becomes an error row
        if len(pictures) == 1:
            return [Judgement(None, None, f"{type(error).__name__}: {error}")]
        singles = zip(pictures, texts, metadata, strict=True)
        return [judge(reward, [picture], [text], [data])[0] for picture, text, data in singles]


def _judgement(score: Score) -> Judgement:
    if not math.isfinite(score.value):
        return Judgement(None, None, f"the value is {score.value}, not a finite number")
    return Judgement(score.value, ids.canonical_json(dict(score.detail)), None)


def _row(reward: Reward, trajectory_id: str, judgement: Judgement) -> dict[str, Any]:
    return {"trajectory_id": trajectory_id, "reward": reward.name, "version": reward.version, **asdict(judgement)}
