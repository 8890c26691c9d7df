"""Import of another store: everything that it knows and this one does not.

Each file is published whole or not at all, and what refers to another file comes after it: an import that is killed leaves a
store that is right, and the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from opgrpo_data.catalog import Catalog
from opgrpo_data.checks import check_prompts, checked_path, read_object
from opgrpo_data.documents import document_problem
from opgrpo_data.exchange import receive
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.store_shards import ShardImport, conflicts
from opgrpo_data.io import Directory
from opgrpo_data.schema import LOCATION, table_of
from opgrpo_data.seal import sealed_json
from opgrpo_data.store import TABLES, Store
from opgrpo_data.tensors import check_bytes, read_header

MAX_PICTURE_BYTES = 2**26
RELOCATED_ROWS = 20_000


def take(source: Store, store: Store) -> dict[str, Any]:
    """Import all of another store; returns what was done, and what was left out.

    Raises StoreError when an id has other bytes in the two, or when `source` has dropped shards and `store` an older format;
    of the trajectories none is imported then.
    """
    receive.refuse(conflicts(source, store), store, source.directory.url, "Nothing was imported")
    counts: Counter[str] = Counter(dict.fromkeys(("trajectories", "already_there", "rewards", "files"), 0))
    left_out = LeftOut()
    rest = _Rest(source, store, counts, left_out)
    rest.tables("prompts")
    rest.tensors("conditions/*/*.safetensors")
    rest.tensors("policies/*/weights.safetensors")
    rest.documents("policies/*/policy.json")
    ShardImport(source, store, counts, left_out).run()
    for kind in ("densities", "evals"):
        rest.tables(kind)
    for kind in ("buffers", "plans"):
        rest.located_tables(kind)
    rest.tensors("states/*/*/*.safetensors")
    rest.tables("updates")
    rest.pictures("runs/*/*.png")
    rest.documents("pins/*.json")
    rest.documents("runs/*.json")
    return {**counts, "left_out": dict(left_out.counts), "left_out_because": left_out.messages}


class _Rest:
    """Files besides trajectories and rewards. What the store has under the same name stays."""

    def __init__(self, source: Store, store: Store, counts: Counter[str], left_out: LeftOut) -> None:
        self.source = source
        self.store = store
        self.counts = counts
        self.left_out = left_out
        self._witness = _Witness(source.directory.url)

    def _missing(self, pattern: str) -> Iterator[str]:
        """Paths that the source has and the store lacks."""
        for path in self.source.directory.list(pattern):
            if not self.store.directory.exists(checked_path(path)):
                yield path

    def tables(self, kind: str) -> None:
        """Copy the tables of a kind."""
        for path in self._missing(TABLES[kind].pattern):
            if (table := self._read(kind, path)) is not None:
                self._publish(path, table)

    def located_tables(self, kind: str) -> None:
        """The same for tables that say where the bytes of trajectories lie: here they lie elsewhere."""
        waiting: dict[str, pa.Table] = {}
        for path in self._missing(TABLES[kind].pattern):
            if (table := self._read(kind, path)) is not None:
                waiting[path] = table
            if sum(table.num_rows for table in waiting.values()) >= RELOCATED_ROWS:
                self._relocate(waiting)
                waiting = {}
        self._relocate(waiting)

    def _relocate(self, tables: dict[str, pa.Table]) -> None:
        names = {name for table in tables.values() for name in table["trajectory_id"].to_pylist()}
        there = receive.held(Catalog(self.store), names) if names else {}
        for path, table in tables.items():
            rows = [
                row | {name: there[row["trajectory_id"]].row[name] for name in LOCATION.names}
                if row["trajectory_id"] in there
                else row
                for row in table.to_pylist()
            ]
            self._publish(path, table_of(rows, table.schema))

    def _read(self, kind: str, path: str) -> pa.Table | None:
        try:
            table = self.source.read_tables(kind, [path])
            if kind == "prompts":
                check_prompts(table.to_pylist(), path)
        except ValueError as error:
            self._leave(kind, path, error)
            return None
        return table

    def _leave(self, kind: str, path: str, error: Exception) -> None:
        self.left_out.add(f"damaged files of {kind}", f"{path}: {' '.join(str(error).split())}")

    def _publish(self, path: str, table: pa.Table) -> None:
        self.counts["files"] += self.store.publish_table(path, table)

    def tensors(self, pattern: str) -> None:
        """Copy safetensors files whose bytes are what their checksums say."""
        for path in self._missing(pattern):
            try:
                check_bytes(self._witness, path, read_header(self._witness, path))
                with self.store.directory.write_atomic(path) as file:
                    for data in self._witness.again(path):
                        file.write(data)
            except ValueError as error:
                self._leave("tensors", path, error)
                continue
            self.counts["files"] += 1

    def pictures(self, pattern: str) -> None:
        """Copy pictures for people."""
        for path in self._missing(pattern):
            data = self.source.directory.read_range(path, 0, MAX_PICTURE_BYTES + 1)
            if len(data) > MAX_PICTURE_BYTES:
                self._leave("pictures", path, ValueError(f"more than {MAX_PICTURE_BYTES} bytes"))
                continue
            with self.store.directory.write_atomic(path) as file:
                file.write(data)
            self.counts["files"] += 1

    def documents(self, pattern: str) -> None:
        """Copy JSON documents of policies, runs or pins."""
        for path in self._missing(pattern):
            kind = path.split("/")[0]
            try:
                document = read_object(self.source.directory, path)
                if problem := document_problem(path, document):
                    raise ValueError(problem)
            except ValueError as error:
                self._leave(kind, path, error)
                continue
            self.counts["files"] += self.store.directory.publish(path, sealed_json(document, indent=1))


class _Witness(Directory):
    """A directory that remembers what it gave of a file: what was checked can be read again, and be known for the same."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._given: defaultdict[str, dict[tuple[int, int], bytes]] = defaultdict(dict)

    def read_range(self, relative: str, offset: int, length: int) -> bytes:
        """See Directory."""
        data = super().read_range(relative, offset, length)
        self._given[relative][offset, length] = _digest(data)
        return data

    def again(self, path: str) -> Iterator[bytes]:
        """What was given of a file, in the order of the file. Raises ValueError where the file is another by now."""
        for (offset, length), digest in sorted(self._given.pop(path).items()):
            data = super().read_range(path, offset, length)
            if _digest(data) != digest:
                raise ValueError("it changed while it was copied")
            yield data


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
