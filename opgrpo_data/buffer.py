"""The replay buffer: a selection over stored trajectories, not a container. One snapshot per iteration, by SQL."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Literal

import duckdb
import pyarrow as pa

from opgrpo_data.errors import StoreError
from opgrpo_data.schema import BUFFERS, conform
from opgrpo_data.sql import check_query

QUERIES = resources.files("opgrpo_data").joinpath("queries")
SELECTIONS = ("best", "random", "worst")


@dataclass(frozen=True)
class BufferRule:
    """Which trajectories stay, and how their reward R loses value with age in iterations (docs/maths.md, section 3).

    multiplicative: R * decay^age, with decay in (0, 1]. linear: R - decay * age, with decay >= 0.
    selection: one of SELECTIONS (queries/select_<name>.sql), or SQL of the user's own (see `select`).
    members: entries per prompt; seed: of the random selection.
    """

    decay: float
    decay_form: Literal["multiplicative", "linear"]
    selection: str = "best"
    members: int = 1
    seed: int = 0


def candidates(trajectories: pa.Table, rewards: pa.Table) -> pa.Table:
    """Scored trajectories as possible buffer entries: inner join on trajectory_id, failed rewards left out.

    fresh_mean and fresh_std are of the rewards of the prompt's fresh members in these tables.
    """
    with duckdb.connect(":memory:") as connection:
        connection.register("trajectories", trajectories)
        connection.register("rewards", rewards)
        joined = connection.sql(
            "SELECT t.*, r.value AS reward, t.iteration AS born_iteration, "
            "avg(r.value) FILTER (WHERE coalesce(t.prefix_steps, 0) = 0 AND isfinite(r.value)) OVER fresh AS fresh_mean, "
            "stddev_pop(r.value) FILTER (WHERE coalesce(t.prefix_steps, 0) = 0 AND isfinite(r.value)) OVER fresh AS fresh_std "
            "FROM trajectories t JOIN rewards r USING (trajectory_id) WHERE r.error IS NULL "
            "WINDOW fresh AS (PARTITION BY t.prompt_id)"
        ).to_arrow_table()
    return conform(joined, BUFFERS)


def select(
    previous: pa.Table,
    found: pa.Table,
    excluded: set[str],
    *,
    run_id: str,
    iteration: int,
    rule: BufferRule,
    setting: str = "replay.selection",
) -> pa.Table:
    """The buffer after `iteration`: what the rule's selection keeps of the incumbents and the new candidates.

    previous, found and the result have the schema BUFFERS. The selection is a SELECT over the table `entries` (all of them,
    with age and decayed_reward; see queries/entries.sql) that returns a column trajectory_id, best first;
    getvariable('members'), ('iteration') and ('seed') hold the rule's numbers. Of each prompt the first `members` stay. Rewards
    that are not finite, and trajectories in `excluded`, are no entries. Raises StoreError, which names the setting, when a
    user's SQL fails or names a trajectory that is no entry.
    """
    with duckdb.connect(":memory:", config={"enable_external_access": "false"}) as connection:
        connection.register("previous", previous)
        connection.register("candidates", found)
        connection.register("excluded", pa.table({"trajectory_id": pa.array(sorted(excluded), pa.string())}))
        parameters = {"iteration": iteration, "decay": rule.decay, "decay_form": rule.decay_form}
        connection.execute(QUERIES.joinpath("entries.sql").read_text(), parameters)
        for name, number in (("members", rule.members), ("iteration", iteration), ("seed", rule.seed)):
            connection.execute(f"SET VARIABLE {name} = {int(number)}")
        connection.execute("SET lock_configuration=true")
        connection.register("chosen", _chosen(connection, rule.selection, setting))
        kept = connection.sql(
            "SELECT e.* FROM entries e JOIN chosen USING (trajectory_id) "
            "QUALIFY row_number() OVER (PARTITION BY prompt_id ORDER BY position) <= getvariable('members') ORDER BY position"
        ).to_arrow_table()
    snapshot = conform(kept, BUFFERS)
    for name, value in (("run_id", run_id), ("iteration", iteration)):
        index = BUFFERS.get_field_index(name)
        column = pa.array([value] * snapshot.num_rows, BUFFERS.field(name).type)
        snapshot = snapshot.set_column(index, BUFFERS.field(name), column)
    return snapshot


def check_selection(selection: str, setting: str = "replay.selection") -> None:
    """Raise ValueError unless `selection` is one of SELECTIONS, or one SELECT that finds trajectory_id in `entries`."""
    if selection not in SELECTIONS:
        nothing = BUFFERS.empty_table()
        rule = BufferRule(1.0, "multiplicative", selection)
        select(nothing, nothing, set(), run_id="", iteration=0, rule=rule, setting=setting)


def _query(connection: duckdb.DuckDBPyConnection, selection: str) -> str:
    """The SQL of a selection. Raises ValueError unless it is one SELECT, which only reads."""
    if selection in SELECTIONS:
        return QUERIES.joinpath(f"select_{selection}.sql").read_text()
    try:
        check_query(connection, selection)
    except (duckdb.Error, StoreError) as error:
        wanted = f"choose one of {SELECTIONS}, or give SQL, one SELECT over the table entries; got {selection!r}"
        raise ValueError(f"{wanted} ({' '.join(str(error).split())})") from error
    return selection


def _chosen(connection: duckdb.DuckDBPyConnection, selection: str, setting: str) -> pa.Table:
    """What the selection returns: trajectory_id and its position, duplicates dropped."""
    query = _query(connection, selection)
    try:
        found = connection.sql(query).to_arrow_table()
    except duckdb.Error as error:
        raise StoreError(f"{setting}: {' '.join(str(error).split())}; the query was {selection!r}") from error
    if found.column_names.count("trajectory_id") != 1 or not pa.types.is_string(found.schema.field("trajectory_id").type):
        returned = ", ".join(f"{field.name} ({field.type})" for field in found.schema)
        raise StoreError(f"{setting} must return one text column trajectory_id, it returned {returned}")
    ids = list(dict.fromkeys(found["trajectory_id"].to_pylist()))
    known = {row for (row,) in connection.execute("SELECT trajectory_id FROM entries").fetchall()}
    if strangers := [name for name in ids if name not in known]:
        raise StoreError(f"{setting} named trajectories that are no entries: {strangers[:3]}")
    return pa.table({"trajectory_id": pa.array(ids, pa.string()), "position": pa.array(range(len(ids)), pa.int64())})
