"""Work in an order that must never be: what the trials of `benchmarks.faults.kills` must catch, or they prove nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

from benchmarks.faults import cleaners, victims
from benchmarks.faults.content import SHAPE, add_shard, shard_index, table
from benchmarks.faults.kills import Log, Victim
from benchmarks.faults.victims import linked
from opgrpo_data.io import Directory
from opgrpo_data.store import Store
from opgrpo_data.upkeep.compaction import compact
from opgrpo_data.upkeep.garbage import collect


def index_first(store: Store, iteration: int, shard: int, *, writer: int = 0, shape: Sequence[int] = SHAPE) -> bool:
    """What add_shard does, with the commit before the data."""
    memory = Store.create("memory://index-first")
    add_shard(memory, iteration, shard, writer=writer, shape=shape)
    index = shard_index(iteration, shard)
    for path in sorted(memory.directory.list(f"{index.removesuffix('.parquet')}.*"), key=lambda path: path != index):
        store.directory.publish(path, memory.directory.read(path))
    return True


class InPlace(Directory):
    """A directory that writes files under their names from the first byte on."""

    def publish(self, relative: str, data: bytes) -> bool:
        """Half of it, then the rest: as any `open(path, "wb")` may."""
        path = Path(self.path(relative))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                file.write(part)
                file.flush()
                os.fsync(file.fileno())
        return True


def in_place(store: Store) -> Store:
    """The same store, written in place."""
    return Store(InPlace(store.directory.url))


def drop_tars_first(url: str, log: Log) -> None:
    """A collector that removes tars and says so afterwards."""
    store = Store.open(url)
    unneeded = sorted(set(store.files("trajectories")) - cleaners.needed_shards() - store.dropped_shards())
    for index in unneeded:
        _remove_tars(store, index)
    collect(store, delete=True, grace=cleaners.HOUR)
    for index in unneeded:
        _announce(store, index)
    log("store.json")


def drop_without_marks(url: str, log: Log) -> None:
    """A collector that looks at iterations alone: what the last buffer still needs goes too."""
    store = Store.open(url)
    for iteration in range(cleaners.ITERATIONS - cleaners.KEEP):
        for index in store.files("trajectories", iteration=iteration):
            _announce(store, index)
            _remove_tars(store, index)
    collect(store, delete=True, grace=cleaners.HOUR)
    log("store.json")


def _remove_tars(store: Store, index: str) -> None:
    for path in store.directory.list(f"{index.removesuffix('.parquet')}.*.tar"):
        store.directory.remove(path)


def _announce(store: Store, index: str) -> None:
    store.publish_table(f"dropped/{index.removeprefix('trajectories/')}", table("dropped", 0))


@cache
def merged_template() -> Path:
    """The store that is to be compacted, when it was."""
    folder = Path(mkdtemp(prefix="faults-")) / "store"
    cleaners.COMPACTOR.prepare(str(folder))
    compact(Store.open(str(folder)))
    return folder


def compact_beside(url: str) -> None:
    """The store that is to be compacted, and beside it one that was."""
    cleaners.COMPACTOR.prepare(url)
    linked(merged_template, f"{url}-compacted")


def json_first(url: str, log: Log) -> None:
    """A compactor whose JSON comes before its Parquet file."""
    store, compacted = Store.open(url), Store.open(f"{url}-compacted")
    for generation in compacted.directory.list("catalog/*/gen-*.json"):
        [parquet] = compacted.directory.list(f"{generation.removesuffix('.json')}.*.parquet")
        for path in (generation, parquet):
            store.directory.publish(path, compacted.directory.read(path))
        log(parquet)


def _instead(victim: Victim, work: Callable[[str, Log], None]) -> Victim:
    return replace(victim, name=f"broken {victim.name}", work=work)


WRITER = _instead(victims.WRITER, partial(victims.write_shards, add=index_first))
PUBLISHER = _instead(victims.PUBLISHER, partial(victims.publish, change=in_place))
HASTY_COLLECTOR = _instead(cleaners.COLLECTOR, drop_tars_first)
BLIND_COLLECTOR = _instead(cleaners.COLLECTOR, drop_without_marks)
COMPACTOR = replace(_instead(cleaners.COMPACTOR, json_first), prepare=compact_beside)
