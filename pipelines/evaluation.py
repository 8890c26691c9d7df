"""Stage `eval`: held-out quality of a policy: ODE sampler, held-out prompts, the same noise for every policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from opgrpo_data import ids
from opgrpo_data.errors import StoreError
from opgrpo_data.io import checked_name
from opgrpo_data.schema import EVALS, table_of
from opgrpo_data.store import iteration_folder
from pipelines import sampler
from pipelines.experiment import Experiment, Outcome
from pipelines.policies.base import Policy
from pipelines.prompts import Prompt, thinned
from pipelines.rewards.base import Media, Reward
from pipelines.rewards.judge import Judgement, judge


@dataclass(frozen=True)
class Sample:
    """One evaluation picture to be drawn: sample_index counts the samples of one prompt."""

    prompt: Prompt
    sample_index: int
    seed: int


def evaluate(experiment: Experiment, iteration: int, dry_run: bool = False) -> Outcome:
    """Evaluate the averaged weights at the start of `iteration`, and keep them in the store as a policy.

    Raises ValueError when the prompts have no held-out split or the reward fails.
    """
    store, path = experiment.store, evaluation_path(experiment, iteration)
    if store.directory.exists(path):
        table = store.read_tables("evals", [path])
        return Outcome("eval", iteration, 0, table.num_rows, _summary(table))
    if dry_run:
        return Outcome("eval", iteration, experiment.config.eval.samples, 0)
    policy_id = experiment.keep_average(iteration)
    told = {"run_id": experiment.run_id, "iteration": iteration, "policy_id": policy_id}
    with experiment.learner(iteration).averaged():
        table = table_of([told | row for row in _evaluate(experiment)], EVALS)
    store.publish_table(path, table)
    return Outcome("eval", iteration, table.num_rows, 0, _summary(table))


def evaluation_path(experiment: Experiment, iteration: int) -> str:
    """Where the evaluation of an iteration lies."""
    return f"{iteration_folder('evals', experiment.run_id, iteration)}/{evaluation_name(experiment)}.parquet"


def evaluation_name(experiment: Experiment) -> str:
    """Reward, version and settings, as part of a file name: with others it is another evaluation."""
    config, reward = experiment.config.eval, experiment.reward(experiment.config.eval_reward)
    judged = f"{checked_name(reward.name, 'reward')}.v{checked_name(reward.version, 'version')}"
    return f"{judged}.{config.samples}samples-{config.num_steps}steps-seed{config.seed}"


def gain(experiment: Experiment, first: int, second: int) -> tuple[float, float]:
    """Mean difference of two evaluations and its standard error, sample by sample: both policies got the same noise."""
    tables = [experiment.store.read_tables("evals", [evaluation_path(experiment, i)]) for i in (first, second)]
    before, after = (table.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")]) for table in tables)
    return _mean_and_error(pc.subtract(after["value"], before["value"]))


def _summary(table: pa.Table) -> dict[str, Any]:
    mean, error = _mean_and_error(table["value"])
    return {
        "policy_id": table["policy_id"][0].as_py(),
        "reward": table["reward"][0].as_py(),
        "mean": mean,
        "standard_error": error,
        "samples": table.num_rows,
    }


def _mean_and_error(values: pa.ChunkedArray) -> tuple[float, float]:
    """Mean and its standard error, samples taken as independent; of one sample the error is unknown: infinite."""
    count = len(values)
    error = pc.stddev(values, ddof=1).as_py() / count**0.5 if count > 1 else math.inf
    return pc.mean(values).as_py(), error


def _evaluate(experiment: Experiment) -> Iterator[dict[str, Any]]:
    config, reward = experiment.config.eval, experiment.reward(experiment.config.eval_reward)
    samples = evaluation_samples(experiment.prompts["held_out"], config.samples, config.seed)
    starts = range(0, len(samples), config.batch_size)
    for start in experiment.progress.bar(starts, "eval"):
        batch = samples[start : start + config.batch_size]
        pictures = draw_samples(experiment.policy, batch, config.num_steps)
        for sample, judged in zip(batch, judge_samples(reward, batch, pictures), strict=True):
            if judged.error is not None:
                raise ValueError(f"reward {reward.name} failed on a sample of {sample.prompt.text!r}: {judged.error}")
            yield {
                "prompt_id": sample.prompt.prompt_id,
                "sample_index": sample.sample_index,
                "seed": sample.seed,
                "sampler": "ode",
                "num_steps": config.num_steps,
                "reward": reward.name,
                "version": reward.version,
                "value": judged.value,
                "detail": judged.detail,
            }


def evaluation_samples(prompts: Sequence[Prompt], count: int, seed: int) -> list[Sample]:
    """`count` samples dealt evenly over the prompts; their noise depends on seed, prompt and index alone."""
    if not prompts:
        raise StoreError('no held-out prompts: give the prompt file lines with "split": "held_out"')
    chosen = thinned(prompts, count)
    dealt = ((chosen[i % len(chosen)], i // len(chosen)) for i in range(count))
    return [Sample(prompt, index, ids.derived_seed(seed, "eval", prompt.prompt_id, index)) for prompt, index in dealt]


def judge_samples(reward: Reward, samples: Sequence[Sample], pictures: Sequence[Media]) -> list[Judgement]:
    """Score B evaluation pictures."""
    return judge(reward, pictures, [s.prompt.text for s in samples], [s.prompt.metadata for s in samples])


def draw_samples(policy: Policy, samples: Sequence[Sample], num_steps: int) -> list[Media]:
    """Pictures of B samples by the ODE sampler: the deterministic path of the policy as it is."""
    grid = sampler.transitions("ode", policy.sigmas(num_steps), 0.0)
    seeds = [sample.seed for sample in samples]
    condition = policy.encode([sample.prompt.text for sample in samples])
    start = sampler.batch_noise(seeds, -1, policy.latent_shape, policy.device)
    path = sampler.draw(lambda x, sigma: policy.velocity(x, sigma, condition), start, grid, seeds, "float32")
    return policy.decode(path.latents[:, -1])
