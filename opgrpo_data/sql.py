"""SQL that a user wrote: one query, which only reads."""

from __future__ import annotations

import re

import duckdb

from opgrpo_data.errors import StoreError

_QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_NODE = re.compile(r'"type":"(\w+_NODE)"')  # within a JSON string, its quotes would have backslashes before them


def check_query(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise StoreError unless `sql` is one query (SELECT, DESCRIBE, SUMMARIZE, SHOW) without a part that writes.

    To DuckDB, `WITH t AS (COPY ... TO ...) SELECT ...` is a SELECT, and a path that it may read it may write. It writes while
    it binds, so this comes first. Raises duckdb.Error when `sql` is no SQL.
    """
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise StoreError(f"expected one SQL statement, got {len(statements)}")
    kind = _kind(statements[0])
    if kind == "SELECT":
        [[parsed]] = connection.execute("SELECT json_serialize_sql($1::VARCHAR)::VARCHAR", [sql]).fetchall()
        nodes = _NODE.findall(parsed)
        if not nodes:
            raise StoreError("the store is read-only to SQL, and what this statement does cannot be told: ask by a SELECT")
        kind = next((node.removesuffix("_NODE").removesuffix("_QUERY") for node in nodes if node not in _QUERIES), kind)
    if kind != "SELECT":
        raise StoreError(f"the store is read-only to SQL: {kind} is refused, a SELECT is not")


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type).removeprefix("StatementType.")
    except ValueError:  # a kind that DuckDB's Python enum lacks
        return "this statement"
