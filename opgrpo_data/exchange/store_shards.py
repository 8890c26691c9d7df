"""Trajectories of another store and their rewards: verified on the way, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

from opgrpo_data.catalog import Catalog
from opgrpo_data.checks import check_reward, check_row, checked_path
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.exchange import receive
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.receive import Held
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.schema import DROPPED, QUARANTINE, TRAJECTORIES, table_of
from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import Store, require_current

PAGE_ROWS = 10_000
"""Index rows in memory at a time, if no shard has more."""

Row = dict[str, Any]
Page = dict[str, list[Row]]
"""Index rows by the path of their index."""


def read_rows(source: Store, kind: str, path: str, check: Callable[[list[Row]], None], left_out: LeftOut) -> list[Row] | None:
    """The rows of a table; None, and counted, when it is damaged or not what a store holds."""
    try:
        rows: list[Row] = source.read_tables(kind, [checked_path(path)]).to_pylist()
        check(rows)
    except (ValueError, TypeError) as error:
        left_out.add(f"damaged files of {kind}", f"{path}: {' '.join(str(error).split())}")
        return None
    return rows


def pages(source: Store, left_out: LeftOut) -> Iterator[Page]:
    """The index rows of a store, PAGE_ROWS at a time. An index that cannot be read is left out."""
    page: Page = {}
    for index in source.files("trajectories"):
        rows = read_rows(source, "trajectories", index, _check_rows, left_out)
        if page and sum(map(len, page.values())) + len(rows or ()) > PAGE_ROWS:
            yield page
            page = {}
        if rows is not None:
            page[index] = rows
    if page:
        yield page


def conflicts(source: Store, store: Store) -> list[str]:
    """Trajectories that both stores have, with other bytes."""
    catalog = Catalog(store)
    found = []
    for page in pages(source, LeftOut()):
        rows = [row for rows in page.values() for row in rows]
        there = receive.held(catalog, {row["trajectory_id"] for row in rows})
        found += [row["trajectory_id"] for row in rows if (twin := there.get(row["trajectory_id"])) and not twin.same_as(row)]
    return found


class ShardImport:
    """Takes the trajectories that `store` lacks. counts: what was done. left_out: what was not, and why."""

    def __init__(self, source: Store, store: Store, counts: Counter[str], left_out: LeftOut) -> None:
        self.source = source
        self.store = store
        self.counts = counts
        self.left_out = left_out
        self._quarantined = {"source": source.quarantined(), "store": store.quarantined()}
        self._dropped = source.dropped_shards()
        if self._dropped:
            require_current(store, "an import of trajectories whose bytes were dropped")
        self._rewards: dict[str, list[str]] = {}
        for path in source.files("rewards"):
            self._rewards.setdefault("/".join(path.split("/")[2:4]), []).append(path)

    def run(self) -> None:
        """All shards of the source."""
        for page in pages(self.source, self.left_out):
            catalog = Catalog(self.store)
            rows = [row for rows in page.values() for row in rows]
            there = receive.held(catalog, {row["trajectory_id"] for row in rows})
            notes = receive.notes(catalog, {row["prompt_id"] for row in rows if row["prompt_id"] is not None})
            for index, members in page.items():
                self._shard(index, members, there, notes)

    def _shard(self, index: str, rows: list[Row], there: Mapping[str, Held], notes: Mapping[str, Row]) -> None:
        homes = {row["trajectory_id"]: there[row["trajectory_id"]].index for row in rows if row["trajectory_id"] in there}
        wanted = [row for row in rows if row["trajectory_id"] not in there]
        self.counts["already_there"] += len(homes)
        if index in self._dropped:
            homes |= self._take_dropped(index, wanted)
        else:
            homes |= self._take(index, wanted, notes)
        self._take_rewards(index, homes)

    def _take(self, index: str, wanted: list[Row], notes: Mapping[str, Row]) -> dict[str, str]:
        """Write those that can be read as a shard; returns where each is. Under the source's name where that is free, even if
        nothing is left: a run that goes on in the store must not draw the shard again."""
        folder, _, name = index.rpartition("/")
        shard = name.removesuffix(".parquet")
        taken: list[str] = []
        records = self._records(folder, wanted, notes, taken)
        if self.store.directory.exists(index):
            shard = receive.shard_name([row["trajectory_id"] for row in wanted], shard)
            if (first := next(records, None)) is None:
                return {}
            records = chain([first], records)
        if not write_shard(self.store.directory, folder, shard, records):
            return {}  # it is there from an earlier import that found the same bytes damaged, or a second one is under way
        self.counts["trajectories"] += len(taken)
        return dict.fromkeys(taken, f"{folder}/{shard}.parquet")

    def _records(self, folder: str, wanted: list[Row], notes: Mapping[str, Row], taken: list[str]) -> Iterator[Record]:
        sizes = {entry.path: entry.size for entry in self.source.directory.entries(folder)} if wanted else {}
        for row in wanted:
            name = row["trajectory_id"]
            if self._is_quarantined(name):
                continue
            try:
                _check_place(row, folder, sizes)
                location = LatentLocation.of(row)
                latents = read_latents(self.source.directory, location, 0, len(location.checksums) - 1)
                media = read_media(self.source.directory, row)
            except (CorruptionError, StoreError) as error:
                self.left_out.add("damaged", str(error))
                if isinstance(error, CorruptionError):
                    self.store.quarantine(name, error)  # for the buffers and plans that name it
                continue
            taken.append(name)
            yield Record(row, latents, media, row["media_format"], notes.get(row["prompt_id"], {}))

    def _is_quarantined(self, name: str) -> bool:
        """Whether it is in quarantine, here or there; there: from now on also here."""
        if name in self._quarantined["source"] - self._quarantined["store"]:
            path = f"quarantine/{name}.parquet"
            check = partial(_check_quarantine, name=name)
            if (rows := read_rows(self.source, "quarantine", path, check, self.left_out)) is not None:
                self.store.publish_table(path, table_of(rows, QUARANTINE))
        elif name not in self._quarantined["store"]:
            return False
        self.left_out.add("quarantined")
        return True

    def _take_dropped(self, index: str, wanted: list[Row]) -> dict[str, str]:
        """Index rows whose bytes are gone: lineage, densities and rewards remain. That they are gone is said first."""
        self.left_out.add("dropped", count=len(wanted))
        if not wanted or self.store.directory.exists(index):
            return {}
        dropped = index.replace("trajectories/", "dropped/", 1)
        rows = read_rows(self.source, "dropped", dropped, lambda rows: _check_dropped(rows, index), self.left_out)
        if rows is None:
            return {}
        self.store.publish_table(dropped, table_of(rows, DROPPED))
        self.store.publish_table(index, table_of(wanted, TRAJECTORIES))
        return {row["trajectory_id"]: index for row in wanted}

    def _take_rewards(self, index: str, homes: Mapping[str, str]) -> None:
        _, run, iteration, name = index.split("/")
        for path in self._rewards.get(f"{run}/{iteration}", ()):
            if homes and path.rpartition("/")[2].startswith(f"{name.removesuffix('.parquet')}.v"):
                check = partial(_check_rewards, reward=path.split("/")[1].removeprefix("reward="))
                rows = read_rows(self.source, "rewards", path, check, self.left_out)
                self.counts["rewards"] += receive.add_rewards(self.store, homes, rows or ())


def _check_rows(rows: list[Row]) -> None:
    for row in rows:
        check_row(row)
    if len({row["trajectory_id"] for row in rows}) < len(rows):
        raise ValueError("it names a trajectory twice")


def _check_rewards(rows: list[Row], reward: str) -> None:
    for row in rows:
        check_reward(row)
        if row["reward"] != reward:
            raise ValueError(f"it holds values of reward {row['reward']!r}")


def _check_quarantine(rows: list[Row], name: str) -> None:
    """That a table of the quarantine speaks of this trajectory and no other."""
    if [row["trajectory_id"] for row in rows] != [name]:
        raise ValueError(f"it should say that {name} is damaged, and nothing else")


def _check_dropped(rows: list[Row], index: str) -> None:
    """That a table of dropped shards speaks of this one and no other."""
    _, run, iteration, name = index.split("/")
    expected = (index, run.removeprefix("run="), int(iteration.removeprefix("iter=")), name.removesuffix(".parquet"))
    if [tuple(row[key] for key in ("index_file", "run_id", "iteration", "shard")) for row in rows] != [expected]:
        raise ValueError(f"it should say that {index} was dropped, and nothing else")


def _check_place(row: Row, folder: str, sizes: Mapping[str, int]) -> None:
    """Where a row says that its bytes lie. Raises StoreError when that is nowhere, CorruptionError when the file is shorter:
    no more bytes are asked for than there are."""
    name = row["trajectory_id"]
    for part, member, checksum in (
        ("latents", f"{name}.latents.npy", row["latents_crc32"][0]),
        ("media", f"{name}.{row['media_format']}", row["media_crc32"]),
    ):
        file, offset, length = (row[f"{part}_{what}"] for what in ("file", "offset", "length"))
        if file is None or file.rpartition("/")[0] != folder or offset is None or length is None or min(offset, length) < 0:
            raise StoreError(f"the index row of {name} says its {part} are {length} bytes at {offset} of {file!r}")
        if file not in sizes:
            raise CorruptionError(file, member, checksum, None, missing=True)
        if offset + length > sizes[file]:
            raise CorruptionError(file, member, checksum, None)
