"""A plan to batches: threads read and verify the latents of the next microsteps while one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opgrpo_data.errors import CorruptionError
from opgrpo_data.io import Directory
from opgrpo_data.locations import Int64s, Locations, Spans
from opgrpo_data.reading import LARGE_BYTES, Read, memory, read_many

RING = 3
"""Buffers: one is trained on, the others are being filled, or full."""

WINDOW_BYTES = 32 * 2**20
"""Small microsteps are read together, up to this size: then the disk is asked for many at once, in the order they lie in."""


@dataclass(frozen=True)
class Batch:
    """One microstep of a plan.

    table: the plan's rows (schema PLANS), without those whose bytes are damaged.
    latents: per row the latents that its plan row names, first_latent .. last_latent, (n, *latent_shape), storage dtype.
    They lie in a buffer that is used again: they are valid until the next batch is asked for.
    damaged: (trajectory_id, what was found) of rows left out.
    """

    optimizer_step: int
    microstep: int
    table: pa.Table
    latents: list[NDArray[Any]]
    damaged: list[tuple[str, CorruptionError]]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `table`, made when they are asked for."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows


def stream(directory: Directory, plan: pa.Table, rank: int = 0) -> Iterator[Batch]:
    """Batches of one rank, by optimizer_step and microstep, their rows in the plan's order.

    A pure function of the plan: to go on where training stopped, give it the plan's remaining rows. Only the bytes that
    training needs are read. Memory: RING buffers, each as large as the largest batch, or as WINDOW_BYTES where that is more;
    they begin at a page, so that they can be pinned. Raises StoreError when a row contradicts itself and IndexError when a
    trajectory lacks the latents that are asked for; both before the first batch. Other errors of reading are raised where
    the batch was due. The threads end when the iterator ends or is closed.
    """
    schedule = _Schedule.of(plan, rank)
    if schedule.windows:
        yield from _read_ahead(directory, schedule)


@dataclass(frozen=True)
class _Schedule:
    """Rows of one rank in the order of execution. Batch b has the rows edges[b] .. edges[b + 1]; windows: ranges of batches."""

    table: pa.Table
    spans: Spans
    keys: Int64s
    edges: list[int]
    windows: list[range]

    @classmethod
    def of(cls, plan: pa.Table, rank: int) -> _Schedule:
        keys = np.stack([plan[name].to_numpy().astype(np.int64) for name in ("optimizer_step", "microstep")])
        order = np.lexsort(keys[::-1])  # stable: within a microstep the plan's order
        order = order[plan["rank"].to_numpy()[order] == rank]
        whole = np.array_equal(order, np.arange(plan.num_rows))  # as `select` writes it for one rank
        keys, table = keys[:, order], plan if whole else plan.take(order)
        first, last = (table[name].to_numpy().astype(np.int64) for name in ("first_latent", "last_latent"))
        spans = Spans.of(Locations.of(table), first, last)
        changes = np.flatnonzero(np.diff(keys, axis=1).any(axis=0)) + 1
        edges = [0, *changes.tolist(), table.num_rows] if table.num_rows else [0]
        return cls(table, spans, keys, edges, _windows(np.add.reduceat(spans.length, edges[:-1]).tolist() if edges[1:] else []))

    def rows_of(self, window: range) -> slice:
        return slice(self.edges[window.start], self.edges[window.stop])

    def batch(self, number: int, read: list[Read]) -> Batch:
        begin, end = self.edges[number], self.edges[number + 1]
        table, damaged = self.table.slice(begin, end - begin), []
        if any(isinstance(it, CorruptionError) for it in read):
            names = table["trajectory_id"].to_pylist()
            damaged = [(name, it) for name, it in zip(names, read, strict=True) if isinstance(it, CorruptionError)]
            table = table.filter(pa.array([not isinstance(it, CorruptionError) for it in read]))
        latents = [it for it in read if not isinstance(it, CorruptionError)]
        step, microstep = self.keys[:, begin].tolist()
        return Batch(step, microstep, table, latents, damaged)


def _windows(sizes: list[int]) -> list[range]:
    """Consecutive batches that are read together: one, or as many as WINDOW_BYTES hold."""
    windows: list[range] = []
    room = 0
    for number, size in enumerate(sizes):
        if windows and size <= room:
            windows[-1] = range(windows[-1].start, number + 1)
        else:
            windows.append(range(number, number + 1))
            room = WINDOW_BYTES
        room -= size
    return windows


def _read_ahead(directory: Directory, schedule: _Schedule) -> Iterator[Batch]:
    wanted = [schedule.spans[schedule.rows_of(window)] for window in schedule.windows]
    buffers = [memory(max(spans.total for spans in wanted)) for _ in wanted[:RING]]
    # Large ones two at a time: while the disk works for one, the other is judged. Small ones would fight for the interpreter.
    side_by_side = RING - 1 if schedule.spans.total >= len(schedule.spans) * LARGE_BYTES else 1
    with ThreadPoolExecutor(side_by_side, "opgrpo-stream") as pool:

        def start(number: int) -> Future[list[Read]]:
            return pool.submit(read_many, directory, wanted[number], buffers[number % RING], 1)

        started = deque(start(number) for number in range(len(buffers)))
        try:
            for number, window in enumerate(schedule.windows):
                read, first = started.popleft().result(), schedule.edges[window.start]
                for batch in window:
                    yield schedule.batch(batch, read[schedule.edges[batch] - first : schedule.edges[batch + 1] - first])
                if number + RING < len(wanted):
                    started.append(start(number + RING))
        finally:
            for future in started:
                future.cancel()
