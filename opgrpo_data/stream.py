"""A plan to batches: a reader thread fetches and verifies the latents of the next microsteps while one is trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from opgrpo_data.errors import CorruptionError
from opgrpo_data.io import Directory
from opgrpo_data.shards import LatentLocation, read_latents

PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class Batch:
    """One microstep of a plan.

    rows: the plan's rows, without those whose bytes are damaged.
    latents: per row the latents that its plan row names, first_latent .. last_latent, (n, *latent_shape), storage dtype.
    damaged: (trajectory_id, what was found) of rows left out.
    """

    optimizer_step: int
    microstep: int
    rows: list[dict[str, Any]]
    latents: list[NDArray[Any]]
    damaged: list[tuple[str, CorruptionError]]


def stream(directory: Directory, plan: pa.Table, rank: int = 0) -> Iterator[Batch]:
    """Batches of one rank in the plan's order. Errors of the reader thread are raised here, in the consumer.

    Only the bytes that training needs are read.
    """
    mine = plan.filter(pc.equal(plan["rank"], rank))
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=PREFETCHED_BATCHES)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for batch in _batches(directory, mine):
                if not _put(ready, batch, stopped):
                    return
            _put(ready, None, stopped)
        except BaseException as error:  # handed over: a reader that dies silently would hang the trainer
            _put(ready, error, stopped)

    reader = threading.Thread(target=produce, name="opgrpo-stream", daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        reader.join()


def _put(ready: queue.Queue[Any], item: object, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _batches(directory: Directory, plan: pa.Table) -> Iterator[Batch]:
    rows = plan.to_pylist()
    keys = [(row["optimizer_step"], row["microstep"]) for row in rows]
    for key in sorted(set(keys)):
        kept: list[dict[str, Any]] = []
        latents: list[NDArray[Any]] = []
        damaged: list[tuple[str, CorruptionError]] = []
        for row in (row for row, its in zip(rows, keys, strict=True) if its == key):
            try:
                latents.append(read_latents(directory, LatentLocation.of(row), row["first_latent"], row["last_latent"]))
                kept.append(row)
            except CorruptionError as error:
                damaged.append((row["trajectory_id"], error))
        yield Batch(*key, kept, latents, damaged)
