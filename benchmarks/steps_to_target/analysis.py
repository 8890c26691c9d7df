"""From curves to costs: what an arm spends until its mean curve reaches a level, relative to Flow-GRPO, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from benchmarks.steps_to_target.tasks import TASKS

BASELINE = "flow_grpo"
COSTS: Mapping[str, str] = {
    "iterations": "iteration",
    "generated": "generated",
    "model_evaluations": "model_evaluations",
    "wall": "cpu_seconds",
    "rollout": "rollout_seconds",
}
"""Name of a cost -> its column. wall is process time of one thread, evaluation left out: seconds on an idle core; rollout is
the part of it that drew trajectories."""
REPORTED = ("iterations", "generated", "model_evaluations", "wall")
INTERVAL_SEEDS = 3
"""With fewer there is no interval: a bootstrap over two runs is no evidence."""
FINAL_POINTS = 2
"""Flow-GRPO's final level is the mean of its last so many evaluations, over seeds."""
Curves = NDArray[np.float64]


@dataclass(frozen=True)
class ArmCurves:
    """S seeds of one arm at P evaluations. reward, check: (S, P); costs: name -> (S, P)."""

    reward: Curves
    check: Curves
    costs: Mapping[str, Curves]


def curves(results: pl.DataFrame, **where: Any) -> ArmCurves:
    """The runs of `results` that match, as arrays. Raises ValueError when they were evaluated at different iterations."""
    chosen = results.filter(**where).sort("seed", "iteration")
    runs = chosen.partition_by("seed", maintain_order=True)
    if len({tuple(run["iteration"]) for run in runs}) != 1:
        raise ValueError(f"the runs {where} were evaluated at different iterations, or there are none")
    stacked = {name: np.stack([run[name].to_numpy().astype(np.float64) for run in runs]) for name in _COLUMNS}
    return ArmCurves(stacked["reward"], stacked["check"], {name: stacked[column] for name, column in COSTS.items()})


_COLUMNS = ("reward", "check", *COSTS.values())


def final_level(arm: ArmCurves) -> float:
    """Mean reward of the last evaluations."""
    return float(arm.reward[:, -FINAL_POINTS:].mean())


def cost_to(level: float, reward: Curves, cost: Curves) -> float:
    """Cost at which a mean curve (P,) first reaches `level`, linear between evaluations; infinity when it never does."""
    reached = np.flatnonzero(reward >= level)
    if not len(reached):
        return math.inf
    at = int(reached[0])
    if at == 0:
        return float(cost[0])
    share = (level - reward[at - 1]) / (reward[at] - reward[at - 1])
    return float(cost[at - 1] + share * (cost[at] - cost[at - 1]))


def ratios(arm: ArmCurves, baseline: ArmCurves, cost: str, samples: int, level: float | None = None) -> dict[str, float | None]:
    """Cost of `arm` to the level over that of `baseline`, with a 95 % bootstrap interval over seeds of both.

    level: None takes the baseline's own final level, anew in each resample. A baseline that does not reach it within its run
    (its last points lie on both sides of their mean) is charged its whole run, which favours it. None where not reached.
    """
    rng = np.random.default_rng(0)
    draws = [_ratio(arm, baseline, cost, level, None)]
    draws += [_ratio(arm, baseline, cost, level, rng) for _ in range(samples)]
    low, high = (_finite(float(np.quantile(draws[1:], q, method="nearest"))) for q in (0.025, 0.975))
    seeds = min(len(arm.reward), len(baseline.reward))
    if seeds < INTERVAL_SEEDS:
        low = high = None
    return {"ratio": _finite(draws[0]), "seeds": seeds, "low": low, "high": high}


def _ratio(arm: ArmCurves, baseline: ArmCurves, cost: str, level: float | None, rng: np.random.Generator | None) -> float:
    ours, theirs = _pick(arm, rng), _pick(baseline, rng)
    target = baseline.reward[theirs, -FINAL_POINTS:].mean() if level is None else level
    spent = cost_to(target, arm.reward[ours].mean(0), arm.costs[cost][ours].mean(0))
    base = baseline.costs[cost][theirs].mean(0)
    whole = min(cost_to(target, baseline.reward[theirs].mean(0), base), float(base[-1]))
    return spent / whole if whole > 0 else math.inf  # a baseline that did not rise sets no target


def _pick(arm: ArmCurves, rng: np.random.Generator | None) -> NDArray[np.int64]:
    seeds = len(arm.reward)
    return np.arange(seeds) if rng is None else rng.integers(seeds, size=seeds)


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def arms_of(results: pl.DataFrame, task: str) -> Iterator[tuple[str, ArmCurves]]:
    """The arms of a task that were run in full: all phases but the search and the map."""
    told = results.filter(pl.col("phase").is_in(["main", "lever", "ablation"]), task=task)
    for name in told["arm"].unique(maintain_order=True):
        yield name, curves(told, arm=name)


Told = dict[str, dict[str, dict[str, dict[str, float | None]]]]


def summary(results: pl.DataFrame, samples: int) -> Told:
    """{task: {arm: {cost: {ratio, seeds, low, high}}}}, relative to Flow-GRPO's cost of its final level; null: not reached."""
    told: Told = {}
    for task in TASKS:
        arms = dict(arms_of(results, task))
        if BASELINE in arms:
            told[task] = {
                name: {cost: _one(arm) if name == BASELINE else ratios(arm, arms[BASELINE], cost, samples) for cost in REPORTED}
                for name, arm in arms.items()
            }
    return told


def _one(baseline: ArmCurves) -> dict[str, float | None]:
    return {"ratio": 1.0, "seeds": len(baseline.reward), "low": 1.0, "high": 1.0}
