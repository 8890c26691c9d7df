"""Reading from afar: 64 scattered trajectories at once, against one ranged read after the other; each request takes 20 ms.

The server is SeaweedFS on this machine, behind a proxy that holds every request back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import fsspec
import numpy as np
import pyarrow as pa

from benchmarks.store.data import SD3, SMALL, STEPS, Size, records
from benchmarks.store.machine import Measure, measured
from benchmarks.store.server import seaweedfs
from opgrpo_data.io import Directory
from opgrpo_data.locations import Locations, Spans
from opgrpo_data.reading import memory, read_many
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder

LATENCY = 0.02
BATCH = 64
BUCKET = "benchmark"


def measure(work: Path, quick: bool) -> dict[str, Measure]:
    """remote_sd3, remote_small: speed of a verified batch over that of serial ranged reads."""
    with seaweedfs(work / "server") as server, _proxy(server.port) as port:
        shards, repeats = (4, 2) if quick else (64, 5)
        with _environment(server.environment()):
            fsspec.filesystem("s3").mkdir(BUCKET)
            tables = {size: _written(size, shards, 2 if size is SD3 else 32) for size in (SD3, SMALL)}
        with _environment(server.environment(port)):
            return {
                f"remote_{size.name}": _measure(size, table, 4 if quick else BATCH, repeats, bound)
                for (size, table), bound in zip(tables.items(), (7, 15), strict=True)
            }


def _written(size: Size, shards: int, count: int) -> pa.Table:
    """A store of some shards, without the proxy; returns its index."""
    store = Store.create(f"s3://{BUCKET}/{size.name}")
    folder = iteration_folder("trajectories", "benchmark", 0)
    for shard in range(shards):
        write_shard(store.directory, folder, f"{shard:05d}", records(size, count, shard=shard))
    return store.read_tables("trajectories", store.files("trajectories"))


def _measure(size: Size, table: pa.Table, batch: int, repeats: int, bound: float) -> Measure:
    directory = Directory(f"s3://{BUCKET}/{size.name}")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    place = memory(batch * size.latent_bytes)
    rng = np.random.default_rng(0)
    ours, serial = [], []
    for _ in range(repeats + 1):
        rows = table.take(rng.choice(table.num_rows, batch, replace=False))
        spans = Spans.of(Locations.of(rows), np.zeros(batch, np.int64), np.full(batch, STEPS))
        ranges = [(f"{directory.root}/{it.file}", it.offset, it.offset + it.length) for it in spans.ranges()]
        began = time.perf_counter()
        read = read_many(directory, spans, place)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        found = [filesystem.cat_file(file, start=start, end=end) for file, start, end in ranges]
        serial.append(time.perf_counter() - began)
        assert [isinstance(it, np.ndarray) and it.tobytes() for it in read] == found, "both must read the same"
    ratios = [slow / fast for slow, fast in zip(serial[1:], ours[1:], strict=True)]
    rates = [f"{batch / median(seconds[1:]):,.0f}/s" for seconds in (ours, serial)]
    told = f"{batch} trajectories at once {rates[0]}, one by one {rates[1]}, {LATENCY * 1e3:.0f} ms a request"
    return measured(ratios, ">=", bound, "x the speed of serial ranged reads", told)


@contextmanager
def _proxy(server: int) -> Iterator[int]:
    """A process of its own, so that it takes no turns with us; gives its port."""
    command = [sys.executable, "-m", "benchmarks.store.proxy", str(server), "--latency", str(LATENCY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block runs, and sessions that were opened with others forgotten."""
    before = {name: os.environ.get(name) for name in changes}
    sessions = fsspec.get_filesystem_class("s3")
    sessions.clear_instance_cache()
    os.environ.update(changes)
    try:
        yield
    finally:
        sessions.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
