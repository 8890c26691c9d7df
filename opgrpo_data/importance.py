"""Importance weights of stored trajectories, and the exact law that says beforehand how far they can be trusted.

For Gaussians of equal variance, under x ~ N(m_b, s^2): log(p_old / p_b) ~ N(-lambda/2, lambda) exactly, with the path variance
lambda = |m_old - m_b|^2 / s^2 (arXiv 2609.22041; docs/maths.md, section 5). Here Lambda is its sum over prefix steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def predicted_ess(path_variance: Sequence[float]) -> float:
    """exp(-Lambda): the effective sample size, as a share of the samples, that weights of this path variance leave.

    For log w ~ N(-Lambda/2, Lambda): E[w]^2 / E[w^2] = exp(-Lambda).
    """
    return math.exp(-math.fsum(path_variance))


def measured_ess(weights: NDArray[np.float64]) -> float:
    """(sum w)^2 / (n sum w^2) of n weights, in (0, 1]; of none, or of zeros alone, it is 0."""
    squares = float(np.square(weights).sum())
    return float(weights.sum() ** 2 / (len(weights) * squares)) if squares > 0 else 0.0


@dataclass(frozen=True)
class SelfNormalised:
    """An expectation under one policy from n samples that others drew (docs/maths.md, section 9).

    mean: sum w f / sum w. standard_error: of the mean, by the delta method over clusters; infinite where there is one cluster.
    ess: (sum w)^2 / sum w^2, in samples. mean_weight: 1 but for chance where the samples were drawn as the weights say.
    max_share: the largest weight's share of all.
    """

    mean: float
    standard_error: float
    ess: float
    mean_weight: float
    max_share: float


def self_normalised(log_weights: NDArray[np.float64], values: NDArray[np.float64], clusters: Sequence[str]) -> SelfNormalised:
    """The self-normalised importance sampling estimate of E[f] from n samples, n >= 1.

    log_weights: (n,) log p - log b of each sample, true densities. values: (n,) f. clusters: n names; samples of one cluster
    may depend on one another (members of a group share their initial noise). The error is that of a ratio of sums over
    clusters, with the factor C / (C - 1) of C clusters (Owen, Monte Carlo theory, methods and examples, section 9.2).
    """
    # Relative to the largest: a weight that overflows says nothing about the others.
    scaled = np.exp(log_weights - log_weights.max())
    share = scaled / scaled.sum()
    mean = float(share @ values)
    names, where = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(where, share * (values - mean), minlength=len(names))
    count = len(names)
    error = math.sqrt(count / (count - 1) * float(np.square(sums).sum())) if count > 1 else math.inf
    with np.errstate(over="ignore"):
        mean_weight = float(np.exp(log_weights).mean())
    return SelfNormalised(mean, error, measured_ess(scaled) * len(scaled), mean_weight, float(share.max()))


def longest_prefix(path_variance: Sequence[float], ess_floor: float) -> int:
    """The most steps K whose predicted effective sample size stays at or above `ess_floor`; 0 if not even one does."""
    kept = 0
    while kept < len(path_variance) and predicted_ess(path_variance[: kept + 1]) >= ess_floor:
        kept += 1
    return kept


def log_weight(old: Sequence[float], behaviour: Sequence[float]) -> float:
    """sum over prefix steps of (l_old - l_behaviour), the log of the sequence-level weight (arXiv 2604.04142; GSPO's)."""
    return math.fsum(old) - math.fsum(behaviour)


def damped(log_w: float, path_variance: float, budget: float) -> float:
    """Temper a log-weight so that its variance Lambda becomes `budget` where it is more (arXiv 2609.22041) [choice].

    a (log w + Lambda/2) - a^2 Lambda/2 with a = min(1, sqrt(budget / Lambda)): again of mean 1 under the behaviour policy,
    with variance a^2 Lambda. A budget of 0 gives weight 1.
    """
    if path_variance <= budget:
        return log_w
    scale = math.sqrt(budget / path_variance)
    return scale * (log_w + path_variance / 2) - scale**2 * path_variance / 2
