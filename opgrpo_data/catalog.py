"""SQL over a store: DuckDB, in memory, over views of its Parquet files. Nothing here can change the store."""

from __future__ import annotations

import glob
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import count
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from opgrpo_data.buffer import QUERIES
from opgrpo_data.errors import StoreError
from opgrpo_data.generations import Generation, in_force, warn
from opgrpo_data.pieces import open_generation, read_files
from opgrpo_data.schema import POLICIES, RUNS, table_of
from opgrpo_data.seal import check_seal
from opgrpo_data.sql import check_query
from opgrpo_data.store import TABLES, Store

# Rows a reward could not judge live beside the others but must not count as rewards.
_VIEWS = {
    # A prompt that several imports hold is one prompt: joins must not multiply. Held out anywhere is held out.
    "prompts": "SELECT DISTINCT ON (prompt_id) * FROM {prompts} ORDER BY prompt_id, split",
    "trajectories": "SELECT * FROM {trajectories}",
    "rewards": "SELECT * FROM {rewards} WHERE error IS NULL",
    "reward_errors": "SELECT * FROM {rewards} WHERE error IS NOT NULL",
    "buffer": "SELECT * FROM {buffers}",
    "plans": "SELECT * FROM {plans}",
    "densities": "SELECT * FROM {densities}",
    "updates": "SELECT * FROM {updates}",
    "update_steps": QUERIES.joinpath("update_steps.sql").read_text(),
    "update_summary": QUERIES.joinpath("update_summary.sql").read_text(),
    "evals": "SELECT * FROM {evals}",
    "quarantine": "SELECT * FROM {quarantine}",
    "dropped": "SELECT * FROM {dropped}",
}


# How DuckDB tells that an Arrow source broke off; the name is ours.
_BROKEN = re.compile(r"reading the stream registered as 'merged_(\w+)' failed: (.*)", re.DOTALL)
_VERIFIED = ds.ParquetFileFormat(default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True))


class Catalog:
    """The views prompts, policies, runs, trajectories, rewards, reward_errors, buffer, plans, densities, updates, update_steps,
    update_summary, evals, quarantine, dropped.

    They show what was committed when the catalog was opened: generations (opgrpo_data.generations) and the index files
    outside them. Of an object store, only what a query needs is read: columns and row groups of generations, and the index
    files outside them one after the other; memory is bounded either way.

    The connection may read the store's indexes and nothing else: no other file, no network, no extension. allow_external: a
    query may read other files too, and the network where DuckDB's extension httpfs is installed. Either way no statement is
    run but a query, and nothing is written.
    """

    def __init__(self, store: Store, *, allow_external: bool = False) -> None:
        self._store = store
        self._allow_external = allow_external
        self._merged: dict[str, Generation] = {}
        self._open(set())

    def _open(self, broken: set[str]) -> None:
        """Make the views. broken: kinds whose generation is not to be used."""
        self.connection = duckdb.connect(":memory:")
        readable: list[str] = []
        sources = {name: self._source(name, name not in broken, readable) for name in TABLES}
        for view, query in _VIEWS.items():
            self._create_view(view, query.format(**sources))
        store = self._store
        kept = {path.split("/")[1] for path in store.directory.list("policies/*/weights.safetensors")}
        policies = [_policy(document, kept) for document in store.documents("policies/*/policy.json")]
        self.connection.register("policies", table_of(policies, POLICIES))
        self.connection.register("runs", table_of([_run(d) for d in store.documents("runs/*.json")], RUNS))
        self._lock(readable)

    def _create_view(self, view: str, query: str) -> None:
        try:
            self.connection.execute(f"CREATE VIEW {view} AS {query}")
        except duckdb.Error as error:
            for kind in TABLES:
                self._store.read_tables(kind, self._store.files(kind))  # names the damaged file, which DuckDB does not
            raise StoreError(f"view {view}: {' '.join(str(error).split())}") from error

    def _source(self, kind: str, merged: bool, readable: list[str]) -> str:
        """SQL for the rows of a table. Adds the files that DuckDB itself will read to `readable`."""
        generation, files = in_force(self._store, kind) if merged else (None, self._store.files(kind))
        loose = [path for path in files if generation is None or path not in generation.files]
        sources = [_no_rows(kind)]
        if generation is not None:
            self._merged[kind] = generation
            fragment = _VERIFIED.make_fragment(open_generation(self._store, generation))
            self.connection.register(f"merged_{kind}", ds.FileSystemDataset([fragment], TABLES[kind].schema, _VERIFIED))
            sources.append(f"merged_{kind}")
        if loose:
            sources.append(self._loose(kind, loose, readable))
        union = " UNION ALL BY NAME ".join(f"SELECT * FROM {source}" for source in sources)  # noqa: S608 quoted below
        return f"({union})"

    def _loose(self, kind: str, paths: list[str], readable: list[str]) -> str:
        """SQL for the rows of index files."""
        directory = self._store.directory
        # DuckDB would take a `*` in the store's own path for a wildcard, and read its neighbours.
        if not directory.local or glob.escape(directory.root) != directory.root:
            self.connection.register(f"loose_{kind}", _Stream(self._store, kind, paths))
            return f"loose_{kind}"
        for path in paths:
            self._check(kind, path)
        absolute = [directory.path(path) for path in paths]
        readable.extend(absolute)
        # The partition folders are for people: as columns, `run`, `iter` and `reward` would collide with ours.
        return f"read_parquet([{', '.join(map(_quoted, absolute))}], union_by_name=true, hive_partitioning=false)"

    def _check(self, kind: str, path: str) -> None:
        """DuckDB verifies nothing: what it is to read must carry a seal that holds, or else be read by us once."""
        data = self._store.read(path)
        with suppress(ValueError):
            if check_seal(data):
                return
        self._store.parse(kind, path, data)

    def _lock(self, readable: list[str]) -> None:
        settings = ["python_enable_replacements=false"]
        if self._allow_external:
            with suppress(duckdb.Error):
                self.connection.execute("LOAD httpfs")
            # A query must not install anything, and functions of other extensions may write.
            settings += ["autoinstall_known_extensions=false", "autoload_known_extensions=false"]
        else:
            settings += [f"allowed_paths=[{', '.join(map(_quoted, readable))}]", "enable_external_access=false"]
        for setting in (*settings, "lock_configuration=true"):
            self.connection.execute(f"SET {setting}")

    def query(self, sql: str) -> pa.Table:
        """The result of one SELECT (or DESCRIBE, SUMMARIZE, SHOW) as an Arrow table.

        Raises StoreError when the SQL is wrong, is more than one statement, or is anything but a query.
        """
        try:
            check_query(self.connection, sql)
            table = self.connection.sql(sql).to_arrow_table()
            return table.rename_columns(_distinct(table.column_names))
        except duckdb.Error as error:
            if (found := _BROKEN.search(str(error))) and found[1] in self._merged:
                warn(self._merged.pop(found[1]).path, StoreError(found[2].strip()))
                self._open(TABLES.keys() - self._merged.keys())
                return self.query(sql)
            raise StoreError(f"SQL: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class _Stream:
    """Index files as an Arrow source that reads them anew for each query, some at a time."""

    store: Store
    kind: str
    paths: list[str]

    def __arrow_c_schema__(self) -> Any:
        return TABLES[self.kind].schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        schema = TABLES[self.kind].schema
        pieces = read_files(self.store, self.kind, dict.fromkeys(self.paths, 0), schema)
        batches = (batch for _, table in pieces for batch in table.to_batches())
        return pa.RecordBatchReader.from_batches(schema, batches).__arrow_c_stream__()


@cache
def _no_rows(kind: str) -> str:
    """SQL for no row of a table: it brings the columns, also those that files of an older minor version lack."""
    with duckdb.connect(":memory:") as connection:
        none = connection.from_arrow(TABLES[kind].schema.empty_table())
        columns = ", ".join(f"NULL::{type_} AS {name}" for name, type_ in zip(none.columns, none.types, strict=True))
    return f"(SELECT {columns} WHERE false)"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _distinct(names: list[str]) -> list[str]:
    """Column names with a number behind those that came before: rows as dicts would lose them."""
    taken, distinct = set(names), []
    for i, name in enumerate(names):
        if name in names[:i]:
            name = next(new for number in count(1) if (new := f"{name}_{number}") not in taken)
            taken.add(name)
        distinct.append(name)
    return distinct


def _policy(document: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    picked = {name: document.get(name) for name in POLICIES.names}
    created_at = datetime.fromisoformat(document["created_at"])
    return picked | {"has_weights": document["policy_id"] in kept, "created_at": created_at}


def _run(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": document["run_id"],
        "name": document["config"].get("name"),
        "seed": document["config"].get("seed"),
        "config": json.dumps(document["config"]),
        "command": json.dumps(document["command"]),
        "software": json.dumps(document["software"]),
        "created_at": datetime.fromisoformat(document["created_at"]),
    }
