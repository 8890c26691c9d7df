"""The ratio law: measured against predicted variance of the log-ratio, per denoising step, between policies iterations apart.

python -m benchmarks.steps_to_target.conditioning             trains 24 iterations, measures, prints and keeps the numbers
python -m benchmarks.steps_to_target.conditioning --summary   prints the committed numbers

Trajectories are drawn by the policy of one iteration on held-out prompts, so no policy was taught by them, and judged by later
ones: log r + lambda/2 then has mean 0 and variance lambda at every step (docs/maths.md, section 5).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.steps_to_target.arms import ARMS, BASE, merged
from benchmarks.steps_to_target.tasks import TASKS
from opgrpo_data import ids
from opgrpo_data.importance import measured_ess
from pipelines import sampler
from pipelines.config import RunConfig, build_config
from pipelines.experiment import Experiment
from pipelines.groups import Member
from pipelines.loop import STAGES
from pipelines.progress import Progress
from pipelines.sampler import Transitions
from pipelines.trajectories import Drawn, Stored, draw_fresh, evaluate

RESULTS = Path(__file__).parent / "results" / "conditioning.parquet"
DRAWN_AT = 4
LAGS = (1, 5, 20)
TRAJECTORIES = 2048
BATCH = 256


def config() -> RunConfig:
    """Flow-GRPO on the compositional task, every training state kept."""
    own: dict[str, Any] = {
        "name": "conditioning",
        "iterations": DRAWN_AT + max(LAGS),
        "train": {"lr": 2e-4, "keep_states": DRAWN_AT + max(LAGS) + 1},
    }
    return build_config(merged(BASE, TASKS["compositional"].settings, ARMS["flow_grpo"].settings, own), "conditioning")


def measure(folder: Path) -> pl.DataFrame:
    """One row per lag and denoising step: predicted and measured variance, their ratio, mean of the standardised log-ratio."""
    experiment = Experiment.init(str(folder), config(), Progress(quiet=True))
    for iteration in range(experiment.config.iterations):
        for stage in STAGES:
            stage(experiment, iteration)
    rollout = experiment.config.rollout
    grid = sampler.transitions(rollout.sampler, experiment.policy.sigmas(rollout.num_steps), rollout.noise_level)
    experiment.learner(DRAWN_AT)
    batches = [(members, draw_fresh(experiment.policy, members, grid, "float32")) for members in _members(experiment)]
    return pl.DataFrame([row for lag in LAGS for row in _at(experiment, lag, batches, grid)])


def _members(experiment: Experiment) -> Iterator[list[Member]]:
    prompts = experiment.prompts["held_out"]
    for start in range(0, TRAJECTORIES, BATCH):
        seeds = [ids.derived_seed("conditioning", number) for number in range(start, start + BATCH)]
        chosen = [prompts[number % len(prompts)] for number in range(start, start + BATCH)]
        yield [Member("", "", prompt, 0, seed, seed, None) for prompt, seed in zip(chosen, seeds, strict=True)]


def _at(
    experiment: Experiment, lag: int, batches: list[tuple[list[Member], Drawn]], grid: Transitions
) -> Iterator[dict[str, Any]]:
    experiment.learner(DRAWN_AT + lag)
    log_ratios, variances = [], []
    for members, drawn in batches:
        texts = [member.prompt.text for member in members]
        stored = Stored(texts, drawn.latents, drawn.behaviour_logprob.tolist(), drawn.noise_seeds)
        judged = evaluate(experiment.policy, stored, grid)
        log_ratios.append((judged.logprob - drawn.behaviour_logprob).numpy())
        variances.append(judged.path_variance.numpy())
    log_ratio, variance = np.concatenate(log_ratios), np.concatenate(variances)
    for k in range(grid.num_steps):
        centred = log_ratio[:, k] + variance[:, k] / 2
        # lambda differs from trajectory to trajectory; the law holds for each, so the standardised ratio has variance 1.
        standard = centred / np.sqrt(variance[:, k])
        weights = np.exp(log_ratio[:, : k + 1].sum(1))
        yield {
            "lag": lag,
            "step": k,
            "trajectories": len(standard),
            "predicted": float(variance[:, k].mean()),
            "measured": float(np.square(centred).mean()),
            "standardised_mean": float(standard.mean()),
            "standardised_variance": float(standard.var(ddof=1)),
            "predicted_ess": float(np.exp(-variance[:, : k + 1].sum(1)).mean()),
            "measured_ess": measured_ess(weights),
        }


def print_table(found: pl.DataFrame) -> None:
    """Markdown: one row a step, predicted and measured variance for each lag."""
    heads = ["step", *[f"lag {lag}: predicted / measured / z variance" for lag in LAGS]]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for k in sorted(found["step"].unique()):
        rows = [found.row(by_predicate=(pl.col("lag") == lag) & (pl.col("step") == k), named=True) for lag in LAGS]
        cells = [f"{r['predicted']:.3g} / {r['measured']:.3g} / {r['standardised_variance']:.3f}" for r in rows]
        print(f"| {k} | " + " | ".join(cells) + " |")


def draw(found: pl.DataFrame, picture: Path) -> None:
    """Predicted (line) and measured (dots) variance of the log-ratio against the denoising step, one colour a lag."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4.2))
    for lag in LAGS:
        rows = found.filter(pl.col("lag") == lag).sort("step")
        line = panel.plot(rows["step"], rows["predicted"], label=f"lag {lag}: predicted")[0]
        panel.plot(rows["step"], rows["measured"], "o", color=line.get_color(), label=f"lag {lag}: measured")
    panel.set(yscale="log", xlabel="denoising step", ylabel="variance of the log-ratio (nats²)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Parse the command line, measure, keep, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--summary", action="store_true", help="print the committed numbers, measure nothing")
    arguments = parser.parse_args()
    if not arguments.summary:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder)).write_parquet(RESULTS)
    found = pl.read_parquet(RESULTS)
    print_table(found)
    if arguments.plot:
        draw(found, arguments.plot)


if __name__ == "__main__":
    main()
