"""SQL over a store: DuckDB, in memory, over views of its Parquet files. Nothing here can change the store."""

from __future__ import annotations

import glob
import json
from datetime import datetime
from typing import Any

import duckdb
import pyarrow as pa

from opgrpo_data.buffer import QUERIES
from opgrpo_data.errors import StoreError
from opgrpo_data.schema import POLICIES, RUNS, table_of
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


class Catalog:
    """The views prompts, policies, runs, trajectories, rewards, reward_errors, buffer, plans, densities, updates, update_steps,
    update_summary, evals, quarantine, dropped.

    They show what was committed when the catalog was opened. The connection may read the store's indexes and nothing
    else: no other file, no network, no extension, no statement but a query.
    """

    def __init__(self, store: Store) -> None:
        self.connection = duckdb.connect(":memory:")
        self.connection.execute("CREATE SCHEMA stored")  # out of sight of SHOW TABLES
        readable: list[str] = []
        sources = {name: self._source(store, name, readable) for name in TABLES}
        for view, query in _VIEWS.items():
            self._create_view(store, view, query.format(**sources))
        kept = {path.split("/")[1] for path in store.directory.list("policies/*/weights.safetensors")}
        policies = [_policy(document, kept) for document in store.documents("policies/*/policy.json")]
        self.connection.register("policies", table_of(policies, POLICIES))
        self.connection.register("runs", table_of([_run(d) for d in store.documents("runs/*.json")], RUNS))
        self._lock(readable)

    def _create_view(self, store: Store, view: str, query: str) -> None:
        try:
            self.connection.execute(f"CREATE VIEW {view} AS {query}")
        except duckdb.Error as error:
            for kind in TABLES:
                store.read_tables(kind, store.files(kind))  # names the damaged file, which DuckDB does not
            raise StoreError(f"view {view}: {' '.join(str(error).split())}") from error

    def _source(self, store: Store, kind: str, readable: list[str]) -> str:
        paths = store.files(kind)
        # DuckDB would take a `*` in the store's own path for a wildcard, and read its neighbours.
        wild = glob.escape(store.directory.root) != store.directory.root
        if not paths or not store.directory.local or wild:
            self.connection.from_arrow(store.read_tables(kind, paths)).create(f"stored.{kind}")
            return f"stored.{kind}"
        absolute = [store.directory.path(path) for path in paths]
        readable.extend(absolute)
        # The partition folders are for people: as columns, `run`, `iter` and `reward` would collide with ours.
        files = f"read_parquet([{', '.join(map(_quoted, absolute))}], union_by_name=true, hive_partitioning=false)"
        # The empty table brings the columns that files of an older minor version lack.
        self.connection.from_arrow(TABLES[kind].schema.empty_table()).create(f"stored.{kind}")
        return f"(SELECT * FROM stored.{kind} UNION ALL BY NAME SELECT * FROM {files})"  # noqa: S608 quoted above

    def _lock(self, readable: list[str]) -> None:
        self.connection.execute(f"SET allowed_paths=[{', '.join(map(_quoted, readable))}]")
        self.connection.execute("SET enable_external_access=false")
        self.connection.execute("SET lock_configuration=true")

    def query(self, sql: str) -> pa.Table:
        """The result of one SELECT (or DESCRIBE, SUMMARIZE, SHOW) as an Arrow table.

        Raises StoreError when the SQL is wrong, is more than one statement, or is anything but a query.
        """
        try:
            statements = self.connection.extract_statements(sql)
            if len(statements) != 1:
                raise StoreError(f"expected one SQL statement, got {len(statements)}")
            if statements[0].type != duckdb.StatementType.SELECT:
                kind = str(statements[0].type).removeprefix("StatementType.")
                raise StoreError(f"the store is read-only to SQL: {kind} is refused, a SELECT is not")
            table = self.connection.sql(sql).to_arrow_table()
            return table.rename_columns(_distinct(table.column_names))
        except duckdb.Error as error:
            raise StoreError(f"SQL: {' '.join(str(error).split())}") from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _distinct(names: list[str]) -> list[str]:
    """Column names with a number behind those that came before: rows as dicts would lose them."""
    return [name if name not in names[:i] else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]


def _policy(document: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    picked = {name: document.get(name) for name in POLICIES.names}
    created_at = datetime.fromisoformat(document["created_at"])
    return picked | {"has_weights": document["policy_id"] in kept, "created_at": created_at}


def _run(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": document["run_id"],
        "name": document["config"]["name"],
        "seed": document["config"]["seed"],
        "config": json.dumps(document["config"]),
        "command": json.dumps(document["command"]),
        "software": json.dumps(document["software"]),
        "created_at": datetime.fromisoformat(document["created_at"]),
    }
