"""What is killed: the writer of shards, the publisher of tables and documents, import, migration."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

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
from opgrpo_data.exchange.importing import import_dataset
from opgrpo_data.schema import SCHEMA_VERSION
from opgrpo_data.store import TABLES, Store, iteration_folder
from opgrpo_data.upkeep.migrate import migrate
from opgrpo_data.upkeep.verify import verify

SHARDS = 6
ROUNDS = 3
LARGE = (8, 64, 64)
"""A shard of these takes long enough to write for a kill to fall into."""


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
    """Tables that are missing at the end, and what disagrees only here."""
    source = Store.open(str(imported_template()))
    wanted = [path for kind in TABLES for path in source.files(kind)]
    lacking = [f"{path} was not imported" for path in wanted if not store.directory.exists(path)]
    told, theirs = ({(it.path, it.problem) for it in verify(each, deep=False).findings} for each in (store, source))
    return lacking + [f"{path}: {problem}, which is not so in the source" for path, problem in told - theirs]


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
