"""Which stored trajectories another run or policy can use: those that the same model drew in the same way, with a reward.

What the old policy then thinks of them is another question, which their densities answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opgrpo_data.schema import REWARDS, TRAJECTORIES
from opgrpo_data.store import Store
from pipelines.settings import RolloutConfig

if TYPE_CHECKING:
    from pipelines.policies.base import Policy

COMPARED = {
    "sampler": "rollout.sampler",
    "num_steps": "rollout.num_steps",
    "noise_level": "rollout.noise_level",
    "latent_dtype": "rollout.storage_dtype",
    "guidance_scale": "policy.options.guidance_scale",
    "latent_shape": "the shape of latents",
    "sigmas": "the sigma grid",
}
"""Columns in which a trajectory has to be as asked, and what a difference in them is called."""


@dataclass(frozen=True)
class Asked:
    """What trajectories have to be like. settings: the values of the columns COMPARED. base_model, model_id: as `Policy` has
    them."""

    settings: Mapping[str, Any]
    base_model: str
    model_id: str

    @classmethod
    def of(cls, policy: Policy, rollout: RolloutConfig) -> Asked:
        """As a run draws them."""
        settings = {
            "sampler": rollout.sampler,
            "num_steps": rollout.num_steps,
            "noise_level": rollout.noise_level,
            "latent_dtype": rollout.storage_dtype,
            "guidance_scale": policy.guidance_scale,
            "latent_shape": list(policy.latent_shape),
            "sigmas": policy.sigmas(rollout.num_steps).tolist(),
        }
        return cls(settings, policy.base_model, policy.model_id)

    def differences(self, kind: Mapping[str, Any], model_id: str | None) -> list[str]:
        """In what trajectories of a kind differ; model_id: of the run that drew them, where that is known."""
        found = [called for name, called in COMPARED.items() if kind[name] != self.settings[name]]
        known = (model_id, self.model_id) if model_id is not None else (kind["base_model"], self.base_model)
        return found + (["the model"] if known[0] != known[1] else [])


@dataclass(frozen=True)
class Fitting:
    """What was found. trajectories: schema TRAJECTORIES, with the column reward, each once. seen: how many were looked at.
    told: a remark per run, for people."""

    trajectories: pa.Table
    seen: int
    told: list[str]


def fitting(
    store: Store, asked: Asked, rewards: pa.Table, *, files: Sequence[str], prompt_ids: Collection[str] | None = None
) -> Fitting:
    """Trajectories of index files that are as asked, in `rewards` (see `scored`), neither dropped nor in quarantine; of
    certain prompts, or None for all."""
    dropped, wanted = store.dropped_shards(), None if prompt_ids is None else pa.array(sorted(prompt_ids), pa.string())
    tables, seen = [TRAJECTORIES.empty_table()], [pa.array([], pa.string())]
    for path in files:
        table = store.read_tables("trajectories", [path])
        table = table if wanted is None else table.filter(pc.is_in(table["prompt_id"], value_set=wanted))
        seen += table["trajectory_id"].chunks
        tables += [] if path in dropped else [table]
    with duckdb.connect(":memory:") as connection:
        connection.register("found", _each_once(pa.concat_tables(tables)))
        connection.register("rewards", rewards)
        damaged = pa.array(sorted(store.quarantined()), pa.string())
        connection.register("damaged", pa.table({"trajectory_id": damaged}))
        told, runs = _kinds(connection, store, asked)
        same = " AND ".join(f"{name} IS NOT DISTINCT FROM ${name}" for name in COMPARED)
        fits = connection.sql(
            "SELECT found.*, value AS reward FROM found JOIN rewards USING (trajectory_id) "  # noqa: S608 our own columns
            f"WHERE run_id IN (SELECT unnest($runs)) AND {same} AND trajectory_id NOT IN (SELECT trajectory_id FROM damaged) "
            "ORDER BY prompt_id, run_id, iteration, member_index, trajectory_id",
            params={**asked.settings, "runs": runs},
        ).to_arrow_table()
    return Fitting(fits, len(pc.unique(pa.chunked_array(seen))), told)


def _kinds(connection: duckdb.DuckDBPyConnection, store: Store, asked: Asked) -> tuple[list[str], list[str]]:
    """A remark about every kind of trajectory of every run, and the runs of which some fit."""
    models = {run["run_id"]: run.get("model_id") for run in store.documents("runs/*.json")}
    columns = ["run_id", "base_model", *COMPARED]
    kinds = connection.sql(
        f"SELECT {', '.join(columns)}, count(*) AS drawn, count(value) AS scored "  # noqa: S608 our own columns
        "FROM found LEFT JOIN rewards USING (trajectory_id) GROUP BY ALL ORDER BY run_id, drawn DESC"
    ).to_arrow_table()
    told, runs = [], []
    for kind in kinds.to_pylist():
        if differences := asked.differences(kind, models.get(kind["run_id"])):
            told.append(f"{kind['run_id']} differs in {', '.join(differences)}")
        else:
            told.append(f"{kind['run_id']} has {kind['drawn']} trajectories for these prompts, {kind['scored']} of them scored")
            runs.append(kind["run_id"])
    return told, runs


def scored(store: Store, reward: str, version: str) -> pa.Table:
    """Of whatever has a finite value of a reward in one version: schema REWARDS, one row a trajectory."""
    tables = [REWARDS.empty_table()]
    for path in store.files("rewards", reward=reward):
        table = store.read_tables("rewards", [path])
        usable = pc.and_(table["error"].is_null(), pc.is_finite(table["value"]))
        tables.append(table.filter(pc.and_(pc.equal(table["version"], version), usable)))
    return _each_once(pa.concat_tables(tables))


def _each_once(table: pa.Table) -> pa.Table:
    """The first row of every trajectory_id: two shards may hold the same trajectory, which counts once."""
    numbered = pa.table({"trajectory_id": table["trajectory_id"], "row": pa.array(np.arange(table.num_rows))})
    first = np.zeros(table.num_rows, dtype=bool)
    first[numbered.group_by("trajectory_id").aggregate([("row", "min")])["row_min"].to_numpy()] = True
    return table.filter(pa.array(first))
