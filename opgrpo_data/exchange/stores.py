"""Import of another store: everything that it knows and this one does not.

Each file is published whole or not at all, and what refers to another file comes after it: an import that is killed leaves a
store that is right, and the same command goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pyarrow as pa

from opgrpo_data.catalog import Catalog
from opgrpo_data.exchange import receive
from opgrpo_data.exchange.checks import check_prompts, checked_path, read_object
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.store_shards import ShardImport, conflicts
from opgrpo_data.schema import LOCATION, POLICIES, RUNS, table_of
from opgrpo_data.seal import sealed_json
from opgrpo_data.store import TABLES, Store
from opgrpo_data.tensors import check_bytes, read_header

COPIED_BYTES = 16 * 2**20
MAX_PICTURE_BYTES = 2**26
RELOCATED_ROWS = 20_000


def take(source: Store, store: Store) -> dict[str, Any]:
    """Import all of another store. Raises StoreError, and imports nothing, when an id has other bytes in the two."""
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
                check_bytes(self.source.directory, path, read_header(self.source.directory, path))
            except ValueError as error:
                self._leave("tensors", path, error)
                continue
            self._copy(path)

    def pictures(self, pattern: str) -> None:
        """Copy pictures for people."""
        for path in self._missing(pattern):
            if len(self.source.directory.read_range(path, 0, MAX_PICTURE_BYTES + 1)) > MAX_PICTURE_BYTES:
                self._leave("pictures", path, ValueError(f"more than {MAX_PICTURE_BYTES} bytes"))
            else:
                self._copy(path)

    def _copy(self, path: str) -> None:
        with self.store.directory.write_atomic(path) as file:
            position = 0
            while data := self.source.directory.read_range(path, position, COPIED_BYTES):
                file.write(data)
                position += len(data)
        self.counts["files"] += 1

    def documents(self, pattern: str) -> None:
        """Copy JSON documents of policies, runs or pins."""
        for path in self._missing(pattern):
            kind = path.split("/")[0]
            try:
                document = read_object(self.source.directory, path)
                _check_document(kind, path, document)
            except (ValueError, TypeError, LookupError, OverflowError, pa.ArrowException) as error:
                self._leave(kind, path, error)
                continue
            self.counts["files"] += self.store.directory.publish(path, sealed_json(document, indent=1))


def _check_document(kind: str, path: str, document: dict[str, Any]) -> None:
    """That a document is of whom its name says, and that SQL can show it: one bad document would close all views."""
    key = "policy_id" if kind == "policies" else "run_id"
    if document[key] != path.removeprefix(f"{kind}/").removesuffix(".json").removesuffix("/policy"):
        raise ValueError(f"it is of {document[key]!r}")
    created_at = datetime.fromisoformat(document["pinned_at" if kind == "pins" else "created_at"])
    if kind == "policies":
        row = {name: document.get(name) for name in POLICIES.names if name != "has_weights"}
        table_of([row | {"created_at": created_at}], POLICIES)
    elif kind == "runs":
        config = document["config"]
        row = {"run_id": document["run_id"], "name": config["name"], "seed": config["seed"], "created_at": created_at}
        if not isinstance(document["command"], list) or not isinstance(document["software"], dict):
            raise ValueError("it does not say by which command and software the run was made")
        table_of([row], RUNS)
