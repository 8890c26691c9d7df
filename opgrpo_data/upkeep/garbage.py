"""What a store can do without: leftovers of killed commands, and, if asked, bytes of trajectories that nothing needs any more.

Leftovers are told by their age, by the clock of the place where they lie: what is younger than the grace period may be under
way. Trajectories are told by marks (opgrpo_data.upkeep.marks). A shard that has none is dropped in an order that can be cut
short anywhere: its row in the table `dropped` first, so that nobody chooses it any more; then a second look at the marks; then
its tars go. Its index stays: lineage, densities and rewards remain to be asked for.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opgrpo_data.errors import StoreError
from opgrpo_data.generations import documents, read_generation
from opgrpo_data.places.files import TEMPORARY_PREFIX, Entry
from opgrpo_data.schema import DROPPED, table_of
from opgrpo_data.store import TABLES, Store, index_of, now, require_current
from opgrpo_data.upkeep.compaction import superseded_generations
from opgrpo_data.upkeep.marks import mark

OURS = {kind.pattern.partition("/")[0] for kind in TABLES.values()} | {
    *("runs", "policies", "conditions", "states", "catalog", "pins", "migrations")
}
"""Top-level folders of a store: what lies in others is not ours to remove."""
TARS = (".latents.tar", ".media.tar")
HARD = 1
"""Iterations whose marks count where none were asked for: what runs are about to use."""


@dataclass(frozen=True)
class Item:
    """A file, or the tars of a shard, that can go. path: of a shard, its index. bytes: what that frees."""

    path: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Garbage:
    """What can go, or went if `deleted`. files: leftovers; shards: whose tars nothing needs."""

    deleted: bool
    bytes: int
    files: list[Item]
    shards: list[Item]


def collect(store: Store, *, delete: bool, grace: timedelta, keep_iterations: int | None = None) -> Garbage:
    """Find what the store can do without, and with `delete` remove it.

    grace: leftovers that are younger stay. keep_iterations: drop shards that no buffer, plan or pin, and none of so many last
    iterations of their run needs; None: drop none, but finish what an earlier call began. Raises StoreError when an index is
    damaged, whose tars would look like leftovers; and, with keep_iterations, in a store of an older format version.
    """
    if keep_iterations is not None:
        require_current(store, "dropping trajectories")
    entries, moment = _look(store)
    sizes = {entry.path: entry.size for entry in entries}
    # The tars were listed before the indexes: a shard that is committed meanwhile has its index read.
    shards = _Shards(store, sizes)
    old = [entry for entry in entries if moment - entry.modified >= grace]
    files = [*_leftovers(old, sizes, shards.named), *_superseded(store, old)]
    tars = {item.path for item in files if item.path.endswith(TARS)}
    _refuse_lost_indexes(store, {index_of(tar) for tar in tars} - sizes.keys())
    spoken_of = _read_by_tables(store) if tars else set()
    files = [item for item in files if item.path not in spoken_of]
    dropped = shards.drop(keep_iterations, delete)
    if delete:
        for item in files:
            store.directory.remove(item.path)
    return Garbage(delete, sum(item.bytes for item in (*files, *dropped)), files, dropped)


def _look(store: Store) -> tuple[list[Entry], datetime]:
    """All files, and what the clock of the place says: the time of a file written just now. This machine's may be wrong."""
    probe = f"{TEMPORARY_PREFIX}clock-{secrets.token_hex(8)}"
    try:
        with store.directory.write_atomic(probe):
            pass  # an empty file: a full disk has room for its name
        entries = store.directory.entries()
    finally:
        store.directory.remove(probe)
    [moment] = [entry.modified for entry in entries if entry.path == probe]
    return [entry for entry in entries if entry.path != probe], moment


def _leftovers(old: Sequence[Entry], sizes: dict[str, int], named: set[str]) -> Iterator[Item]:
    for entry in old:
        folder, _, name = entry.path.rpartition("/")
        if name.startswith(TEMPORARY_PREFIX) and entry.path.partition("/")[0] in OURS | {name}:
            yield Item(entry.path, entry.size, "unfinished file")
        elif entry.path.startswith("trajectories/") and name.endswith(TARS) and entry.path not in named:
            yield Item(entry.path, entry.size, "tar that no index names")
        elif folder.startswith("policies/") and name == "weights.safetensors" and f"{folder}/policy.json" not in sizes:
            yield Item(entry.path, entry.size, "weights of a policy that was never registered")


def _refuse_lost_indexes(store: Store, lost: set[str]) -> None:
    """Raise StoreError where tars that no index names belong to a shard that rewards, buffers, plans or a generation of the
    catalog still speak of: its index was lost, and until it is restored these tars are all that there is of it."""
    for index, path in _spoken_of(store) if lost else ():
        if index in lost:
            raise StoreError(
                f"{index} is gone, but {path} still speaks of its shard: nothing was removed. Restore the index from a copy, "
                f"or remove what speaks of it"
            )


def _read_by_tables(store: Store) -> set[str]:
    """Tars that buffers and plans read from, whatever the index of their shard names: one that was lost and imported again has
    other tars."""
    paths = ((kind, path) for kind in ("buffers", "plans") for path in store.files(kind))
    return {file for kind, path in paths for file in store.read_tables(kind, [path])["latents_file"].unique().to_pylist()}


def _spoken_of(store: Store) -> Iterator[tuple[str, str]]:
    """Index files of shards, whether they are there or not, and what speaks of them."""
    for kind in ("buffers", "plans"):
        for path in store.files(kind):
            files = store.read_tables(kind, [path])["latents_file"].unique().to_pylist()
            yield from ((index_of(file), path) for file in files)
    for path in store.files("rewards"):
        shard = path.partition("/")[2].partition("/")[2].partition(".v")[0]
        yield f"trajectories/{shard}.parquet", path
    for path in documents(store, "trajectories"):
        try:
            files = read_generation(store.directory, path).files
        except (ValueError, FileNotFoundError) as error:
            raise StoreError(
                f"{path} {error}: it may speak of shards whose index is gone, and nothing was removed. Restore it from a copy, "
                f"or remove it"
            ) from error
        yield from ((file, path) for file in files)


def _superseded(store: Store, old: Sequence[Entry]) -> Iterator[Item]:
    """Older generations of the catalog: a JSON before its Parquet file, and neither without the other's being old."""
    sizes = {entry.path: entry.size for entry in old}
    young = set()
    for path in superseded_generations(store):
        generation = path.partition(".")[0]
        if path not in sizes:
            young.add(generation)
        elif generation not in young:
            yield Item(path, sizes[path], "generation of the catalog that nobody reads any more")


class _Shards:
    """The shards of a store: which tars they name, and which of them can be dropped."""

    def __init__(self, store: Store, sizes: dict[str, int]) -> None:
        self.store = store
        self.tars: dict[str, list[str]] = {}
        self.ids: dict[str, pa.ChunkedArray] = {}
        for index in store.files("trajectories"):
            table = store.read_tables("trajectories", [index])
            named = {file for kind in ("latents", "media") for file in table[f"{kind}_file"].unique().to_pylist()}
            if odd := [file for file in named if not file or index_of(file) != index]:
                raise StoreError(f"{index} names {str(odd[0])[:200]}, a file of another shard: run `opgrpo verify`")
            self.tars[index] = sorted(named)
            self.ids[index] = table["trajectory_id"]
        self.named = {file for tars in self.tars.values() for file in tars}
        self.sizes = {file: sizes.get(file) for file in self.named}

    def drop(self, keep_iterations: int | None, delete: bool) -> list[Item]:
        """Drop what has no mark, and what was being dropped when an earlier call ended."""
        before = self.store.dropped_shards()
        pending = [index for index in self.tars if index in before and self._held(index)]
        fresh = [index for index in self.tars if index not in before] if keep_iterations is not None else []
        if not pending and not fresh:
            return []
        keep = keep_iterations or HARD
        needed = self._needed(keep)
        items = [self._item(index, keep) for index in (*pending, *fresh) if index not in needed]
        if delete:
            for item in items:
                self._announce(item)
            needed = self._needed(keep)  # what was chosen by someone before it was announced
            for index in {*pending, *(item.path for item in items)}:
                self._finish(index, index in needed)
        return [item for item in items if item.path not in needed]

    def _item(self, index: str, keep: int) -> Item:
        return Item(index, self._held(index), f"not needed by the last {keep} iterations of any run")

    def _announce(self, item: Item) -> None:
        _, run, iteration, shard = item.path.removesuffix(".parquet").split("/")
        row = {
            "index_file": item.path,
            "run_id": run.removeprefix("run="),
            "iteration": int(iteration.removeprefix("iter=")),
            "shard": shard,
            "trajectories": len(self.ids[item.path]),
            "bytes": item.bytes,
            "reason": item.reason,
            "dropped_at": now(),
        }
        self.store.publish_table(_dropped_path(item.path), table_of([row], DROPPED))

    def _finish(self, index: str, needed: bool) -> None:
        """Remove the tars; or, where they are needed after all and still there, take the announcement back."""
        if needed and all(self.store.directory.exists(file) for file in self.tars[index]):
            self.store.directory.remove(_dropped_path(index))
            return
        for file in self.tars[index]:
            self.store.directory.remove(file)

    def _held(self, index: str) -> int:
        """Bytes of the tars that are there."""
        return sum(self.sizes[file] or 0 for file in self.tars[index])

    def _needed(self, keep: int) -> set[str]:
        """Shards that must stay: marked themselves, or with a marked trajectory."""
        marks = mark(self.store, keep)
        marked = pa.array(sorted(marks.trajectories), pa.string())
        lengths = [len(ids) for ids in self.ids.values()]
        ids = pa.chunked_array([chunk for array in self.ids.values() for chunk in array.chunks], pa.string())
        which = np.repeat(np.arange(len(lengths)), lengths)[pc.is_in(ids, marked).to_numpy()]
        indexes = list(self.ids)
        return marks.shards | {indexes[number] for number in np.unique(which)}


def _dropped_path(index: str) -> str:
    return f"dropped/{index.removeprefix('trajectories/')}"
