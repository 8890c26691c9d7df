"""SQL that a user wrote: one query, which only reads."""

from __future__ import annotations

import re
from functools import cache

import duckdb

from opgrpo_data.errors import StoreError

_QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
# Within a JSON string, quotes would have backslashes before them.
_NODE = re.compile(r'"type":"(\w+_NODE)"')
_FUNCTION = re.compile(r'"function_name":"([^"]*)"')
_READERS = re.compile(
    r"range|generate_series|unnest|repeat|repeat_row|json_each|json_tree|glob|sniff_csv|read_(csv|csv_auto|parquet|text|blob)"
    r"|read_(json|ndjson)(_auto|_objects|_objects_auto)?|parquet_\w+|duckdb_\w+|pragma_\w+"
)
"""Table functions that a query may call. Others run SQL of their own (`query`), write, or take addresses in memory."""


def check_query(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise StoreError unless `sql` is one query (SELECT, DESCRIBE, SUMMARIZE, SHOW) without a part that may write.

    To DuckDB, `WITH t AS (COPY ... TO ...) SELECT ...` is a SELECT, a path that it may read it may write, and functions run
    SQL that they are given as text. Some of it happens while it binds, so this comes first. Raises duckdb.Error when `sql` is
    no SQL.
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
        if barred := sorted({name.lower() for name in _FUNCTION.findall(parsed)} & _barred()):
            raise StoreError(f"the store is read-only to SQL: the function {barred[0]} is refused")
        kind = next((node.removesuffix("_NODE").removesuffix("_QUERY") for node in nodes if node not in _QUERIES), kind)
    if kind != "SELECT":
        raise StoreError(f"the store is read-only to SQL: {kind} is refused, a SELECT is not")


@cache
def _barred() -> frozenset[str]:
    """Names of the table functions of this DuckDB that are none of _READERS."""
    with duckdb.connect(":memory:") as connection:
        rows = connection.execute("SELECT lower(function_name), function_type IN ('table', 'pragma') FROM duckdb_functions()")
        known = set(rows.fetchall())
    values = {name for name, is_table in known if not is_table}  # `version` is both
    return frozenset(name for name, is_table in known if is_table and not _READERS.fullmatch(name)) - values


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type).removeprefix("StatementType.")
    except ValueError:  # a kind that DuckDB's Python enum lacks
        return "this statement"
