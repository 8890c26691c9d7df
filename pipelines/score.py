"""Stage `score`: judge the media of trajectories that lack a reward, and commit the values beside them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import checked_name
from opgrpo_data.schema import REWARDS, table_of
from opgrpo_data.shards import read_media
from pipelines import media
from pipelines.experiment import Experiment, Outcome
from pipelines.reward_workers import Batch, Judges, judges_of
from pipelines.rewards.base import Media, Reward
from pipelines.rewards.composite import Composite
from pipelines.rewards.judge import Judgement, failed

Row = Mapping[str, Any]


def score(experiment: Experiment, iteration: int | None = None, dry_run: bool = False) -> Outcome:
    """Score what lacks a value of this reward and version: one iteration, or None for the whole run.

    A sample whose reward fails gets an error row; the next `score` tries it again. What the parts of a composite say is
    stored as well, and not asked again. Raises ValueError when every sample failed, or a worker died.
    """
    reward = experiment.reward(experiment.config.reward)
    shards = experiment.store.files("trajectories", run=experiment.run_id, iteration=iteration)
    if not shards:
        where = f"run {experiment.run_id}" if iteration is None else f"iteration {iteration}"
        raise StoreError(f"{where} has no trajectories to score: run `opgrpo rollout` first")
    bar = experiment.progress.bar(shards, f"score {'' if iteration is None else iteration}")
    began = time.perf_counter()
    with Judges(reward, experiment.config.reward) as judges:
        tallies = list(_score_shards(Scoring(experiment, reward, judges, dry_run), bar))
    seconds = time.perf_counter() - began
    done, skipped = sum(tally.done for tally in tallies), sum(tally.skipped for tally in tallies)
    errors = [error for tally in tallies for error in tally.errors]
    if errors and len(errors) == done and not skipped:
        raise ValueError(f"reward {reward.name} failed on all {done} samples: {errors[0]}. Correct it and score again")
    if errors:
        experiment.progress.warn(f"reward {reward.name} failed on {len(errors)} of {done} samples, first: {errors[0]}")
    detail = {"reward": reward.name, "version": reward.version, "failed": len(errors)}
    speed = {"samples_per_second": round(done / seconds, 1)} if done and not dry_run else {}
    return Outcome("score", iteration, done, skipped, detail | speed)


@dataclass(frozen=True)
class Tally:
    """What was scored of a shard: trajectories judged now, those that had a value before, and what went wrong now."""

    done: int
    skipped: int
    errors: list[str]


def _score_shards(scoring: Scoring, shards: Iterable[str]) -> Iterator[Tally]:
    """Shards are committed in order; with N workers, N more are under way, so that no worker waits for a commit."""
    under_way: deque[Work] = deque()
    try:
        for shard in shards:
            under_way.append(scoring.start(shard))
            if len(under_way) > scoring.judges.workers:
                yield scoring.finish(under_way.popleft())
        while under_way:
            yield scoring.finish(under_way.popleft())
    except BrokenProcessPool as error:
        for work in under_way:
            with suppress(BrokenProcessPool):
                scoring.finish(work)
        raise ValueError(
            f"a worker of reward {scoring.reward.name} died (crashed, killed, or out of memory): the shards that were scored "
            f"are kept. Run `opgrpo score` again, with fewer reward.workers or a smaller reward.batch_size if memory is short"
        ) from error


@dataclass(frozen=True)
class Stored:
    """What the store holds of one reward for one shard: values by trajectory_id, and where the next ones go.

    Two scorers that saw the same go for the same place: whoever comes second notices.
    """

    values: dict[str, Judgement]
    place: str


@dataclass(frozen=True)
class Work:
    """A shard under way. `missing` lacks the reward, of which the store holds `scored`; known: what it holds per judge;
    asked: judge, samples, and the answers to come."""

    shard: str
    missing: list[Row]
    skipped: int
    scored: Stored
    known: list[Stored]
    unreadable: dict[str, Judgement] = field(default_factory=dict)
    asked: list[tuple[int, list[str], Future[list[Judgement]]]] = field(default_factory=list)

    def answers(self, number: int) -> dict[str, Judgement]:
        """What a judge said now; waits for it."""
        told = {name: error for name, error in self.unreadable.items() if name not in self.known[number].values}
        for judge, names, future in self.asked:
            if judge == number:
                told |= zip(names, future.result(), strict=True)
        return told


@dataclass(frozen=True)
class Scoring:
    """What all shards share."""

    experiment: Experiment
    reward: Reward
    judges: Judges
    dry_run: bool

    def start(self, shard: str) -> Work:
        """Ask the judges for what a shard lacks. Of a composite, each part is asked for what that part lacks."""
        rows = self.experiment.store.read_tables("trajectories", [shard]).to_pylist()
        scored = _stored(self.experiment, self.reward, shard)
        missing = [row for row in rows if row["trajectory_id"] not in scored.values]
        known = [scored]
        if isinstance(self.reward, Composite) and missing:
            known = [_stored(self.experiment, judge, shard) for judge in judges_of(self.reward)]
        work = Work(shard, missing, len(rows) - len(missing), scored, known)
        if not self.dry_run:
            wanted = [row for row in missing if any(row["trajectory_id"] not in stored.values for stored in known)]
            for batch in self._readable(wanted, work.unreadable):
                self._ask(work, batch)
        return work

    def finish(self, work: Work) -> Tally:
        """Commit what the judges said of a shard: the parts of a composite first, then the composite."""
        if self.dry_run or not work.missing:
            return Tally(len(work.missing), work.skipped, [])
        answers = [work.answers(number) for number in range(len(work.known))]
        final = answers[0]
        tables = list(zip(judges_of(self.reward), work.known, answers, strict=True))
        if isinstance(self.reward, Composite):
            said = [known.values | told for known, told in zip(work.known, answers, strict=True)]
            names = [row["trajectory_id"] for row in work.missing]
            final = {name: self.reward.judged([values[name] for values in said]) for name in names}
            tables.append((self.reward, work.scored, final))
        if all(self._publish(reward, stored.place, told) for reward, stored, told in tables):
            errors = [judgement.error for judgement in final.values() if judgement.error is not None]
            return Tally(len(work.missing), work.skipped, errors)
        return self.finish(self.start(work.shard))  # another scorer was faster: see what it left

    def _readable(self, rows: list[Row], unreadable: dict[str, Judgement]) -> Iterator[list[tuple[Row, Media]]]:
        """Batches of rows with their media; a row whose media is damaged goes to `unreadable` instead."""
        batch: list[tuple[Row, Media]] = []
        for row in rows:
            try:
                batch.append((row, media.decode(read_media(self.experiment.store.directory, row))))
            except (CorruptionError, ValueError) as error:
                unreadable[row["trajectory_id"]] = failed(f"media: {error}")
            if len(batch) == self.experiment.config.reward.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _ask(self, work: Work, batch: list[tuple[Row, Media]]) -> None:
        for number, known in enumerate(work.known):
            lacking = [(row, sample) for row, sample in batch if row["trajectory_id"] not in known.values]
            if lacking:
                prompts = [self.experiment.prompt_of[row["prompt_id"]] for row, _ in lacking]
                texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
                future = self.judges.submit(number, Batch([sample for _, sample in lacking], texts, metadata))
                work.asked.append((number, [row["trajectory_id"] for row, _ in lacking], future))

    def _publish(self, reward: Reward, place: str, told: Mapping[str, Judgement]) -> bool:
        """Commit what a reward says; False: the place was taken in the meantime."""
        named = {"reward": reward.name, "version": reward.version}
        rows = [{"trajectory_id": name, **named, **asdict(judgement)} for name, judgement in told.items()]
        return not rows or self.experiment.store.publish_table(place, table_of(rows, REWARDS))


def _stored(experiment: Experiment, reward: Reward, shard: str) -> Stored:
    """The values of one reward and version for one shard; errors are no values."""
    files = _reward_files(experiment, reward, shard)
    table = experiment.store.read_tables("rewards", list(files.values()))
    rows = table.filter(table["error"].is_null()).to_pylist()
    values = {row["trajectory_id"]: Judgement(row["value"], row["detail"], None) for row in rows}
    return Stored(values, f"{_stem(reward, shard)}.{max(files, default=-1) + 1:03d}.parquet")


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
