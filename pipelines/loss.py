"""From the rows of a plan and their latents to the loss: one forward pass over (trajectory, denoising step) pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opgrpo_data.errors import StoreError
from opgrpo_data.ids import canonical_json
from pipelines import objective, sampler
from pipelines.experiment import Experiment
from pipelines.learner import Learner
from pipelines.settings import TrainConfig
from pipelines.trajectories import to_tensor
from pipelines.weights import Weights

Rows = list[dict[str, Any]]
Backward = Callable[[Tensor], None]
"""Takes the loss of a part of a batch, summed over its trajectories, and adds its gradient."""
Objective = Callable[[Experiment, Learner, Rows, list[Any], Backward], dict[str, dict[str, Any]]]
"""Trains on M rows of a plan with their stored latents, part by part; returns what `updates` says of each."""


@dataclass(frozen=True)
class Pairs:
    """N (trajectory, step) pairs of M rows. row, steps: (N,) int64; latents, following: (N, *latent_shape) float32.

    weight: (N,) float64, of the step within its trajectory: they sum to 1 over the steps S_i of a row.
    """

    rows: Rows
    texts: list[str]
    grid: sampler.Transitions
    row: Tensor
    steps: Tensor
    latents: Tensor
    following: Tensor
    weight: Tensor

    def parts(self, size: int | None) -> Iterator[Pairs]:
        """Consecutive pairs, at most `size` at a time (None: all at once). Losses of parts add up to the whole's."""
        count = len(self.steps)
        for start in range(0, count, size or count):
            end = start + (size or count)
            cut = (tensor[start:end] for tensor in (self.row, self.steps, self.latents, self.following, self.weight))
            yield Pairs(self.rows, self.texts[start:end], self.grid, *cut)

    def per_row(self, name: str) -> Tensor:
        """A column of the plan, per pair: (N,) float64."""
        return torch.tensor([row[name] for row in self.rows], dtype=torch.float64, device=self.steps.device)[self.row]

    def per_pair(self, name: str) -> Tensor:
        """A column of the plan with a value per denoising step, per pair: (N,) float64."""
        where = zip(self.row.tolist(), self.steps.tolist(), strict=True)
        return torch.tensor([self.rows[i][name][k] for i, k in where], dtype=torch.float64, device=self.steps.device)

    @property
    def std(self) -> Tensor:
        """s_k of each pair, (N,) float64."""
        return torch.as_tensor(self.grid.std, device=self.steps.device)[self.steps]


def make_pairs(rows: Rows, stored: list[Any], experiment: Experiment) -> Pairs:
    """The trained (trajectory, step) pairs of plan rows, with their stored latents.

    Raises StoreError when the rows are of another latent shape than the policy, or of several sigma grids.
    """
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
    grid = sampler.transitions(first["sampler"], first["sigmas"], first["noise_level"])
    row_of = torch.tensor([i for i, _ in where], device=policy.device)
    steps = torch.tensor([k for _, k in where], device=policy.device)
    return Pairs(
        rows=rows,
        texts=[experiment.prompt_of[rows[i]["prompt_id"]].text for i, _ in where],
        grid=grid,
        row=row_of,
        steps=steps,
        latents=torch.stack([latents[i][k] for i, k in where]).to(policy.device),
        following=torch.stack([latents[i][k + 1] for i, k in where]).to(policy.device),
        weight=_step_weights(grid, row_of, steps, experiment.config.train),
    )


@dataclass(frozen=True)
class Terms:
    """Per pair, (N,): weighted loss (differentiable), ratio, whether the clip stopped it, KL to the reference."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def clipped_loss(
    experiment: Experiment, learner: Learner, rows: Rows, stored: list[Any], backward: Backward
) -> dict[str, dict[str, Any]]:
    """The clipped objective over M rows. stored: per row x_0..x_K."""
    config = experiment.config
    pairs = make_pairs(rows, stored, experiment)
    done = []
    for part in pairs.parts(config.train.pairs_per_pass):
        terms = loss_terms(learner, part, config.train, config.replay.correction)
        backward(terms.loss.sum())
        done.append((terms.loss.detach(), terms.ratio.detach(), terms.clipped, terms.kl.detach()))
    return report(pairs, Terms(*(torch.cat(columns) for columns in zip(*done, strict=True))))


def loss_terms(learner: Learner, pairs: Pairs, config: TrainConfig, correction: str) -> Terms:
    """The objective (docs/maths.md, section 4) of every pair, already divided by |S_i|: summed over pairs, then divided by
    the number of trajectories, it is the loss L. correction: as in `ReplayConfig`."""
    policy, steps = learner.policy, pairs.steps
    sigmas = torch.as_tensor(pairs.grid.sigmas, device=steps.device)[steps]
    velocity = policy.velocity(pairs.latents, sigmas, policy.encode(pairs.texts))
    current = sampler.log_density(pairs.grid, steps, pairs.latents, pairs.following, velocity)
    centre = pairs.per_pair("behaviour_logprob" if correction == "step" else "old_logprob")
    log_ratio = objective.log_ratio(current, centre, pairs.latents[0].numel(), config.ratio_reduction)
    if config.ratio_norm:
        divergence = _divergence(learner, pairs, sigmas, velocity, config, learner.old)
        log_ratio = objective.normalised_log_ratio(log_ratio, divergence, pairs.std)
    ratio, advantage = log_ratio.exp(), pairs.per_row("advantage")
    loss = pairs.per_row("importance_weight") * objective.clipped_surrogate(ratio, advantage, config.clip_low, config.clip_high)
    kl = torch.zeros_like(ratio)
    if config.kl_beta > 0:
        kl = _divergence(learner, pairs, sigmas, velocity, config, learner.reference)
        loss = loss + config.kl_beta * kl
    clipped = objective.is_clipped(ratio, advantage, config.clip_low, config.clip_high)
    return Terms(loss * pairs.weight, ratio, clipped, kl)


def _divergence(
    learner: Learner, pairs: Pairs, sigmas: Tensor, velocity: Tensor, config: TrainConfig, other: Weights
) -> Tensor:
    """KL(current || other) per pair, (N,) float64, differentiable in the current policy."""
    policy = learner.policy
    with torch.no_grad():
        theirs = policy.velocity(pairs.latents, sigmas, policy.encode(pairs.texts), other)
    offset, other_offset = (sampler.offset(pairs.grid, pairs.steps, pairs.latents, v) for v in (velocity, theirs))
    return objective.gaussian_kl(offset, other_offset, pairs.std, config.ratio_reduction)


def _step_weights(grid: sampler.Transitions, row: Tensor, steps: Tensor, config: TrainConfig) -> Tensor:
    weight = torch.as_tensor(_weight_of_steps(grid, config), device=steps.device)[steps]
    totals = torch.zeros(int(row.max()) + 1, dtype=torch.float64, device=weight.device).index_add_(0, row, weight)
    return weight / totals[row]


def _weight_of_steps(grid: sampler.Transitions, config: TrainConfig) -> NDArray[np.float64]:
    """Weight of each of the T steps' losses, before they are made to sum to 1 over the trained ones: (T,)."""
    if config.step_weight == "transition_std":
        return grid.std
    if config.step_weight == "inverse_step":
        return 1 / -np.diff(grid.sigmas)
    return np.ones(grid.num_steps) if config.step_weight == "uniform" else np.array(config.step_weight)


def report(pairs: Pairs, terms: Terms) -> dict[str, dict[str, Any]]:
    """What the update did with each trajectory: its loss, and ratio, clip and KL per trained step."""
    report: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(pairs.rows):
        mine = pairs.row == i
        report[row["trajectory_id"]] = {
            "loss": float(terms.loss[mine].sum()),
            "ratio": terms.ratio[mine].tolist(),
            "clipped": terms.clipped[mine].tolist(),
            "kl": terms.kl[mine].tolist(),
        }
    return report
