"""Stored trajectories that join a batch whole: which ones, and what the present old policy thinks of them.

In group reuse they are rows of earlier plans, with their rewards and advantages (docs/maths.md, section 6), in offline training
all there is (section 8). `replay.judge_reused` writes down their densities.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from opgrpo_data.errors import StoreError
from opgrpo_data.schema import PLANS, table_of
from opgrpo_data.store import iteration_folder
from pipelines.experiment import Experiment
from pipelines.offline import members


def densities_path(experiment: Experiment, iteration: int) -> str:
    """Where the old policy's densities of reused trajectories lie."""
    return f"{iteration_folder('densities', experiment.run_id, iteration)}.parquet"


def reusable(experiment: Experiment, iteration: int) -> list[dict[str, Any]]:
    """Rows (schema PLANS) that may join: the groups of an offline iteration; else those of the last `replay.reuse_iterations`
    plans that carry an advantage, for without one there is no gradient."""
    if experiment.config.algorithm == "offline":
        stored: list[dict[str, Any]] = members(
            experiment.store, experiment.config, experiment.offline_selection, iteration
        ).to_pylist()
        return stored
    first = max(iteration - experiment.config.replay.reuse_iterations, 0)
    rows: dict[str, dict[str, Any]] = {}
    for past in range(first, iteration):
        path = f"{iteration_folder('plans', experiment.run_id, past)}.parquet"
        for row in experiment.store.read_tables("plans", [path]).to_pylist():
            if row["role"] != "reused" and row["advantage"] != 0:
                rows.setdefault(row["trajectory_id"], row)  # later epochs repeat it
    unusable = experiment.store.unusable(rows.values())
    return [row for name, row in rows.items() if name not in unusable]


def reused_rows(experiment: Experiment, iteration: int) -> pa.Table:
    """The reusable rows (schema PLANS) with old_logprob and path_variance under this iteration's old policy.

    Raises StoreError when the policy has not judged them yet.
    """
    if not experiment.config.judges_stored:
        return PLANS.empty_table()
    return table_of(judged(experiment, iteration, reusable(experiment, iteration)), PLANS)


def judged(experiment: Experiment, iteration: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the rows that this iteration's old policy judged, in the role `reused`, with what it said of them.

    Raises StoreError when it has judged none yet.
    """
    path = densities_path(experiment, iteration)
    if not experiment.store.directory.exists(path):
        raise StoreError(f"iteration {iteration} has not judged the groups it reuses: run `opgrpo rollout` first")
    said = {row["trajectory_id"]: row for row in experiment.store.read_tables("densities", [path]).to_pylist()}
    told = ("old_logprob", "path_variance")
    return [
        row | {"role": "reused"} | {name: said[row["trajectory_id"]][name] for name in told}
        for row in rows
        if row["trajectory_id"] in said
    ]
