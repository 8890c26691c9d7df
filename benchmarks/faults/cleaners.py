"""What is killed: the collector of garbage, and the compactor of indexes."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import pyarrow as pa

from benchmarks.faults.content import (
    MEMBERS,
    RUN,
    add_documents,
    add_iteration,
    add_shard,
    shard_index,
    table,
    trajectory_id,
    wrong_bytes,
)
from benchmarks.faults.kills import Log, Victim
from benchmarks.faults.victims import linked, template
from opgrpo_data.pieces import MANY_FILES, read_pieces
from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.store import Store, index_of, iteration_folder
from opgrpo_data.upkeep.compaction import compact
from opgrpo_data.upkeep.garbage import collect

HOUR = timedelta(hours=1)
KEEP = 2
"""Iterations that the collector keeps; the store that it works on has ITERATIONS."""
ITERATIONS = 5
KEPT_BY_BUFFER = (1, 0)
"""Iteration and shard of a trajectory that the last buffer still holds."""

# -- the collector -----------------------------------------------------------------------------------------------------


@cache
def collected_template() -> Path:
    """A run of ITERATIONS iterations, most of which nothing needs any more, and old leftovers of killed writers."""

    def fill(store: Store) -> None:
        add_documents(store)
        for iteration in range(ITERATIONS):
            add_iteration(store, iteration, 2, [trajectory_id(min(iteration, 1), 0, 0)])
        folder = Path(store.directory.path(iteration_folder("trajectories", RUN, 0)))
        for name in (f"{TEMPORARY_PREFIX}0123", "00009.beef.latents.tar", "00009.beef.media.tar"):
            (folder / name).write_bytes(bytes(10_000))
            os.utime(folder / name, (0, 0))

    return template(fill)


def needed_shards() -> set[str]:
    """Indexes that the collector must leave whole."""
    recent = {shard_index(iteration, shard) for iteration in range(ITERATIONS - KEEP, ITERATIONS) for shard in range(2)}
    return recent | {shard_index(*KEPT_BY_BUFFER)}


def drop(url: str, log: Log) -> None:
    """Collect."""
    collect(Store.open(url), delete=True, grace=HOUR, keep_iterations=KEEP)
    log("store.json")


def check_collected(store: Store) -> list[str]:
    """Needed trajectories that are lost, and others that are neither whole nor dropped."""
    dropped = store.dropped_shards()
    there = [index for index in store.files("trajectories") if index not in dropped or index in needed_shards()]
    found = [f"{index} is needed and was dropped" for index in sorted(needed_shards() & dropped)]
    return [*found, *wrong_bytes(store, there)]


def all_collected(store: Store) -> list[str]:
    """What is left at the end though nothing needs it, or gone though it is needed."""
    tars = [entry.path for entry in store.directory.entries() if entry.path.endswith(".tar") or TEMPORARY_PREFIX in entry.path]
    left = [path for path in tars if path.startswith("trajectories/") and index_of(path) not in needed_shards()]
    wanted = set(store.files("trajectories")) - needed_shards()
    dropped = store.dropped_shards()
    return [f"{path} is left over" for path in left] + ([f"dropped {dropped}, not {wanted}"] if dropped != wanted else [])


COLLECTOR = Victim("collector", partial(linked, collected_template), drop, check_collected, all_collected)


# -- the compactor -----------------------------------------------------------------------------------------------------


@cache
def compacted_template() -> Path:
    """So many small indexes that compacting them is worth while."""

    def fill(store: Store) -> None:
        add_documents(store)
        for shard in range(MANY_FILES):
            add_shard(store, 0, shard, shape=(1, 2, 2))
            names = [trajectory_id(0, shard, member) for member in range(MEMBERS)]
            path = f"{iteration_folder('rewards/reward=taste', RUN, 0)}/{shard:05d}.v1.000.parquet"
            store.publish_table(path, table("rewards", 0, names))

    return template(fill)


def merge(url: str, log: Log) -> None:
    """Compact."""
    for done in compact(Store.open(url))["compacted"]:
        log(done["generation"])


def _rows(store: Store) -> list[pa.Table]:
    """What is read through generations, where there are some."""
    return [pa.concat_tables(rows for _, rows in read_pieces(store, kind)) for kind in ("trajectories", "rewards")]


@cache
def _rows_before() -> list[pa.Table]:
    return _rows(Store.open(str(compacted_template())))


def check_compacted(store: Store) -> list[str]:
    """Whether readers see the rows that they saw before."""
    return [] if _rows(store) == _rows_before() else ["readers see other rows than before"]


def all_compacted(store: Store) -> list[str]:
    """Kinds that are not compacted at the end."""
    done = {path.split("/")[1] for path in store.directory.list("catalog/*/gen-*.json")}
    return [] if done == {"trajectories", "rewards"} else [f"compacted are {done}"]


COMPACTOR = Victim("compactor", partial(linked, compacted_template), merge, check_compacted, all_compacted)
