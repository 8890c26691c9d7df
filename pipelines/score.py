"""Stage `score`: judge the media of trajectories that lack a reward, and commit the values beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opgrpo_data import ids
from opgrpo_data.errors import CorruptionError
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
    store, config = experiment.store, experiment.config.reward
    reward = experiment.reward(config)
    shards = store.files("trajectories", run=experiment.run_id, iteration=iteration)
    done, skipped, failed, first_error = 0, 0, 0, None
    for shard in experiment.progress.bar(shards, f"score {'' if iteration is None else iteration}"):
        earlier = _reward_files(experiment, reward, shard)
        scored = experiment.scored_ids(earlier)
        rows = store.read_tables("trajectories", [shard]).to_pylist()
        missing = [row for row in rows if row["trajectory_id"] not in scored]
        done, skipped = done + len(missing), skipped + len(rows) - len(missing)
        if missing and not dry_run:
            results = _judge_all(experiment, reward, missing, config.batch_size)
            store.publish_table(f"{_stem(reward, shard)}.{len(earlier):03d}.parquet", table_of(results, REWARDS))
            errors = [row["error"] for row in results if row["error"] is not None]
            failed, first_error = failed + len(errors), first_error or next(iter(errors), None)
    if failed:
        experiment.progress.warn(f"reward {reward.name} failed on {failed} of {done} samples, first: {first_error}")
    if failed and failed == done:
        raise ValueError(f"reward {reward.name} failed on all {failed} samples: {first_error}. Correct it and score again")
    detail = {"reward": reward.name, "version": reward.version, "failed": failed}
    return Outcome("score", iteration, done, skipped, detail)


def _stem(reward: Reward, shard: str) -> str:
    """Where the values of one reward for one shard lie, up to the number of the attempt."""
    folder = f"rewards/reward={checked_name(reward.name, 'reward')}"
    return f"{folder}/{shard.removeprefix('trajectories/').removesuffix('.parquet')}.v{checked_name(reward.version, 'version')}"


def _reward_files(experiment: Experiment, reward: Reward, shard: str) -> list[str]:
    return experiment.store.directory.list(f"{_stem(reward, shard)}.[0-9][0-9][0-9].parquet")


def reward_files(experiment: Experiment, iteration: int) -> list[str]:
    """Every file with values of the run's reward, in its present version, for one iteration."""
    reward = experiment.reward(experiment.config.reward)
    shards = experiment.store.files("trajectories", run=experiment.run_id, iteration=iteration)
    return [path for shard in shards for path in _reward_files(experiment, reward, shard)]


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
