"""Group reuse: whole past groups join the batch with their stored rewards and advantages, and nothing is generated again.

Which rows of earlier plans come back, and what the present old policy thinks of them (`replay.judge_reused` writes that down;
docs/maths.md, section 6).
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from opgrpo_data.errors import StoreError
from opgrpo_data.schema import PLANS, table_of
from opgrpo_data.store import iteration_folder
from pipelines.experiment import Experiment


def densities_path(experiment: Experiment, iteration: int) -> str:
    """Where the old policy's densities of reused trajectories lie."""
    return f"{iteration_folder('densities', experiment.run_id, iteration)}.parquet"


def reusable(experiment: Experiment, iteration: int) -> list[dict[str, Any]]:
    """Plan rows of the last `replay.reuse_iterations` iterations that carry an advantage: without one there is no gradient."""
    first = max(iteration - experiment.config.replay.reuse_iterations, 0)
    damaged = experiment.store.quarantined()
    rows: dict[str, dict[str, Any]] = {}
    for past in range(first, iteration):
        path = f"{iteration_folder('plans', experiment.run_id, past)}.parquet"
        for row in experiment.store.read_tables("plans", [path]).to_pylist():
            if row["role"] != "reused" and row["advantage"] != 0 and row["trajectory_id"] not in damaged:
                rows.setdefault(row["trajectory_id"], row)  # later epochs repeat it
    return list(rows.values())


def reused_rows(experiment: Experiment, iteration: int) -> pa.Table:
    """The reusable rows (schema PLANS) with old_logprob and path_variance under this iteration's old policy.

    Raises StoreError when the policy has not judged them yet.
    """
    if not experiment.config.replay.reuse_iterations:
        return PLANS.empty_table()
    path = densities_path(experiment, iteration)
    if not experiment.store.directory.exists(path):
        raise StoreError(f"iteration {iteration} has not judged the groups it reuses: run `opgrpo rollout` first")
    judged = {row["trajectory_id"]: row for row in experiment.store.read_tables("densities", [path]).to_pylist()}
    rows = [row for row in reusable(experiment, iteration) if row["trajectory_id"] in judged]
    told = ("old_logprob", "path_variance")
    return table_of(
        [row | {"role": "reused"} | {name: judged[row["trajectory_id"]][name] for name in told} for row in rows], PLANS
    )
