"""The replay buffer: a selection over stored trajectories, not a container. One snapshot per iteration, by SQL."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Literal

import duckdb
import pyarrow as pa

from opgrpo_data.schema import BUFFERS, conform


@dataclass(frozen=True)
class BufferRule:
    """How an entry's reward R loses value with its age in iterations (docs/maths.md, section 3).

    multiplicative: R * decay^age, with decay in (0, 1]. linear: R - decay * age, with decay >= 0.
    """

    decay: float
    decay_form: Literal["multiplicative", "linear"]


def candidates(trajectories: pa.Table, rewards: pa.Table) -> pa.Table:
    """Scored trajectories as possible buffer entries: inner join on trajectory_id, failed rewards left out."""
    with duckdb.connect(":memory:") as connection:
        connection.register("trajectories", trajectories)
        connection.register("rewards", rewards)
        joined = connection.sql(
            "SELECT t.*, r.value AS reward, t.iteration AS born_iteration FROM trajectories t "
            "JOIN rewards r USING (trajectory_id) WHERE r.error IS NULL"
        ).to_arrow_table()
    return conform(joined, BUFFERS)


def select(
    previous: pa.Table, found: pa.Table, excluded: set[str], *, run_id: str, iteration: int, rule: BufferRule
) -> pa.Table:
    """The buffer after `iteration`: per prompt the best of the incumbent and the new candidates.

    previous, found and the result have the schema BUFFERS. The highest decayed reward wins; of equals the entry born last,
    then the smaller id. Rewards that are not finite, and trajectories in `excluded`, never enter.
    """
    query = resources.files("opgrpo_data").joinpath("queries/buffer.sql").read_text()
    parameters = {"iteration": iteration, "decay": rule.decay, "decay_form": rule.decay_form}
    with duckdb.connect(":memory:") as connection:
        connection.register("previous", previous)
        connection.register("candidates", found)
        connection.register("excluded", pa.table({"trajectory_id": pa.array(sorted(excluded), pa.string())}))
        chosen = connection.sql(query, params=parameters).to_arrow_table()
    snapshot = conform(chosen, BUFFERS)
    for name, value in (("run_id", run_id), ("iteration", iteration)):
        index = BUFFERS.get_field_index(name)
        column = pa.array([value] * snapshot.num_rows, BUFFERS.field(name).type)
        snapshot = snapshot.set_column(index, BUFFERS.field(name), column)
    return snapshot
