"""Random replay: batches of buffer rows, their latents read from thousands of shards, against reads that verify nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.store import raw
from benchmarks.store.data import SD3, SMALL, STEPS, Size, records
from benchmarks.store.machine import Measure, measured
from opgrpo_data.errors import CorruptionError
from opgrpo_data.locations import Locations, Spans
from opgrpo_data.places.files import Range
from opgrpo_data.reading import memory, read_many
from opgrpo_data.schema import BUFFERS, conform
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder

BATCH = 64
DIRECT = f"of O_DIRECT reads at queue depth {raw.QUEUE}"
ONE_FILE = f"of preadv at queue depth {raw.QUEUE} from one file in memory"

Rows = list[dict[str, Any]]


def measure(work: Path, quick: bool) -> dict[str, Measure]:
    """random_cold_sd3, random_cold_small, random_warm_sd3: ratios of speeds, batches of BATCH whole trajectories."""
    repeats = 2 if quick else 7
    sd3 = _Filled(work / "sd3", SD3, shards=64 if quick else 1024, each=2)
    small = _Filled(work / "small", SMALL, shards=64 if quick else 2048, each=4)
    warm = sd3.warm(repeats, 1 if quick else 4, 0.65)  # first: what was just written is in memory, as after a rollout
    return {
        "random_cold_sd3": sd3.cold(repeats, 1 if quick else 5, 0.8),
        "random_cold_small": small.cold(repeats, 1 if quick else 16, 0.7),
        "random_warm_sd3": warm,
    }


class _Filled:
    """A store of many shards, and its trajectories as the rows of a replay buffer."""

    def __init__(self, place: Path, size: Size, *, shards: int, each: int) -> None:
        store = Store.create(str(place))
        made = records(size, shards * each)
        for shard in range(shards):
            write_shard(store.directory, iteration_folder("trajectories", "benchmark", 0), f"{shard:05d}", islice(made, each))
        table = store.read_tables("trajectories", store.files("trajectories"))
        self.rows: Rows = conform(table, BUFFERS).to_pylist()
        self.directory, self.size, self.shards = store.directory, size, shards
        self.tars = list(place.rglob("*.latents.tar"))
        self.rng = np.random.default_rng(0)
        self.into = memory(BATCH * (size.latent_bytes + 2 * raw.PAGE))
        self.into[:] = 0  # memory that was never touched is slow at first
        self.pages = raw.ordinary(len(self.into))

    def batches(self, count: int) -> list[Rows]:
        """Random batches without a trajectory twice."""
        chosen = self.rng.permutation(len(self.rows))[: count * BATCH].reshape(count, BATCH)
        return [[self.rows[i] for i in batch] for batch in chosen.tolist()]

    def read(self, batches: Sequence[Rows]) -> float:
        """Seconds of our reads."""
        began = time.perf_counter()
        for rows in batches:
            for read in read_many(self.directory, spans_of(rows), self.into):
                assert not isinstance(read, CorruptionError)
        return time.perf_counter() - began

    def cold(self, repeats: int, count: int, bound: float) -> Measure:
        """Both by turns, of other trajectories each, and nothing of the store in memory."""

        def limit(batches: Sequence[Rows]) -> float:
            return sum(raw.scattered(self.ranges(rows), self.pages, direct=True) for rows in batches)

        ours, limits = [], []
        for _ in range(repeats):
            batches = self.batches(2 * count)
            raw.drop(self.tars)
            ours.append(self.read(batches[:count]))
            raw.drop(self.tars)
            limits.append(limit(batches[count:]))
        return self.compared(ours, limits, count, bound, DIRECT)

    def warm(self, repeats: int, count: int, bound: float) -> Measure:
        """Both by turns. The limit reads as many bytes, from random places of one file, to the same memory."""
        batches = self.batches(count)
        one = Path(self.directory.root) / "one"
        with one.open("xb") as file:
            for rows in batches:
                file.write(self.into[: len(rows) * self.size.latent_bytes].data)
        places = self.rng.permutation(count * BATCH).reshape(count, BATCH) * self.size.latent_bytes
        ranges = [[Range(str(one), place, self.size.latent_bytes) for place in batch] for batch in places.tolist()]

        def limit() -> float:
            return sum(raw.scattered(batch, self.into, direct=False) for batch in ranges)

        self.read(batches), limit()  # from now on all is in memory
        times = [(self.read(batches), limit()) for _ in range(repeats)]
        return self.compared([ours for ours, _ in times], [limit for _, limit in times], count, bound, ONE_FILE)

    def ranges(self, rows: Rows) -> list[Range]:
        """Where the latents of rows lie, by full paths."""
        return [Range(self.directory.path(it.file), it.offset, it.length) for it in spans_of(rows).ranges()]

    def compared(self, ours: list[float], limits: list[float], count: int, bound: float, goal: str) -> Measure:
        """Ratios of speeds, and trajectories a second."""
        rates = [count * BATCH / median(seconds) for seconds in (ours, limits)]
        told = f"{rates[0]:,.0f} trajectories/s verified, limit {rates[1]:,.0f}/s; {self.shards:,} shards"
        ratios = [limit / seconds for seconds, limit in zip(ours, limits, strict=True)]
        return measured(ratios, ">=", bound, goal, told)


def spans_of(rows: Rows) -> Spans:
    """All latents of buffer rows."""
    return Spans.of(Locations.of_rows(rows), np.zeros(len(rows), np.int64), np.full(len(rows), STEPS, np.int64))
