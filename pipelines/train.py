"""Stage `train`: execute the plan of an iteration. It decides nothing: same plan, policy and seed, same new policy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
from torch import Tensor

from opgrpo_data.errors import StoreError
from opgrpo_data.schema import UPDATES, table_of
from opgrpo_data.store import iteration_folder
from opgrpo_data.stream import Batch, stream
from pipelines.experiment import Experiment, Outcome
from pipelines.forward import forward_loss
from pipelines.learner import Learner
from pipelines.loss import Objective, clipped_loss

Rows = list[dict[str, Any]]

OBJECTIVES: dict[str, Objective] = {"clipped": clipped_loss, "forward": forward_loss}

# What `updates` repeats of a plan's row, so that one table says what training did and why.
TOLD = ("trajectory_id", "group_id", "role", "age", "reward", "advantage", "importance_weight", "predicted_ess", "train_steps")


def train(experiment: Experiment, iteration: int, dry_run: bool = False) -> Outcome:
    """Run the optimizer steps of the plan, then commit: training state, policy, and last the updates table.

    Raises StoreError when there is no plan.
    """
    store, run_id = experiment.store, experiment.run_id
    updates_path = f"{iteration_folder('updates', run_id, iteration)}.parquet"
    if store.directory.exists(updates_path):
        return Outcome("train", iteration, 0, 1)
    plan_path = f"{iteration_folder('plans', run_id, iteration)}.parquet"
    if not store.directory.exists(plan_path):
        raise StoreError(f"iteration {iteration} of run {run_id} has no plan: run `opgrpo select` first")
    plan = store.read_tables("plans", [plan_path])
    if dry_run:
        return Outcome("train", iteration, 1, 0, {"trajectories": plan.num_rows})
    learner = experiment.learner(iteration)
    old_id = learner.policy_id
    if experiment.config.algorithm == "offline" and experiment.config.train.objective == "forward":
        # The samples stay the same: contrasted anew with each new policy, they would push it on and on (docs/maths.md, 8).
        learner.old = dict(learner.reference)
    elif experiment.config.train.ratio_norm or experiment.config.train.objective == "forward":
        learner.remember_old()
    learner.iteration = None  # until the new state is whole
    updates = _run_plan(experiment, learner, plan)
    if not updates:
        raise StoreError(f"no trajectory in the plan of iteration {iteration} could be read: see the view quarantine")
    learner.update_average(iteration)
    new_id = learner.policy_id
    learner.save(store, run_id, iteration + 1)
    experiment.register_policy(new_id, old_id, iteration=iteration + 1, kind="trained", weights=None)
    rows = [{"run_id": run_id, "iteration": iteration, "new_policy_id": new_id, **row} for row in updates]
    if not store.publish_table(updates_path, table_of(rows, UPDATES)):
        return Outcome("train", iteration, 0, 1)  # another process was faster; its policy, not ours, will be loaded
    learner.iteration = iteration + 1
    learner.prune(store, run_id)
    return Outcome("train", iteration, 1, 0, {"policy_id": new_id, "trajectories": len(updates)})


def _run_plan(experiment: Experiment, learner: Learner, plan: pa.Table) -> Rows:
    """All optimizer steps; returns the rows of `updates` without run and iteration."""
    sizes = plan.group_by("optimizer_step").aggregate([("trajectory_id", "count")]).to_pydict()
    planned = dict(zip(sizes["optimizer_step"], sizes["trajectory_id_count"], strict=True))
    lr = experiment.config.train.lr * plan["lr_scale"][0].as_py()
    updates: Rows = []
    for step, batches in groupby(stream(experiment.store.directory, plan), key=lambda batch: batch.optimizer_step):
        learner.zero_grad()
        rows = [row for batch in batches for row in _accumulate(experiment, learner, batch, planned[step])]
        grad_norm = learner.step(lr)
        updates += [{**row, "optimizer_step": step, "grad_norm": grad_norm} for row in rows]
    return updates


def _accumulate(experiment: Experiment, learner: Learner, batch: Batch, planned: int) -> Iterator[dict[str, Any]]:
    """Add the gradient of one microstep; yields a row of `updates` per trajectory.

    planned: trajectories of the whole optimizer step; the loss is their mean, so microsteps add up to one batch.
    """
    for trajectory_id, error in batch.damaged:
        experiment.store.quarantine(trajectory_id, error)
        experiment.progress.warn(f"{error}; quarantined and left out of this update")
    config = experiment.config.train
    # A row without advantage has no policy gradient: with no KL term its forward pass would be wasted. The forward objective
    # draws such a row's velocity to the old policy's.
    always = config.kl_beta > 0 or config.objective == "forward"
    moving = [i for i, row in enumerate(batch.rows) if row["advantage"] != 0 or always]
    outcomes: dict[str, dict[str, Any]] = {}
    if moving:

        def backward(loss: Tensor) -> None:
            learner.backward(loss / planned)

        train_on = OBJECTIVES[config.objective]
        rows, latents = [batch.rows[i] for i in moving], [batch.latents[i] for i in moving]
        outcomes = train_on(experiment, learner, rows, latents, backward)
    for row in batch.rows:
        told = {name: row[name] for name in TOLD} | {"path_variance": _variance_of_trained(row)}
        yield told | {"loss": 0.0, "ratio": [], "clipped": [], "kl": []} | outcomes.get(row["trajectory_id"], {})


def _variance_of_trained(row: dict[str, Any]) -> list[float]:
    """lambda of each trained step, 0 where the old policy drew it."""
    known = row["path_variance"] or []
    return [known[k] if k < len(known) else 0.0 for k in row["train_steps"]]
