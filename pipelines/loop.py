"""The loop over the stages: `opgrpo run`. The same functions as the separate commands, with the model kept in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pipelines import media
from pipelines.config import RunConfig
from pipelines.evaluation import draw_samples, evaluate, evaluation_samples, judge_samples
from pipelines.experiment import Experiment, Outcome
from pipelines.prompts import Prompt, thinned
from pipelines.rewards.base import Media
from pipelines.rollout import rollout
from pipelines.score import reward_files, score
from pipelines.selection import select
from pipelines.train import train

GRID_PROMPTS = 10
GRID_PICTURES = 5


@dataclass(frozen=True)
class Result:
    """What a run came to. held_out_*: mean evaluation reward; policy_id: the averaged weights that it is the reward of."""

    store: str
    run_id: str
    policy_id: str
    iterations: int
    held_out_before: float
    held_out_after: float
    standard_error: float
    samples: int
    seconds: float
    picture: str


def run(experiment: Experiment) -> Result:
    """All iterations of the configuration, from wherever the store says the run is; evaluations before, between, after."""
    began = time.monotonic()
    config = experiment.config
    before = evaluate(experiment, 0)
    _tell(experiment, before)
    for iteration in range(experiment.iteration, config.iterations):
        started = time.monotonic()
        rollout(experiment, iteration)
        score(experiment, iteration)
        select(experiment, iteration)
        train(experiment, iteration)
        _tell_iteration(experiment, iteration, time.monotonic() - started)
        if config.eval.every and (iteration + 1) % config.eval.every == 0:
            _tell(experiment, evaluate(experiment, iteration + 1))
    after = evaluate(experiment, config.iterations)
    _tell(experiment, after)
    return Result(
        store=experiment.store.directory.url,
        run_id=experiment.run_id,
        policy_id=after.detail["policy_id"],
        iterations=config.iterations,
        held_out_before=before.detail["mean"],
        held_out_after=after.detail["mean"],
        standard_error=after.detail["standard_error"],
        samples=after.detail["samples"],
        seconds=time.monotonic() - began,
        picture=_picture(experiment),
    )


def estimate(config: RunConfig) -> dict[str, Any]:
    """What `run` would do, from the configuration alone."""
    rollout = config.rollout
    trajectories = config.iterations * rollout.prompts_per_iteration * rollout.group_size
    return {
        "run_id": config.run_id,
        "algorithm": config.algorithm,
        "iterations": config.iterations,
        "trajectories": trajectories,
        "denoising_steps": trajectories * rollout.num_steps,
        "optimizer_steps": config.iterations * config.train.optimizer_steps,
        "evaluation_samples_each": config.eval.samples,
    }


def _tell(experiment: Experiment, outcome: Outcome) -> None:
    told = outcome.detail
    experiment.progress.say(
        f"iteration {outcome.iteration}: held-out {told['reward']} {told['mean']:.3f} "
        f"± {told['standard_error']:.3f} ({told['samples']} samples)"
    )


def _tell_iteration(experiment: Experiment, iteration: int, seconds: float) -> None:
    rewards = experiment.store.read_tables("rewards", reward_files(experiment, iteration))
    mean = pc.mean(rewards["value"]).as_py()
    experiment.progress.say(f"iteration {iteration + 1}/{experiment.config.iterations}: reward {mean:.3f}, {seconds:.1f} s")


def _picture(experiment: Experiment) -> str:
    """Write the same held-out noise, denoised by the first and by the last policy, side by side; returns its path."""
    path = f"runs/{experiment.run_id}/before_after_{experiment.config.iterations:06d}.png"
    if not experiment.store.directory.exists(path):
        shown = thinned(experiment.prompts["held_out"], GRID_PROMPTS)
        columns = [
            ("before", _judged(experiment, 0, shown)),
            (
                f"after {experiment.config.iterations} iterations",
                _judged(experiment, experiment.config.iterations, shown),
            ),
        ]
        with experiment.store.directory.write_atomic(path) as file:
            file.write(media.comparison_grid([prompt.text for prompt in shown], columns))
    return experiment.store.directory.path(path)


def _judged(experiment: Experiment, iteration: int, prompts: list[Prompt]) -> list[list[tuple[Media, bool]]]:
    """Per prompt, pictures of the averaged policy at `iteration` with their verdicts."""
    config = experiment.config.eval
    samples = evaluation_samples(prompts, len(prompts) * GRID_PICTURES, config.seed)
    learner = experiment.learner(iteration)
    with learner.averaged():
        pictures = draw_samples(experiment.policy, samples, config.num_steps)
    verdicts = judge_samples(experiment.reward(config.reward), samples, pictures)
    framed = [(picture, (verdict.value or 0) >= 0.5) for picture, verdict in zip(pictures, verdicts, strict=True)]
    return [framed[row :: len(prompts)] for row in range(len(prompts))]
