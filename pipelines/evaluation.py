"""Stage `eval`: held-out quality of a policy: ODE sampler, held-out prompts, the same noise for every policy."""

from __future__ import annotations

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
from pipelines import sampler, weights
from pipelines.experiment import Experiment, Outcome
from pipelines.policies.base import Policy
from pipelines.prompts import Prompt, thinned
from pipelines.rewards.base import Media, Reward
from pipelines.score import Judgement, judge


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
    store, config = experiment.store, experiment.config.eval
    reward = experiment.reward(config.reward)
    name = f"{checked_name(reward.name, 'reward')}.v{checked_name(reward.version, 'version')}"
    path = f"{iteration_folder('evals', experiment.run_id, iteration)}/{name}.parquet"
    if store.directory.exists(path):
        table = store.read_tables("evals", [path])
        return Outcome("eval", iteration, 0, table.num_rows, _summary(table))
    if dry_run:
        return Outcome("eval", iteration, config.samples, 0)
    learner = experiment.learner(iteration)
    policy_id = learner.average_id
    with learner.averaged():
        rows = [
            {"run_id": experiment.run_id, "iteration": iteration, "policy_id": policy_id, **row}
            for row in _evaluate(experiment, reward)
        ]
    if iteration > 0:
        kept = weights.to_bytes(learner.average)
        experiment.register_policy(policy_id, learner.policy_id, iteration=iteration, kind="average", weights=kept)
    table = table_of(rows, EVALS)
    store.publish_table(path, table)
    return Outcome("eval", iteration, table.num_rows, 0, _summary(table))


def _summary(table: pa.Table) -> dict[str, Any]:
    mean, deviation = pc.mean(table["value"]).as_py(), pc.stddev(table["value"]).as_py()
    return {
        "policy_id": table["policy_id"][0].as_py(),
        "reward": table["reward"][0].as_py(),
        "mean": mean,
        "standard_error": deviation / table.num_rows**0.5,
        "samples": table.num_rows,
    }


def _evaluate(experiment: Experiment, reward: Reward) -> Iterator[dict[str, Any]]:
    config = experiment.config.eval
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
