"""The loop over the stages: `opgrpo run`. The same functions as the separate commands, with the model kept in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow.compute as pc

from pipelines import media
from pipelines.evaluation import draw_samples, evaluate, evaluation_name, evaluation_samples, gain, judge_samples
from pipelines.experiment import Experiment, Outcome
from pipelines.prompts import Prompt, thinned
from pipelines.rewards.base import Media
from pipelines.rollout import rollout
from pipelines.score import reward_files, score
from pipelines.selection import select
from pipelines.train import train

STAGES: tuple[Callable[[Experiment, int], Outcome], ...] = (rollout, score, select, train)
"""What an iteration consists of, in order."""

OFFLINE_STAGES: tuple[Callable[[Experiment, int], Outcome], ...] = (rollout, select, train)
"""Of an offline run, whose `rollout` draws nothing: the old policy judges stored trajectories there."""

GRID_PROMPTS = 10
GRID_PICTURES = 5


@dataclass(frozen=True)
class Result:
    """What a run came to.

    algorithm: of the configuration. reward: what was trained on. policy_id: the averaged weights after the last iteration.
    held_out_before, held_out_after: mean evaluation reward of the base policy and of that one; gain_error: standard error of
    their difference. None without held-out prompts.
    """

    store: str
    run_id: str
    algorithm: str
    reward: str
    policy_id: str
    iterations: int
    held_out_before: float | None
    held_out_after: float | None
    gain_error: float | None
    samples: int
    seconds: float
    picture: str | None


def run(experiment: Experiment) -> Result:
    """All iterations of the configuration, from wherever the store says the run is; evaluations before, between, after.

    Raises ValueError when the run is further already.
    """
    began = time.monotonic()
    last, started = experiment.config.iterations, experiment.iteration
    if started > last:
        raise ValueError(f"run {experiment.run_id} is trained to iteration {started} already: iterations={last} is behind it")
    measured = bool(experiment.prompts["held_out"])
    if not measured:
        experiment.progress.warn('no held-out prompts, so nothing is evaluated: give some prompts "split": "held_out"')
    for iteration in range(started, last):
        if measured and _due(experiment, iteration):
            _tell(experiment, evaluate(experiment, iteration))
        _iterate(experiment, iteration)
    policy_id = experiment.keep_average(last)
    reward = experiment.reward(experiment.config.reward).name
    common = (experiment.store.directory.url, experiment.run_id, experiment.config.algorithm, reward, policy_id, last)
    if not measured:
        return Result(*common, None, None, None, 0, time.monotonic() - began, None)
    before, after = evaluate(experiment, 0), evaluate(experiment, last)
    _tell(experiment, after)
    return Result(
        *common,
        held_out_before=before.detail["mean"],
        held_out_after=after.detail["mean"],
        gain_error=gain(experiment, 0, last)[1],
        samples=after.detail["samples"],
        seconds=time.monotonic() - began,
        picture=_picture(experiment),
    )


def _iterate(experiment: Experiment, iteration: int) -> None:
    began, offline = time.monotonic(), experiment.config.algorithm == "offline"
    for stage in OFFLINE_STAGES if offline else STAGES:
        stage(experiment, iteration)
    store = experiment.store
    if offline:
        updates = store.read_tables("updates", store.files("updates", run=experiment.run_id, iteration=iteration))
        weight = pc.mean(updates["importance_weight"]).as_py()
        told = f"{updates.num_rows} stored trajectories, mean weight {weight:.3f}"
    else:
        rewards = store.read_tables("rewards", reward_files(experiment, iteration))
        told = f"reward {pc.mean(rewards['value']).as_py():.3f}"
    spent = time.monotonic() - began
    experiment.progress.say(f"iteration {iteration + 1}/{experiment.config.iterations}: {told}, {spent:.1f} s")


def _due(experiment: Experiment, iteration: int) -> bool:
    """Whether the policy at the start of `iteration` is to be evaluated on the way. Asked before the iteration begins, so
    that a run that was killed in an evaluation makes up for it."""
    every = experiment.config.eval.every
    return iteration == 0 or (every is not None and iteration % every == 0)


def _tell(experiment: Experiment, outcome: Outcome) -> None:
    told = outcome.detail
    experiment.progress.say(
        f"iteration {outcome.iteration}: held-out {told['reward']} {told['mean']:.3f} "
        f"± {told['standard_error']:.3f} ({told['samples']} samples)"
    )


def _picture(experiment: Experiment) -> str:
    """Write the same held-out noise, denoised by the first and by the last policy, side by side; returns its path."""
    path = f"runs/{experiment.run_id}/before_after_{experiment.config.iterations:06d}.{evaluation_name(experiment)}.png"
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
    verdicts = judge_samples(experiment.reward(experiment.config.eval_reward), samples, pictures)
    framed = [(picture, (verdict.value or 0) >= 0.5) for picture, verdict in zip(pictures, verdicts, strict=True)]
    return [framed[row :: len(prompts)] for row in range(len(prompts))]
