"""Stage `train`: execute the plan of an iteration. It decides nothing: same plan, policy and seed, same new policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from opgrpo_data.errors import StoreError
from opgrpo_data.ids import canonical_json
from opgrpo_data.schema import UPDATES, table_of
from opgrpo_data.store import iteration_folder
from opgrpo_data.stream import Batch, stream
from pipelines import objective, sampler
from pipelines.config import TrainConfig
from pipelines.experiment import Experiment, Outcome
from pipelines.learner import Learner
from pipelines.policies.base import Policy
from pipelines.trajectories import to_tensor

Rows = list[dict[str, Any]]


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
    learner.iteration = None  # until the new state is whole
    updates = _run_plan(experiment, learner, plan)
    if not updates:
        raise StoreError(f"no trajectory in the plan of iteration {iteration} could be read: see the view quarantine")
    learner.update_average()
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
    updates: Rows = []
    for step, batches in groupby(stream(experiment.store.directory, plan), key=lambda batch: batch.optimizer_step):
        for parameter in learner.parameters.values():
            # Zero, not None: a step without gradient must move the weights alike in a fresh and in a resumed process.
            parameter.grad = torch.zeros_like(parameter)
        rows = [row for batch in batches for row in _accumulate(experiment, learner, batch, planned[step])]
        grad_norm = float(nn.utils.clip_grad_norm_(learner.parameters.values(), experiment.config.train.max_grad_norm))
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise ValueError(f"the gradient of optimizer step {step} is {grad_norm}: lower train.lr or replay.weight_max")
        learner.optimizer.step()
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
    # A row without advantage has no policy gradient: with no KL term its forward pass would be wasted.
    moving = [i for i, row in enumerate(batch.rows) if row["advantage"] != 0 or config.kl_beta > 0]
    pairs = _pairs([batch.rows[i] for i in moving], [batch.latents[i] for i in moving], experiment)
    outcomes: dict[str, dict[str, Any]] = {}
    if pairs is not None:
        terms = _terms(learner, pairs, config)
        torch.autograd.backward(terms.loss.sum() / planned)
        outcomes = _report(pairs, terms)
    for row in batch.rows:
        told = {name: row[name] for name in ("trajectory_id", "role", "importance_weight", "train_steps")}
        yield told | outcomes.get(row["trajectory_id"], {"loss": 0.0, "ratio": [], "clipped": [], "kl": []})


@dataclass(frozen=True)
class Pairs:
    """N (trajectory, step) pairs of M rows. row, steps: (N,) int64; latents, following: (N, *latent_shape) float32."""

    rows: Rows
    texts: list[str]
    grid: sampler.Transitions
    row: Tensor
    steps: Tensor
    latents: Tensor
    following: Tensor

    def per_row(self, name: str) -> Tensor:
        """A column of the plan, per pair: (N,) float64."""
        return torch.tensor([row[name] for row in self.rows], dtype=torch.float64, device=self.steps.device)[self.row]


def _pairs(rows: Rows, stored: list[Any], experiment: Experiment) -> Pairs | None:
    if not rows:
        return None
    policy, first = experiment.policy, rows[0]
    if tuple(first["latent_shape"]) != policy.latent_shape:
        raise StoreError(
            f"trajectory {first['trajectory_id']} has latents of shape {tuple(first['latent_shape'])}, the policy "
            f"{policy.base_model!r} works on {policy.latent_shape}: this store belongs to another model"
        )
    kinds = {canonical_json([row[name] for name in ("sampler", "sigmas", "noise_level", "latent_shape")]) for row in rows}
    if len(kinds) > 1:
        raise StoreError(f"one microstep of the plan mixes trajectories of {len(kinds)} samplers, sigma grids or shapes")
    latents = [to_tensor(array, row["latent_dtype"]) for array, row in zip(stored, rows, strict=True)]
    where = [(i, k) for i, row in enumerate(rows) for k in row["train_steps"]]
    return Pairs(
        rows=rows,
        texts=[experiment.prompt_of[rows[i]["prompt_id"]].text for i, _ in where],
        grid=sampler.transitions(first["sampler"], first["sigmas"], first["noise_level"]),
        row=torch.tensor([i for i, _ in where], device=policy.device),
        steps=torch.tensor([k for _, k in where], device=policy.device),
        latents=torch.stack([latents[i][k] for i, k in where]).to(policy.device),
        following=torch.stack([latents[i][k + 1] for i, k in where]).to(policy.device),
    )


@dataclass(frozen=True)
class Terms:
    """Per pair, (N,): weighted loss (differentiable), ratio, whether the clip stopped it, KL to the reference."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def _terms(learner: Learner, pairs: Pairs, config: TrainConfig) -> Terms:
    """The objective (docs/maths.md, section 4) of every pair, already divided by |S_i|: summed over pairs, then divided by
    the number of trajectories, it is the loss L."""
    policy, steps = learner.policy, pairs.steps
    sigmas = torch.as_tensor(pairs.grid.sigmas, device=steps.device)[steps]
    condition = policy.encode(pairs.texts)
    velocity = policy.velocity(pairs.latents, sigmas, condition)
    current = sampler.log_density(pairs.grid, steps, pairs.latents, pairs.following, velocity)
    old = torch.tensor(
        [pairs.rows[i]["old_logprob"][k] for i, k in zip(pairs.row.tolist(), steps.tolist(), strict=True)],
        dtype=torch.float64,
        device=steps.device,
    )
    elements = pairs.latents[0].numel()
    ratio = objective.log_ratio(current, old, elements, config.ratio_reduction).exp()
    advantage = pairs.per_row("advantage")
    surrogate = objective.clipped_surrogate(ratio, advantage, config.clip_low, config.clip_high)
    loss = pairs.per_row("importance_weight") * surrogate
    kl = torch.zeros_like(ratio)
    if config.kl_beta > 0:
        kl = _kl(policy, learner, pairs, sigmas, velocity, config)
        loss = loss + config.kl_beta * kl
    clipped = objective.is_clipped(ratio, advantage, config.clip_low, config.clip_high)
    return Terms(loss * _step_weights(pairs, config), ratio, clipped, kl)


def _kl(policy: Policy, learner: Learner, pairs: Pairs, sigmas: Tensor, velocity: Tensor, config: TrainConfig) -> Tensor:
    with torch.no_grad():
        reference = policy.velocity(pairs.latents, sigmas, policy.encode(pairs.texts), learner.reference)
    std = torch.as_tensor(pairs.grid.std, device=sigmas.device)[pairs.steps]
    ours = sampler.offset(pairs.grid, pairs.steps, pairs.latents, velocity)
    theirs = sampler.offset(pairs.grid, pairs.steps, pairs.latents, reference)
    return objective.gaussian_kl(ours, theirs, std, config.ratio_reduction)


def _step_weights(pairs: Pairs, config: TrainConfig) -> Tensor:
    """Weight of each pair's step within its trajectory, (N,) float64: they sum to 1 over the steps S_i of a row."""
    if config.step_weight == "uniform":
        weight = torch.ones_like(pairs.steps, dtype=torch.float64)
    else:
        weight = torch.as_tensor(pairs.grid.std, device=pairs.steps.device)[pairs.steps]
    totals = torch.zeros(len(pairs.rows), dtype=torch.float64, device=weight.device).index_add_(0, pairs.row, weight)
    return weight / totals[pairs.row]


def _report(pairs: Pairs, terms: Terms) -> dict[str, dict[str, Any]]:
    """What the update did with each trajectory: its loss, and ratio, clip and KL per trained step."""
    report: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(pairs.rows):
        mine = pairs.row == i
        report[row["trajectory_id"]] = {
            "loss": float(terms.loss.detach()[mine].sum()),
            "ratio": terms.ratio.detach()[mine].tolist(),
            "clipped": terms.clipped[mine].tolist(),
            "kl": terms.kl.detach()[mine].tolist(),
        }
    return report
