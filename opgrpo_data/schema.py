"""Arrow schemas of every table in a store, and the version of the format.

Columns are described in docs/format.md. A new column is a new minor version: readers fill it with null where an older
file lacks it. A changed meaning is a new major version.
"""

from __future__ import annotations

import io
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opgrpo_data.errors import StoreError
from opgrpo_data.seal import KEY, UNSEALED, sealed

FORMAT = "opgrpo-store"
SCHEMA_VERSION = "1.2"
VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}")

_FLOATS = pa.list_(pa.float64())
_INTS = pa.list_(pa.int64())
_CHECKSUMS = pa.list_(pa.uint32())

# Where a trajectory's bytes lie. Buffers and plans carry these columns, so that replay and training run without SQL.
LOCATION = pa.schema(
    [
        ("latent_shape", pa.list_(pa.int32())),
        ("latent_dtype", pa.string()),
        ("latents_file", pa.string()),
        ("latents_offset", pa.int64()),
        ("latents_length", pa.int64()),
        ("latents_header", pa.int64()),
        ("latents_crc32", _CHECKSUMS),
    ]
)

PROMPTS = pa.schema([("prompt_id", pa.string()), ("text", pa.string()), ("metadata", pa.string()), ("split", pa.string())])

TRAJECTORIES = pa.unify_schemas(
    [
        pa.schema(
            [
                ("trajectory_id", pa.string()),
                ("group_id", pa.string()),
                ("prompt_id", pa.string()),
                ("run_id", pa.string()),
                ("iteration", pa.int64()),
                ("member_index", pa.int32()),
                ("policy_id", pa.string()),
                ("base_model", pa.string()),
                ("parent_id", pa.string()),
                ("prefix_steps", pa.int32()),
                ("sampler", pa.string()),
                ("num_steps", pa.int32()),
                ("noise_level", pa.float64()),
                ("guidance_scale", pa.float64()),
                ("sigmas", _FLOATS),
                ("seed", pa.int64()),
                ("noise_seeds", _INTS),
                ("num_elements", pa.int64()),
                ("behaviour_logprob", _FLOATS),
                ("old_logprob", _FLOATS),
                ("transition_std", _FLOATS),
                ("path_variance", _FLOATS),
            ]
        ),
        LOCATION,
        pa.schema(
            [
                ("media_file", pa.string()),
                ("media_format", pa.string()),
                ("media_offset", pa.int64()),
                ("media_length", pa.int64()),
                ("media_crc32", pa.uint32()),
                ("shard", pa.string()),
                ("created_at", pa.timestamp("us", tz="UTC")),
                ("software", pa.string()),
            ]
        ),
    ]
)

REWARDS = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("reward", pa.string()),
        ("version", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
        ("error", pa.string()),
    ]
)

# What a continuation, or an optimizer step, needs of a trajectory besides its latents.
_REPLAYABLE = pa.unify_schemas(
    [
        pa.schema(
            [
                ("num_steps", pa.int32()),
                ("sampler", pa.string()),
                ("noise_level", pa.float64()),
                ("guidance_scale", pa.float64()),
                ("sigmas", _FLOATS),
                ("noise_seeds", _INTS),
                ("behaviour_logprob", _FLOATS),
                ("old_logprob", _FLOATS),
            ]
        ),
        LOCATION,
    ]
)

BUFFERS = pa.unify_schemas(
    [
        pa.schema(
            [
                ("run_id", pa.string()),
                ("iteration", pa.int64()),
                ("prompt_id", pa.string()),
                ("trajectory_id", pa.string()),
                ("reward", pa.float64()),
                ("decayed_reward", pa.float64()),
                ("born_iteration", pa.int64()),
                ("age", pa.int64()),
                ("member_index", pa.int32()),
                ("fresh_mean", pa.float64()),
                ("fresh_std", pa.float64()),
            ]
        ),
        _REPLAYABLE,
    ]
)

PLANS = pa.unify_schemas(
    [
        pa.schema(
            [
                ("run_id", pa.string()),
                ("iteration", pa.int64()),
                ("optimizer_step", pa.int32()),
                ("microstep", pa.int32()),
                ("rank", pa.int32()),
                ("group_id", pa.string()),
                ("trajectory_id", pa.string()),
                ("prompt_id", pa.string()),
                ("born_iteration", pa.int64()),
                ("member_index", pa.int32()),
                ("role", pa.string()),
                ("reward", pa.float64()),
                ("advantage", pa.float64()),
                ("importance_weight", pa.float64()),
                ("lr_scale", pa.float64()),
                ("train_steps", pa.list_(pa.int32())),
                ("first_latent", pa.int32()),
                ("last_latent", pa.int32()),
                ("age", pa.int64()),
                ("prefix_steps", pa.int32()),
                ("path_variance", _FLOATS),
                ("predicted_ess", pa.float64()),
                ("transition_std", _FLOATS),
                ("num_elements", pa.int64()),
            ]
        ),
        _REPLAYABLE,
    ]
)

# What the old policy of an iteration thinks of trajectories that earlier iterations drew (group reuse).
DENSITIES = pa.schema(
    [
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("trajectory_id", pa.string()),
        ("old_logprob", _FLOATS),
        ("path_variance", _FLOATS),
    ]
)

UPDATES = pa.schema(
    [
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("new_policy_id", pa.string()),
        ("optimizer_step", pa.int32()),
        ("trajectory_id", pa.string()),
        ("group_id", pa.string()),
        ("role", pa.string()),
        ("age", pa.int64()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("loss", pa.float64()),
        ("train_steps", pa.list_(pa.int32())),
        ("path_variance", _FLOATS),
        ("predicted_ess", pa.float64()),
        ("ratio", _FLOATS),
        ("clipped", pa.list_(pa.bool_())),
        ("kl", _FLOATS),
        ("importance_weight", pa.float64()),
        ("grad_norm", pa.float64()),
    ]
)

EVALS = pa.schema(
    [
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("policy_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("seed", pa.int64()),
        ("sampler", pa.string()),
        ("num_steps", pa.int32()),
        ("reward", pa.string()),
        ("version", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
    ]
)

QUARANTINE = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("file", pa.string()),
        ("member", pa.string()),
        ("reason", pa.string()),
        ("expected_crc32", pa.uint32()),
        ("found_crc32", pa.uint32()),
        ("noticed_at", pa.timestamp("us", tz="UTC")),
    ]
)

# Shards whose bytes `opgrpo gc` removed. Their index rows stay: lineage, densities and rewards remain to be asked for.
DROPPED = pa.schema(
    [
        ("index_file", pa.string()),
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("shard", pa.string()),
        ("trajectories", pa.int64()),
        ("bytes", pa.int64()),
        ("reason", pa.string()),
        ("dropped_at", pa.timestamp("us", tz="UTC")),
    ]
)

POLICIES = pa.schema(
    [
        ("policy_id", pa.string()),
        ("parent_id", pa.string()),
        ("base_model", pa.string()),
        ("family", pa.string()),
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("kind", pa.string()),
        ("parameters", pa.int64()),
        ("has_weights", pa.bool_()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("name", pa.string()),
        ("seed", pa.int64()),
        ("config", pa.string()),
        ("command", pa.string()),
        ("software", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows to a table of exactly `schema`. Raises KeyError-like ValueError when a row has a column too many."""
    known = set(schema.names)
    for row in rows:
        if extra := set(row) - known:
            raise ValueError(f"columns {sorted(extra)} are not in the schema; it has {schema.names}")
    return pa.Table.from_pylist(rows, schema=schema)


def to_parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file, sealed; each page has a checksum of its own too, for readers that know no seals.

    A flipped bit must not change a log-prob unseen.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: UNSEALED})
    return sealed(buffer.getvalue())


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Pick and cast the schema's columns; a column the table lacks (an older minor version) becomes null."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def check_version(document: dict[str, Any], where: str) -> None:
    """Raise StoreError unless `document` (the content of store.json) is a store this software can read."""
    if document.get("format") != FORMAT:
        raise StoreError(f"{where} is not an opgrpo store: its store.json says format {document.get('format')!r}")
    version = str(document.get("version", ""))
    if not VERSION.fullmatch(version):
        raise StoreError(f"{where}: store.json has the format version {version[:50]!r}; expected a version like 1.0")
    major, minor = map(int, version.split("."))
    ours = tuple(int(part) for part in SCHEMA_VERSION.split("."))
    if (major, minor) > ours:
        raise StoreError(
            f"{where} has format version {version}, newer than {SCHEMA_VERSION}, the newest this software knows: "
            f"upgrade opgrpo to open it"
        )
