"""Writing: shards with checksums and full commit, against the same bytes written and synced without either."""

from __future__ import annotations

import gc
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.store.data import SD3, SMALL, Size, records
from benchmarks.store.machine import Measure, measured
from opgrpo_data.io import Directory
from opgrpo_data.shards import Record, write_shard

BUFFER_BYTES = 256 * 1024
COMMITTED_BYTES = 8 * 1024 * 1024
"""Size of the shard whose commit is timed: FINDINGS' own."""

RAW = "a 256-KiB buffered write + fsync of the same bytes"


@dataclass(frozen=True)
class Timings:
    """Seconds of each repeat: of writing a shard, and of its bytes alone; how many bytes and trajectories it has."""

    shard: list[float]
    raw: list[float]
    size: int
    count: int

    @property
    def ratios(self) -> list[float]:
        """Speed of the shard as a part of the raw speed."""
        return [raw / shard for raw, shard in zip(self.raw, self.shard, strict=True)]

    def told(self) -> str:
        """The absolute numbers."""
        ours, raw = median(self.shard), median(self.raw)
        speeds = [f"{seconds * 1e3:,.1f} ms ({self.size / seconds / 1e6:,.0f} MB/s)" for seconds in (ours, raw)]
        return f"{self.count} trajectories in {speeds[0]}, {self.count / ours:,.0f}/s; raw {speeds[1]}"


def measure(work: Path, quick: bool) -> dict[str, Measure]:
    """write_sd3: ratio of speeds. write_small_per_s: trajectories a second. commit_ms: of a shard of COMMITTED_BYTES."""
    repeats = 2 if quick else 9
    sd3 = _timed(work, SD3, 4 if quick else 64, repeats)
    small = _timed(work, SMALL, 50 if quick else 1000, repeats)
    commit = _timed(work, SD3, max(1, COMMITTED_BYTES // SD3.latent_bytes), repeats)
    overheads = [(shard - raw) * 1e3 for shard, raw in zip(commit.shard, commit.raw, strict=True)]
    rates = [small.count / seconds for seconds in small.shard]
    return {
        "write_sd3": measured(sd3.ratios, ">=", 0.6, f"of {RAW}", sd3.told()),
        "write_small_per_s": measured(
            rates, ">=", 5000, "trajectories a second", f"{median(small.ratios):.2f} of raw; {small.told()}"
        ),
        "commit_ms": measured(overheads, "<=", 25, "ms of a shard over its bytes + fsync", commit.told()),
    }


def _timed(work: Path, size: Size, count: int, repeats: int) -> Timings:
    """Both by turns, each into new files, after one of each that does not count."""
    written = list(records(size, count))
    directory = Directory(str(work))
    shards, raws = [], []
    for repeat in range(repeats + 1):
        gc.collect()
        raws.append(_raw(work / "raw", written))
        began = time.perf_counter()
        write_shard(directory, f"trajectories/{repeat}", "00000", written)
        shards.append(time.perf_counter() - began)
        shutil.rmtree(work / "trajectories")
    return Timings(shards[1:], raws[1:], sum(record.latents.nbytes + len(record.media) for record in written), count)


def _raw(path: Path, written: list[Record]) -> float:
    began = time.perf_counter()
    with path.open("xb", buffering=BUFFER_BYTES) as file:
        for record in written:
            file.write(record.latents.data)
            file.write(record.media)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds
