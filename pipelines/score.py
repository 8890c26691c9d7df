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
from opgrpo_data.reading import read_media
from opgrpo_data.schema import REWARDS, table_of
from opgrpo_data.store import Store
from pipelines import media
from pipelines.experiment import Experiment, Outcome
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.reward_workers import Batch, Judges, judges_of
from pipelines.rewards.base import Media, Reward
from pipelines.rewards.composite import Composite
from pipelines.rewards.judge import Judgement, failed
from pipelines.settings import RewardConfig

Row = Mapping[str, Any]


def score(experiment: Experiment, iteration: int | None = None, dry_run: bool = False) -> Outcome:
    """Score what lacks a value of this reward and version: one iteration, or None for the whole run.

    A sample whose reward fails gets an error row; the next `score` tries it again. What the parts of a composite say is
    stored as well, and not asked again. Raises ValueError when every sample failed, or a worker died.
    """
    config = experiment.config
    if config.algorithm == "offline":
        raise ValueError(
            f"run {experiment.run_id} is offline: what it trains on was scored before it began. To give stored trajectories "
            f"another reward: `opgrpo score --reward NAME`"
        )
    reward = experiment.reward(config.reward)
    shards = experiment.store.files("trajectories", run=experiment.run_id, iteration=iteration)
    if not shards:
        where = f"run {experiment.run_id}" if iteration is None else f"iteration {iteration}"
        raise StoreError(f"{where} has no trajectories to score: run `opgrpo rollout` first")
    bar = experiment.progress.bar(shards, f"score {'' if iteration is None else iteration}")
    prompt_of = experiment.prompt_of
    return score_shards(experiment.store, bar, reward, config.reward, prompt_of, experiment.progress, iteration, dry_run)


def score_shards(
    store: Store,
    shards: Iterable[str],
    reward: Reward,
    config: RewardConfig,
    prompt_of: Mapping[str, Prompt],
    progress: Progress,
    iteration: int | None,
    dry_run: bool,
) -> Outcome:
    """Score what shards (their index files) lack of a reward, which `config` built. prompt_of: prompt_id to prompt.

    Raises ValueError when every sample failed, or a worker died.
    """
    began = time.perf_counter()
    with Judges(reward, config) as judges:
        scoring = Scoring(store, reward, judges, config.batch_size, prompt_of, store.dropped_shards(), dry_run)
        tallies = list(scoring.tallies(shards))
    seconds = time.perf_counter() - began
    done, skipped, dropped = (sum(getattr(tally, name) for tally in tallies) for name in ("done", "skipped", "dropped"))
    errors = [error for tally in tallies for error in tally.errors]
    if errors and len(errors) == done and not skipped:
        raise ValueError(f"reward {reward.name} failed on all {done} samples: {errors[0]}. Correct it and score again")
    if errors:
        progress.warn(f"reward {reward.name} failed on {len(errors)} of {done} samples, first: {errors[0]}")
    detail = {"reward": reward.name, "version": reward.version, "failed": len(errors)}
    gone = {"dropped": dropped} if dropped else {}
    speed = {"samples_per_second": round(done / seconds, 1)} if done and not dry_run else {}
    return Outcome("score", iteration, done, skipped, detail | gone | speed)


@dataclass(frozen=True)
class Tally:
    """What was scored of a shard: trajectories judged now, those that had a value before, those that `opgrpo gc` left no
    media of, and what went wrong now."""

    done: int
    skipped: int
    dropped: int
    errors: list[str]


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
    dropped: int
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
    """What all shards share, and how they are scored. prompt_of: prompt_id to prompt. dropped: index files of shards whose
    media are gone."""

    store: Store
    reward: Reward
    judges: Judges
    batch_size: int
    prompt_of: Mapping[str, Prompt]
    dropped: set[str]
    dry_run: bool

    def tallies(self, shards: Iterable[str]) -> Iterator[Tally]:
        """Shards are committed in order; with N workers, N more are under way, so that no worker waits for a commit."""
        under_way: deque[Work] = deque()
        try:
            for shard in shards:
                under_way.append(self.start(shard))
                if len(under_way) > self.judges.workers:
                    yield self.finish(under_way.popleft())
            while under_way:
                yield self.finish(under_way.popleft())
        except BrokenProcessPool as error:
            for work in under_way:
                with suppress(BrokenProcessPool):
                    self.finish(work)
            raise ValueError(
                f"a worker of reward {self.reward.name} died (crashed, killed, or out of memory): the shards that were "
                f"scored are kept. Run `opgrpo score` again, with fewer reward.workers or a smaller reward.batch_size if "
                f"memory is short"
            ) from error

    def start(self, shard: str) -> Work:
        """Ask the judges for what a shard lacks. Of a composite, each part is asked for what that part lacks."""
        rows = self.store.read_tables("trajectories", [shard]).to_pylist()
        scored = _stored(self.store, self.reward, shard)
        missing = [row for row in rows if row["trajectory_id"] not in scored.values]
        known = [scored]
        if isinstance(self.reward, Composite) and missing:
            known = [_stored(self.store, judge, shard) for judge in judges_of(self.reward)]
        unseen = {row["trajectory_id"] for row in missing if any(row["trajectory_id"] not in part.values for part in known)}
        dropped = 0
        if shard in self.dropped:  # a composite may still be made of parts that are stored
            missing, dropped = [row for row in missing if row["trajectory_id"] not in unseen], len(unseen)
        work = Work(shard, missing, len(rows) - len(missing) - dropped, dropped, scored, known)
        if not self.dry_run:
            wanted = [row for row in missing if row["trajectory_id"] in unseen]
            for batch in self._readable(wanted, work.unreadable):
                self._ask(work, batch)
        return work

    def finish(self, work: Work) -> Tally:
        """Commit what the judges said of a shard: the parts of a composite first, then the composite."""
        if self.dry_run or not work.missing:
            return Tally(len(work.missing), work.skipped, work.dropped, [])
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
            return Tally(len(work.missing), work.skipped, work.dropped, errors)
        return self.finish(self.start(work.shard))  # another scorer was faster: see what it left

    def _readable(self, rows: list[Row], unreadable: dict[str, Judgement]) -> Iterator[list[tuple[Row, Media]]]:
        """Batches of rows with their media; a row whose media is damaged, or its prompt lost, goes to `unreadable` instead."""
        batch: list[tuple[Row, Media]] = []
        for row in rows:
            if row["prompt_id"] not in self.prompt_of:
                lost = f"prompt: the store has no prompt {row['prompt_id']}; restore the files of prompts/ from a copy"
                unreadable[row["trajectory_id"]] = failed(lost)
                continue
            try:
                batch.append((row, media.decode(read_media(self.store.directory, row))))
            except (CorruptionError, ValueError) as error:
                unreadable[row["trajectory_id"]] = failed(f"media: {error}")
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _ask(self, work: Work, batch: list[tuple[Row, Media]]) -> None:
        for number, known in enumerate(work.known):
            lacking = [(row, sample) for row, sample in batch if row["trajectory_id"] not in known.values]
            if lacking:
                prompts = [self.prompt_of[row["prompt_id"]] for row, _ in lacking]
                texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
                future = self.judges.submit(number, Batch([sample for _, sample in lacking], texts, metadata))
                work.asked.append((number, [row["trajectory_id"] for row, _ in lacking], future))

    def _publish(self, reward: Reward, place: str, told: Mapping[str, Judgement]) -> bool:
        """Commit what a reward says; False: the place was taken in the meantime."""
        named = {"reward": reward.name, "version": reward.version}
        rows = [{"trajectory_id": name, **named, **asdict(judgement)} for name, judgement in told.items()]
        return not rows or self.store.publish_table(place, table_of(rows, REWARDS))


def _stored(store: Store, reward: Reward, shard: str) -> Stored:
    """The values of one reward and version for one shard; errors are no values."""
    files = _reward_files(store, reward, shard)
    table = store.read_tables("rewards", list(files.values()))
    rows = table.filter(table["error"].is_null()).to_pylist()
    values = {row["trajectory_id"]: Judgement(row["value"], row["detail"], None) for row in rows}
    return Stored(values, f"{_stem(reward, shard)}.{max(files, default=-1) + 1:03d}.parquet")


def _stem(reward: Reward, shard: str) -> str:
    """Where the values of one reward for one shard lie, up to the number of the attempt."""
    folder = f"rewards/reward={checked_name(reward.name, 'reward')}"
    return f"{folder}/{shard.removeprefix('trajectories/').removesuffix('.parquet')}.v{checked_name(reward.version, 'version')}"


def _reward_files(store: Store, reward: Reward, shard: str) -> dict[int, str]:
    """Files with values of one reward and version for one shard, by the number of the attempt."""
    stem = f"{_stem(reward, shard)}."
    found = ((path.removeprefix(stem).removesuffix(".parquet"), path) for path in store.directory.list(f"{stem}*"))
    return {int(attempt): path for attempt, path in found if attempt.isdecimal()}


def reward_files(experiment: Experiment, iteration: int) -> list[str]:
    """Every file with values of the run's reward, in its present version, for one iteration."""
    reward = experiment.reward(experiment.config.reward)
    shards = experiment.store.files("trajectories", run=experiment.run_id, iteration=iteration)
    return [path for shard in shards for path in _reward_files(experiment.store, reward, shard).values()]
