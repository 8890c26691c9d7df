"""What is killed: the writer of shards, the publisher of tables and documents, the compactor, the collector, import, migration."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

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
    weights,
    wrong_bytes,
)
from benchmarks.faults.kills import Log, Victim
from opgrpo_data.compaction import compact
from opgrpo_data.exchange.importing import import_dataset
from opgrpo_data.files import TEMPORARY_PREFIX
from opgrpo_data.garbage import collect
from opgrpo_data.migrate import migrate
from opgrpo_data.pieces import MANY_FILES, read_pieces
from opgrpo_data.schema import SCHEMA_VERSION
from opgrpo_data.store import TABLES, Store, index_of, iteration_folder

SHARDS = 6
ROUNDS = 3
LARGE = (8, 64, 64)
"""A shard of these takes long enough to write for a kill to fall into."""

HOUR = timedelta(hours=1)
KEEP = 2
"""Iterations that the collector keeps; the store that it works on has ITERATIONS."""
ITERATIONS = 5
KEPT_BY_BUFFER = (1, 0)
"""Iteration and shard of a trajectory that the last buffer still holds."""


def linked(template: Callable[[], Path], url: str) -> None:
    """A copy of a store on the disk, whose published files never change, by hard links."""
    shutil.copytree(template(), url, copy_function=os.link)


def template(fill: Callable[[Store], None]) -> Path:
    """A store that is made once and copied for each trial."""
    folder = Path(mkdtemp(prefix="faults-")) / "store"
    fill(Store.create(str(folder)))
    return folder


# -- shards ----------------------------------------------------------------------------------------------------------


def create(url: str) -> None:
    """An empty store."""
    Store.create(url)


def write_shards(url: str, log: Log, add: Callable[..., bool] = add_shard) -> None:
    """Commit SHARDS shards, as a rollout does: those that are there already are passed over."""
    store = Store.open(url)
    for shard in range(SHARDS):
        index = shard_index(0, shard)
        if not store.directory.exists(index):
            add(store, 0, shard, shape=LARGE)
            log(index)


def check_shards(store: Store) -> list[str]:
    """Wrong bytes of what is committed."""
    return list(wrong_bytes(store, store.files("trajectories"), shape=LARGE))


def all_shards(store: Store) -> list[str]:
    """Shards that are missing at the end."""
    missing = {shard_index(0, shard) for shard in range(SHARDS)} - set(store.files("trajectories"))
    return [f"{len(missing)} shards are missing"] if missing else []


WRITER = Victim("writer", create, write_shards, check_shards, all_shards)


# -- tables and documents ----------------------------------------------------------------------------------------------


@cache
def published_template() -> Path:
    """A run with one shard, for tables to speak of."""

    def fill(store: Store) -> None:
        add_documents(store)
        add_shard(store, 0, 0)

    return template(fill)


def publications(store: Store) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Paths of tables and documents, and what publishes each."""
    located = store.read_tables("trajectories", [shard_index(0, 0)])
    names = [trajectory_id(0, 0, member) for member in range(MEMBERS)]
    for number in range(1, ROUNDS + 1):
        for kind in ("buffers", "plans", "densities", "updates"):
            path = f"{iteration_folder(kind, RUN, number)}.parquet"
            yield path, partial(store.publish_table, path, table(kind, number, names * 20, located))
        path = f"{iteration_folder('rewards/reward=taste', RUN, number)}/00000.v1.000.parquet"
        yield path, partial(store.publish_table, path, table("rewards", number, names * 20))
        policy = f"average-{number}"
        document = {"kind": "average", "run_id": RUN, "iteration": number}
        yield f"policies/{policy}/policy.json", partial(store.add_policy, policy, document, weights(number))
        run = {"config": {"name": RUN, "seed": number}, "command": ["x" * 5000], "software": {}, "base_policy_id": "base"}
        yield f"runs/{RUN}-{number}.json", partial(store.add_run, f"{RUN}-{number}", run)


def publish(url: str, log: Log, change: Callable[[Store], Store] = lambda store: store) -> None:
    """Publish everything. change: into a store that does it otherwise."""
    store = change(Store.open(url))
    for path, commit in publications(store):
        if not store.directory.exists(path):
            commit()
            log(path)


@cache
def _published() -> dict[str, bytes]:
    """Tables and weights when everything is published, as bytes."""
    url = f"{published_template()}-whole"
    linked(published_template, url)
    publish(url, lambda _: None)
    store = Store.open(url)
    paths = [path for kind in TABLES for path in store.files(kind)]
    return {path: store.directory.read(path) for path in (*paths, *store.directory.list("policies/*/weights.safetensors"))}


def check_published(store: Store) -> list[str]:
    """Files that are not what was published."""
    there = ((path, expected) for path, expected in _published().items() if store.directory.exists(path))
    return [f"{path} is not what was published" for path, expected in there if store.directory.read(path) != expected]


def all_published(store: Store) -> list[str]:
    """What is missing at the end."""
    return [f"{path} is missing" for path, _ in publications(store) if not store.directory.exists(path)]


PUBLISHER = Victim("publisher", partial(linked, published_template), publish, check_published, all_published)


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


# -- import and migration ------------------------------------------------------------------------------------------------


@cache
def imported_template() -> Path:
    """A small store to take over."""

    def fill(store: Store) -> None:
        add_documents(store)
        for iteration in range(2):
            add_iteration(store, iteration, 1, [trajectory_id(0, 0, 0)])

    return template(fill)


def import_all(url: str, log: Log) -> None:
    """Take over another store."""
    import_dataset(str(imported_template()), url, merge=True)
    log("store.json")


def check_imported(store: Store) -> list[str]:
    """Wrong bytes of what is committed."""
    return list(wrong_bytes(store, store.files("trajectories")))


def all_imported(store: Store) -> list[str]:
    """Tables that are missing at the end."""
    source = Store.open(str(imported_template()))
    wanted = [path for kind in TABLES for path in source.files(kind)]
    return [f"{path} was not imported" for path in wanted if not store.directory.exists(path)]


IMPORTER = Victim("importer", create, import_all, check_imported, all_imported)


def raise_version(url: str, log: Log) -> None:
    """Migrate."""
    migrate(url)
    log("store.json")


def old_store(released: Path, url: str) -> None:
    """A copy of a store of an older version."""
    shutil.copytree(released, url)


def same_rows(released: Path, store: Store) -> list[str]:
    """Indexes that do not say what they said before."""
    before = Store.open(str(released))
    paths = before.files("trajectories")
    return [] if store.read_tables("trajectories", paths).equals(before.read_tables("trajectories", paths)) else ["other rows"]


def is_current(store: Store) -> list[str]:
    """The version at the end."""
    return [] if store.version == SCHEMA_VERSION else [f"it has version {store.version}"]


def migrator(released: Path) -> Victim:
    """The migration of a released store."""
    return Victim("migrator", partial(old_store, released), raise_version, partial(same_rows, released), is_current)
