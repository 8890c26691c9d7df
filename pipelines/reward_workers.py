"""Where batches are judged: in this process, or by worker processes that each build the reward once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any

from pipelines.rewards.base import Media, Reward, build_reward
from pipelines.rewards.composite import Composite
from pipelines.rewards.judge import Judgement, judge
from pipelines.settings import RewardConfig


@dataclass(frozen=True)
class Batch:
    """B samples: media, prompts and their metadata."""

    media: Sequence[Media]
    texts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]


def judges_of(reward: Reward) -> list[Reward]:
    """The rewards that look at samples: the parts of a composite, else the reward itself."""
    return [part.reward for part in reward.parts] if isinstance(reward, Composite) else [reward]


class Judges:
    """Judges batches with the judges of a reward. A context manager: its end is the workers' end."""

    def __init__(self, reward: Reward, config: RewardConfig) -> None:
        self.judges = judges_of(reward)
        self.workers = config.workers
        self._pool: ProcessPoolExecutor | None = None
        if self.workers:  # spawned, not forked: a reward may hold threads, locks or a GPU, which a fork would tear
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, (config, _versions(self.judges)))
        self._pending: set[Future[list[Judgement]]] = set()

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, number: int, batch: Batch) -> Future[list[Judgement]]:
        """Have judge `number` (its place in `judges_of`) look at a batch.

        Without workers that is done on return. With N it waits while 2 N batches are under way, so that memory holds no
        more; the future, or this call, raises BrokenProcessPool once a worker has died.
        """
        if self._pool is None:
            done: Future[list[Judgement]] = Future()
            done.set_result(judge(self.judges[number], batch.media, batch.texts, batch.metadata))
            return done
        if len(self._pending) >= 2 * self.workers:
            self._pending = wait(self._pending, return_when=FIRST_COMPLETED).not_done
        future = self._pool.submit(_judge, number, batch)
        self._pending.add(future)
        return future


def _versions(judges: Sequence[Reward]) -> list[tuple[str, str]]:
    return [(judge.name, judge.version) for judge in judges]


_order: tuple[RewardConfig, list[tuple[str, str]]] = (RewardConfig(), [])
"""In a worker: the reward to build, and the names and versions that its judges have in the main process."""


def _begin(config: RewardConfig, versions: list[tuple[str, str]]) -> None:
    """A worker's first act. Ctrl-C is the main process's to handle: workers finish their batch."""
    global _order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _order = config, versions


def _end_with_parent() -> None:
    """Where the main process is killed, its workers would wait for ever, and keep their memory."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


@cache
def _judges() -> list[Reward]:
    """In a worker: built with the first batch, so that what goes wrong reaches whoever waits for it."""
    config, expected = _order
    built = judges_of(build_reward(config.name, config.options))
    if (found := _versions(built)) != expected:
        raise ValueError(f"reward {config.name} changed while it was scoring, from {expected} to {found}: score again")
    return built


def _judge(number: int, batch: Batch) -> list[Judgement]:
    return judge(_judges()[number], batch.media, batch.texts, batch.metadata)
