"""Pictures of the benchmark's results."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from benchmarks.steps_to_target import analysis
from benchmarks.steps_to_target.arms import MAIN


def draw_all(results: pl.DataFrame, folder: Path) -> None:
    """One picture a task: held-out reward against iterations, the main arms, mean of seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    names = [arm.name for arm in MAIN]
    for task in analysis.summary(results, samples=1):
        figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.2), sharey=True)
        arms = {name: arm for name, arm in analysis.arms_of(results, task) if name in names}
        level = analysis.final_level(arms[analysis.BASELINE])
        for panel, (cost, label) in zip(panels, (("iterations", "iterations"), ("wall", "seconds, one thread")), strict=True):
            for name, arm in arms.items():
                x = arm.costs[cost].mean(0)
                panel.plot(x, arm.reward.mean(0), label=f"{name} ({len(arm.reward)} seeds)")
                panel.fill_between(x, arm.reward.min(0), arm.reward.max(0), alpha=0.15)
            panel.axhline(level, color="grey", linestyle="--", linewidth=1)
            panel.set(xlabel=label, title=task)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("held-out reward")
        panels[1].legend(loc="lower right", fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"steps_to_target_{task}.png", dpi=110)
        pyplot.close(figure)
