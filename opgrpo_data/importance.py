"""Importance weights of stored trajectories, and the exact law that says beforehand how far they can be trusted.

For Gaussians of equal variance, under x ~ N(m_b, s^2): log(p_old / p_b) ~ N(-lambda/2, lambda) exactly, with the path variance
lambda = |m_old - m_b|^2 / s^2 (arXiv 2609.22041; docs/maths.md, section 5). Here Lambda is its sum over prefix steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
