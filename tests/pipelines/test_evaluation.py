"""Stage `eval`: the same noise for every policy, dealt evenly, on the averaged weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.errors import StoreError
from pipelines import weights
from pipelines.evaluation import draw_samples, evaluate, evaluation_samples
from pipelines.experiment import Experiment
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.prompts import Prompt
from pipelines.train import train
from tests.pipelines.bad_rewards import Mood, brightness
from tests.pipelines.helpers import forked, perturbed, reopened, rows_of


@pytest.fixture
def experiment(planned: Path, tmp_path: Path) -> Experiment:
    """Ready to train iteration 0; not evaluated yet."""
    return forked(planned, tmp_path)


@given(prompts=st.integers(1, 7), count=st.integers(1, 30), seed=st.integers(0, 3))
@settings(deadline=None)
def test_samples_are_dealt_round_robin(prompts: int, count: int, seed: int) -> None:
    world = [Prompt(f"prompt {i}", {}) for i in range(prompts)]
    samples = evaluation_samples(world, count, seed)
    visited = min(prompts, count)
    # Fewer samples than prompts: evenly spaced over the list, which may hold kind after kind.
    assert [sample.prompt for sample in samples] == [world[i % visited * prompts // visited] for i in range(count)]
    per_prompt = Counter(sample.prompt.text for sample in samples)
    assert max(per_prompt.values()) - min(per_prompt.values()) <= 1
    assert len(per_prompt) == visited
    for prompt in world:
        indices = [sample.sample_index for sample in samples if sample.prompt == prompt]
        assert indices == list(range(len(indices)))
    assert len({sample.seed for sample in samples}) == count
    assert evaluation_samples(world, count, seed) == samples


def test_noise_depends_on_seed_prompt_and_index_alone() -> None:
    world = [Prompt(f"prompt {i}", {}) for i in range(3)]
    seeds = {(s.prompt.text, s.sample_index): s.seed for s in evaluation_samples(world, 9, 0)}
    reversed_world = {(s.prompt.text, s.sample_index): s.seed for s in evaluation_samples(world[::-1], 9, 0)}
    assert seeds == reversed_world
    assert not set(seeds.values()) & {s.seed for s in evaluation_samples(world, 9, 1)}


def test_without_held_out_prompts() -> None:
    with pytest.raises(StoreError, match='no held-out prompts: give the prompt file lines with "split": "held_out"'):
        evaluation_samples([], 4, 0)


def test_rows_are_what_was_measured(experiment: Experiment) -> None:
    outcome = evaluate(experiment, 0)
    rows = rows_of(experiment, "evals")
    held_out = experiment.prompts["held_out"]
    assert [row["prompt_id"] for row in rows] == [held_out[i * 128 // 6].prompt_id for i in range(6)]
    assert all((row["sampler"], row["num_steps"], row["reward"], row["version"]) == ("ode", 3, "moody", "1") for row in rows)
    pictures = draw_samples(experiment.policy, evaluation_samples(held_out, 6, 0), 3)
    values = np.array([brightness(picture) for picture in pictures])
    np.testing.assert_allclose([row["value"] for row in rows], values)
    assert outcome.detail["mean"] == pytest.approx(values.mean())
    assert outcome.detail["standard_error"] == pytest.approx(values.std(ddof=1) / 6**0.5)
    assert (outcome.done, outcome.detail["samples"]) == (6, 6)
    assert {row["policy_id"] for row in rows} == {experiment.learner(0).policy_id}


def test_every_policy_meets_the_same_noise(experiment: Experiment) -> None:
    evaluate(experiment, 0)
    train(experiment, 0)
    evaluate(experiment, 1)
    before, after = rows_of(experiment, "evals", 0), rows_of(experiment, "evals", 1)
    for name in ("prompt_id", "sample_index", "seed", "num_steps"):
        assert [row[name] for row in before] == [row[name] for row in after]
    assert before[0]["policy_id"] != after[0]["policy_id"]
    assert [row["value"] for row in before] != [row["value"] for row in after]


def test_the_average_is_evaluated_and_kept_and_training_goes_on_from_the_policy(experiment: Experiment) -> None:
    train(experiment, 0)
    trained, average = experiment.learner(1).policy_id, experiment.learner(1).average_id
    assert evaluate(experiment, 1).detail["policy_id"] == average != trained
    assert experiment.learner(1).policy_id == trained
    path = f"policies/{average}/weights.safetensors"
    kept = weights.from_bytes(experiment.store.directory.read(path), path)
    assert weights.policy_id(kept) == average
    document = next(d for d in experiment.store.documents("policies/*/policy.json") if d["policy_id"] == average)
    assert (document["kind"], document["parent_id"]) == ("average", trained)


def test_evaluating_again_does_nothing(experiment: Experiment, mood: Mood) -> None:
    assert evaluate(experiment, 0, dry_run=True).done == 6
    assert rows_of(experiment, "evals") == []
    first = evaluate(experiment, 0)
    mood.batches.clear()
    again = evaluate(reopened(experiment), 0)
    assert (again.done, again.skipped) == (0, 6)
    assert again.detail == first.detail
    assert mood.batches == []


def test_another_version_of_the_reward_is_another_evaluation(experiment: Experiment, mood: Mood) -> None:
    evaluate(experiment, 0)
    mood.version = "2"
    assert evaluate(experiment, 0).done == 6
    assert Counter(row["version"] for row in rows_of(experiment, "evals")) == {"1": 6, "2": 6}


@pytest.mark.parametrize(
    ("kind", "message"),
    [("raises", "RuntimeError: the reward server is down"), ("nan", "the value is nan, not a finite number")],
)
def test_a_reward_that_fails_stops_the_evaluation(experiment: Experiment, mood: Mood, kind: str, message: str) -> None:
    mood.kind = kind
    with pytest.raises(ValueError, match=f"reward moody failed on a sample of '.*': {message}"):
        evaluate(experiment, 0)
    assert rows_of(experiment, "evals") == []
    assert experiment.learner(0).policy_id == experiment.learner(0).average_id
    mood.kind = "good"
    assert evaluate(experiment, 0).done == 6


def test_pictures_do_not_depend_on_the_batch(policy: PipelinePolicy) -> None:
    samples = evaluation_samples([Prompt(t, {}) for t in ("a red circle", "two blue squares")], 6, 0)
    together = draw_samples(policy, samples, 4)
    for sample, picture in zip(samples, together, strict=True):
        alone = draw_samples(policy, [sample], 4)[0]
        # A value on the edge between two integers may round the other way.
        assert np.abs(alone.astype(int) - picture.astype(int)).max() <= 1
    weights.copy_into(policy.trainable, perturbed(policy, 0.2, 0))
    assert not np.array_equal(draw_samples(policy, samples, 4)[0], together[0])
