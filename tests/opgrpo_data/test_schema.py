"""Schemas: tables have exactly the columns they promise, old files still read, newer formats are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data import schema
from opgrpo_data.errors import StoreError
from opgrpo_data.schema import FORMAT, SCHEMA_VERSION, check_version, conform, table_of, to_parquet
from opgrpo_data.store import TABLES

TINY = pa.schema([("name", pa.string()), ("count", pa.int64()), ("steps", pa.list_(pa.int32()))])


def test_table_of_has_the_columns_of_its_schema_in_order() -> None:
    table = table_of([{"steps": [1], "name": "a"}, {"count": 2}], TINY)
    assert table.schema == TINY
    assert table.to_pylist() == [{"name": "a", "count": None, "steps": [1]}, {"name": None, "count": 2, "steps": None}]
    assert table_of([], TINY).schema == TINY


def test_table_of_refuses_a_column_too_many() -> None:
    with pytest.raises(ValueError, match=r"columns \['colour'\] are not in the schema; it has \['name', 'count', 'steps'\]"):
        table_of([{"name": "a"}, {"name": "b", "colour": "red"}], TINY)


def test_table_of_refuses_a_value_of_another_type() -> None:
    with pytest.raises(pa.ArrowInvalid, match="Could not convert 'many'"):
        table_of([{"count": "many"}], TINY)


def test_conform_picks_casts_and_fills() -> None:
    older = pa.table({"extra": [1, 2], "count": pa.array([3, 4], pa.int32()), "name": ["a", "b"]})
    assert conform(older, TINY).equals(pa.table({"name": ["a", "b"], "count": [3, 4], "steps": [None, None]}, schema=TINY))
    assert conform(older.slice(0, 0), TINY).equals(TINY.empty_table())


def test_conform_refuses_what_it_cannot_cast() -> None:
    with pytest.raises(pa.ArrowInvalid, match="Failed to parse string: 'many'"):
        conform(pa.table({"count": ["many"]}), TINY)


@given(st.lists(st.fixed_dictionaries({"name": st.none() | st.text(), "steps": st.lists(st.integers(0, 9))}), max_size=5))
def test_parquet_gives_a_table_back(rows: list[dict[str, Any]]) -> None:
    table = table_of(rows, TINY)
    assert pq.read_table(pa.BufferReader(to_parquet(table))).equals(table)


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_survives_parquet_with_its_schema(kind: str) -> None:
    empty = TABLES[kind].schema.empty_table()
    read = pq.read_table(pa.BufferReader(to_parquet(empty)))
    assert read.schema == TABLES[kind].schema
    assert conform(read, TABLES[kind].schema).equals(empty)


@pytest.mark.parametrize("table", [schema.TRAJECTORIES, schema.BUFFERS, schema.PLANS])
def test_what_points_at_latents_carries_their_place(table: pa.Schema) -> None:
    """Replay and training run without SQL: shard, offset and checksums come with the row (docs: DESIGN, the store)."""
    assert {field.name: field.type for field in schema.LOCATION}.items() <= {f.name: f.type for f in table}.items()


def test_checksums_and_log_probs_keep_their_bits() -> None:
    value = {"latents_crc32": [0, 2**32 - 1], "behaviour_logprob": [-123456.78901234567, 5e-324], "seed": 2**63 - 1}
    read = pq.read_table(pa.BufferReader(to_parquet(table_of([value], schema.TRAJECTORIES)))).to_pylist()[0]
    assert {name: read[name] for name in value} == value


@pytest.mark.parametrize("version", ["1.1", "1.0", "0.9", "0.0", SCHEMA_VERSION])
def test_known_versions_open(version: str) -> None:
    check_version({"format": FORMAT, "version": version}, "here")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "here is not an opgrpo store: its store.json says format None"),
        ({"format": "lance", "version": "1.0"}, "here is not an opgrpo store: its store.json says format 'lance'"),
        ({"format": FORMAT}, "here: store.json has the format version ''; expected a version like 1.0"),
        ({"format": FORMAT, "version": "one"}, "here: store.json has the format version 'one'"),
        ({"format": FORMAT, "version": "1.2.3"}, r"here: store.json has the format version '1\.2\.3'"),
        ({"format": FORMAT, "version": None}, "here: store.json has the format version 'None'"),
        ({"format": FORMAT, "version": "1.3"}, r"here has format version 1\.3, newer than 1\.2, .* upgrade opgrpo"),
        ({"format": FORMAT, "version": "2.0"}, r"here has format version 2\.0, newer than 1\.2, .* upgrade opgrpo"),
        ({"format": FORMAT, "version": "1.10"}, r"here has format version 1\.10, newer than 1\.2"),
    ],
    ids=str,
)
def test_other_versions_are_refused(document: Mapping[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        check_version(dict(document), "here")
