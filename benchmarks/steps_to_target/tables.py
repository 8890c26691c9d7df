"""The benchmark's results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl

from benchmarks.steps_to_target import analysis
from benchmarks.steps_to_target.analysis import BASELINE, ArmCurves, arms_of, cost_to, curves, final_level, ratios
from benchmarks.steps_to_target.tasks import TASKS

ABLATED = "op_grpo"
ABLATION_LEVEL = 0.8
"""Of the compositional task: the ablations' shorter runs reach it."""
ABLATION_LAST = 30
ROLLOUT_COSTS = (1, 4, 16, 64)


def report(results: pl.DataFrame, samples: int) -> str:
    """All tables: per task the arms, then the ablations, the map, and what dearer rollouts would change.

    samples: of the bootstrap over seeds, for every interval; a tenth of it where there are four a row.
    """
    parts = [f"{', '.join(sorted(results['machine'].unique()))}; intervals: 95 %, bootstrap over seeds"]
    parts += list(_tasks(results.filter(pl.col("phase") != "ablation"), samples))
    parts += ["\n### Ablations of op_grpo, compositional\n", *_ablations(results, samples)]
    parts += ["\n### Where replay pays: the map, compositional\n", *_map(results, samples)]
    parts += ["\n### If a rollout cost more: seconds to Flow-GRPO's final level, relative to it\n"]
    parts += _rollout_costs(results, samples // 10)
    return "\n".join(parts)


def _tasks(results: pl.DataFrame, samples: int) -> Iterator[str]:
    for task, arms in analysis.summary(results, samples).items():
        found = dict(arms_of(results, task))
        levels = TASKS[task].levels
        yield f"\n### {task}: Flow-GRPO ends at {final_level(found[BASELINE]):.3f}\n"
        heads = ["arm", "seeds", "lr", "iterations", "model evaluations", "seconds", "last reward", f"last {TASKS[task].check}"]
        yield from _head(heads + [f"iterations to {level}" for level in levels])
        for name, costs in arms.items():
            arm, mean = found[name], found[name].reward.mean(0)
            rate = results.filter(task=task, arm=name).filter(pl.col("phase") != "search")["lr"][0]
            cells = [name, str(len(arm.reward)), f"{rate:.0e}"]
            cells += [_interval(costs[cost]) for cost in ("iterations", "model_evaluations", "wall")]
            cells += [f"{mean[-1]:.3f} ± {_spread(arm):.3f}", f"{arm.check.mean(0)[-1]:.3f}"]
            cells += [_number(cost_to(level, mean, arm.costs["iterations"].mean(0))) for level in levels]
            yield _line(cells)


def _ablations(results: pl.DataFrame, samples: int) -> Iterator[str]:
    """Iterations to a fixed level, relative to op_grpo's."""
    found = dict(arms_of(results, "compositional"))
    if ABLATED not in found:
        return
    yield from _head(
        ["arm", "seeds", f"iterations to {ABLATION_LEVEL}", f"relative to {ABLATED}", f"reward at iteration {ABLATION_LAST}"]
    )
    names = results.filter(phase="ablation")["arm"].unique(maintain_order=True)
    for name in (BASELINE, ABLATED, *names):
        arm = found[name]
        spent = cost_to(ABLATION_LEVEL, arm.reward.mean(0), arm.costs["iterations"].mean(0))
        told = ratios(arm, found[ABLATED], "iterations", samples, ABLATION_LEVEL)
        at = int(np.argmin(abs(arm.costs["iterations"].mean(0) - ABLATION_LAST)))
        yield _line([name, str(len(arm.reward)), _number(spent), _interval(told), f"{arm.reward.mean(0)[at]:.3f}"])


def _map(results: pl.DataFrame, samples: int) -> Iterator[str]:
    """Per cell: where the baseline begins and ends, and each arm's iterations to that level relative to the baseline's."""
    cells = results.filter(phase="map")
    names = [name for name in cells["arm"].unique(maintain_order=True) if name != BASELINE]
    yield from _head(["cell", "seeds", "start", "Flow-GRPO's end", *names])
    for setting in cells["setting"].unique(maintain_order=True):
        baseline = curves(cells, setting=setting, arm=BASELINE)
        told = [ratios(curves(cells, setting=setting, arm=name), baseline, "iterations", samples) for name in names]
        start = f"{baseline.reward[:, 0].mean():.3f}"
        yield _line([setting, str(len(baseline.reward)), start, f"{final_level(baseline):.3f}", *map(_interval, told)])


def _rollout_costs(results: pl.DataFrame, samples: int) -> Iterator[str]:
    yield from _head(["task", "arm", *[f"{factor} x" for factor in ROLLOUT_COSTS]])
    for task in TASKS:
        found = dict(arms_of(results.filter(phase="main"), task))
        if BASELINE not in found:
            continue
        for name in (name for name in found if name != BASELINE):
            cells = []
            for factor in ROLLOUT_COSTS:
                arm, baseline = _dearer(found[name], factor), _dearer(found[BASELINE], factor)
                cells.append(_interval(ratios(arm, baseline, "wall", samples)))
            yield _line([task, name, *cells])


def _dearer(arm: ArmCurves, factor: float) -> ArmCurves:
    """The same curves where drawing a trajectory takes `factor` times as long as it did."""
    wall = arm.costs["wall"] + (factor - 1) * arm.costs["rollout"]
    return ArmCurves(arm.reward, arm.check, {**arm.costs, "wall": wall})


def _spread(arm: ArmCurves) -> float:
    """Standard error over seeds of the last mean reward."""
    last = arm.reward[:, -1]
    return float(last.std(ddof=1) / math.sqrt(len(last))) if len(last) > 1 else math.nan


def _interval(told: Mapping[str, float | None]) -> str:
    if told["ratio"] is None:
        return "not reached"
    if told["low"] is None:
        return f"{told['ratio']:.2f}"
    high = "∞" if told["high"] is None else f"{told['high']:.2f}"
    return f"{told['ratio']:.2f} ({told['low']:.2f} to {high})"


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "not reached"


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _line(names)
    yield _line(["---"] * len(names))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
