"""The forward-process objective: stored samples are noised anew, and the policy is drawn to the good and away from the bad.

Where the clipped objective trains on the very noise that a trajectory was drawn with, and meets it again each time the
trajectory comes back, this one draws new noise at every use: a stored sample keeps teaching (DiffusionNFT, arXiv 2509.16117;
docs/maths.md, section 7).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from opgrpo_data import ids
from opgrpo_data.plan import origin
from pipelines import objective, sampler
from pipelines.experiment import Experiment
from pipelines.learner import Learner
from pipelines.loss import Backward
from pipelines.trajectories import to_tensor

Rows = list[dict[str, Any]]


def forward_loss(
    experiment: Experiment, learner: Learner, rows: Rows, stored: list[Any], backward: Backward
) -> dict[str, dict[str, Any]]:
    """The forward objective over M rows. stored: per row x_T, (1, ...)."""
    pairs, draws = experiment.config.train.pairs_per_pass, experiment.config.train.forward.draws
    size = len(rows) if pairs is None else max(pairs // draws, 1)
    told: dict[str, dict[str, Any]] = {}
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        loss = _losses(experiment, learner, part, stored[start : start + size])
        backward(loss.sum())
        told |= {row["trajectory_id"]: {"loss": float(value)} for row, value in zip(part, loss.detach(), strict=True)}
    return told


def _losses(experiment: Experiment, learner: Learner, rows: Rows, stored: list[Any]) -> Tensor:
    """The loss of each of M rows, (M,) float64, differentiable."""
    config, policy = experiment.config.train.forward, learner.policy
    samples = torch.cat([to_tensor(array, row["latent_dtype"]) for array, row in zip(stored, rows, strict=True)])
    samples = samples.to(policy.device).repeat_interleave(config.draws, 0)
    seeds = [_seed(experiment, row, draw) for row in rows for draw in range(config.draws)]
    noise = sampler.batch_noise(seeds, 0, samples.shape[1:], policy.device)
    sigmas = torch.tensor([_sigma(seed, config.sigma_shift) for seed in seeds], dtype=torch.float64, device=policy.device)
    at = sigmas.to(torch.float32).view(-1, *[1] * (samples.ndim - 1))
    noised = (1 - at) * samples + at * noise
    condition = policy.encode([experiment.prompt_of[row["prompt_id"]].text for row in rows for _ in range(config.draws)])
    with torch.no_grad():
        old = policy.velocity(noised, sigmas, condition, learner.old)
    current = policy.velocity(noised, sigmas, condition)
    optimal = objective.optimality(_per_row(rows, "advantage", policy.device), config.advantage_scale)
    optimal = optimal.repeat_interleave(config.draws)
    contrast = objective.forward_contrast(current, old, noise - samples, optimal, config.strength)
    return _per_row(rows, "importance_weight", policy.device) * contrast.view(len(rows), config.draws).mean(1)


def _per_row(rows: Rows, name: str, device: torch.device) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64, device=device)


def _seed(experiment: Experiment, row: dict[str, Any], draw: int) -> int:
    where = (row["iteration"], row["optimizer_step"], *origin(row), draw)
    return ids.derived_seed(experiment.config.seed, "forward", *where)


def _sigma(seed: int, shift: float) -> float:
    """Logit-normal noise level of one draw, in (0, 1)."""
    return 1 / (1 + math.exp(-(shift + float(sampler.noise(seed, 1, (1,))[0]))))
