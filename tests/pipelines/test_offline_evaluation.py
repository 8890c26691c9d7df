"""A policy's reward from what others drew: exact weights, honest about when they say nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store, weights_path
from pipelines import offline_evaluation, sampler, weights
from pipelines.experiment import Experiment
from pipelines.offline_evaluation import Estimate, evaluate_offline
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.progress import Progress
from pipelines.rescore import rescore
from pipelines.restore import restore
from pipelines.settings import RewardConfig
from pipelines.trajectories import read_prefix
from tests.pipelines.bad_rewards import Mood
from tests.pipelines.helpers import doubled, flipped, perturbed, rows_of, small

Row = dict[str, Any]


@pytest.fixture
def experiment(replayed: Path, tmp_path: Path) -> Experiment:
    """24 scored trajectories of three iterations; the last two groups hold a continuation each."""
    shutil.copytree(replayed, tmp_path / "store")
    return Experiment(Store.open(str(tmp_path / "store")), small(), Progress(quiet=True))


@pytest.fixture
def base(experiment: Experiment) -> str:
    """The policy that iteration 0 was drawn by."""
    identity: str = experiment.document["base_policy_id"]
    return identity


def evaluated(store: Store, policy_id: str, **options: Any) -> Estimate:
    """By the reward that the run has; its model is the tests' own code."""
    asked: dict[str, Any] = {"reward": "moody", "trust_code": True} | options
    return evaluate_offline(store, policy_id, **asked)


def fresh(experiment: Experiment, iteration: int | None = None) -> list[Row]:
    """Stored trajectories that continue nothing, with their rewards, in one order."""
    rewards = {row["trajectory_id"]: row["value"] for row in rows_of(experiment, "rewards")}
    rows = [row | {"reward": rewards[row["trajectory_id"]]} for row in rows_of(experiment, "trajectories", iteration)]
    return sorted((row for row in rows if not row["prefix_steps"]), key=lambda row: row["trajectory_id"])


def clustered_error(shares: Any, values: Any, groups: list[str]) -> float:
    """The delta method over groups, in NumPy."""
    mean = float(shares @ values)
    sums = [float((shares * (values - mean))[np.array(groups) == group].sum()) for group in sorted(set(groups))]
    return float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()))


def register(experiment: Experiment, values: dict[str, torch.Tensor], name: str) -> str:
    """Put weights into the store as the average of a run that went on, so that `restore` finds them."""
    identity = weights.policy_id(values, "")
    document = {"base_model": "embedded", "family": name, "run_id": small().run_id, "iteration": 3, "kind": "average"}
    experiment.store.add_policy(identity, document, weights.to_bytes(values, weights_path(identity)))
    return identity


def test_on_its_own_trajectories_every_weight_is_one(experiment: Experiment, base: str) -> None:
    found = evaluated(experiment.store, base, iterations=1)
    mine = fresh(experiment, 0)
    values = np.array([row["reward"] for row in mine])
    assert (found.trajectories, found.groups, found.iterations) == (8, 2, [0, 0])
    assert found.mean_weight == pytest.approx(1, abs=1e-5)
    assert found.ess == pytest.approx(8, rel=1e-6)
    assert found.predicted_ess_share == pytest.approx(1, abs=1e-5)
    assert found.max_weight_share == pytest.approx(1 / 8, rel=1e-4)
    assert found.mean == pytest.approx(values.mean(), rel=1e-6)
    assert found.stored_mean == pytest.approx(values.mean(), rel=1e-12)
    groups = [row["group_id"] for row in mine]
    assert found.standard_error == pytest.approx(clustered_error(np.full(8, 1 / 8), values, groups), rel=1e-3)
    assert (found.reward, found.version, found.policy_id) == ("moody", "1", base)
    assert not found.meaningful  # eight trajectories
    assert found.verdict.startswith("meaningless: the effective sample size is 8.0 trajectories, below 50; one trajectory")


def log_densities(policy: PipelinePolicy, experiment: Experiment, row: Row) -> float:
    """log-density of a stored path under a policy, step by step, means and densities in float64 NumPy."""
    config = experiment.config.rollout
    grid = sampler.transitions(config.sampler, policy.sigmas(config.num_steps), config.noise_level)
    states = read_prefix(experiment.store.directory, row, grid.num_steps)
    text = experiment.prompt_of[row["prompt_id"]].text
    total = 0.0
    for k in np.flatnonzero(grid.std > 0):
        sigma = torch.tensor([grid.sigmas[k]], dtype=torch.float64)
        with torch.no_grad():
            velocity = policy.velocity(states[k : k + 1], sigma, policy.encode([text]))[0].double().numpy()
        x, following = states[k].double().numpy(), states[k + 1].double().numpy()
        mean = x + grid.state_coef[k] * x + grid.velocity_coef[k] * velocity
        total += float((-(((following - mean) / grid.std[k]) ** 2) / 2 - np.log(grid.std[k]) - np.log(2 * np.pi) / 2).sum())
    return total


def test_weights_are_those_of_whole_paths(experiment: Experiment, base: str) -> None:
    """Everything the estimate says, from densities that are computed anew."""
    found = evaluated(experiment.store, base)
    mine, policy = fresh(experiment), restore(experiment.store, base, trust_code=True).policy
    assert isinstance(policy, PipelinePolicy)
    log_w = np.array([log_densities(policy, experiment, row) - sum(row["behaviour_logprob"]) for row in mine])
    w, values = np.exp(log_w), np.array([row["reward"] for row in mine])
    assert found.trajectories == len(mine) == 22
    assert found.left_out["continuations"] == 2
    assert np.ptp(log_w) > 1e-3
    assert found.mean == pytest.approx(float(w @ values / w.sum()), rel=1e-5)
    assert found.ess == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), rel=1e-4)
    assert found.ess_share == pytest.approx(found.ess / 22, rel=1e-12)
    assert found.mean_weight == pytest.approx(float(w.mean()), rel=1e-4)
    assert found.max_weight_share == pytest.approx(float(w.max() / w.sum()), rel=1e-4)
    assert found.standard_error == pytest.approx(clustered_error(w / w.sum(), values, [r["group_id"] for r in mine]), rel=1e-3)


def test_a_far_policy_is_called_meaningless(experiment: Experiment, policy: PipelinePolicy) -> None:
    far = register(experiment, perturbed(policy, 0.3, 0), "tests.pipelines.helpers:shared_policy")
    found = evaluated(experiment.store, far[:8])
    assert found.policy_id == far
    assert not found.meaningful
    assert found.ess < 3
    assert found.predicted_ess_share < 0.01
    assert found.mean_weight < 1e-3
    assert "below 50; that is " in found.verdict
    assert "one trajectory has " in found.verdict
    assert found.verdict.endswith("(--last), draw some with this policy or one near it, or measure it: `opgrpo eval`")


def test_enough_near_trajectories_are_meaningful(experiment: Experiment, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_evaluation, "LEAST_EFFECTIVE", 7)
    monkeypatch.setattr(offline_evaluation, "LARGEST_SHARE", 0.2)
    found = evaluated(experiment.store, base, iterations=1)
    assert (found.meaningful, found.verdict) == (True, "meaningful")


def test_only_some_iterations_and_runs(experiment: Experiment, base: str) -> None:
    run = small().run_id
    last = rows_of(experiment, "updates", 1)[0]["new_policy_id"]
    assert evaluated(experiment.store, last, iterations=1, run="small").iterations == [2, 2]
    assert evaluated(experiment.store, last, iterations=2).iterations == [1, 2]
    assert evaluated(experiment.store, last, iterations=9, run=run).iterations == [0, 2]
    assert evaluated(experiment.store, base, iterations=9).iterations == [0, 0]
    with pytest.raises(StoreError, match=r"no run of this store with trajectories is 'other'; it has \['small-\w+'\]"):
        evaluated(experiment.store, base, run="other")


def test_the_policy_that_drew_an_iteration_finds_weights_of_one(experiment: Experiment) -> None:
    last = rows_of(experiment, "updates", 1)[0]["new_policy_id"]
    found = evaluated(experiment.store, last, iterations=1)
    assert found.trajectories == 6  # two of eight continue a prefix of other policies
    assert found.mean_weight == pytest.approx(1, abs=1e-5)
    assert found.left_out == {"continuations": 2, "damaged": 0, "unfit": 0}


def test_another_reward_and_several_versions(experiment: Experiment, base: str, mood: Mood) -> None:
    store, quiet = experiment.store, Progress(quiet=True)
    with pytest.raises(StoreError, match=r"^the store has no values of reward 'warmth'; it has moody@1$"):
        evaluated(store, base, reward="warmth")
    rescore(store, RewardConfig(name="tests.pipelines.plain_rewards:warmth"), run=None, dry_run=False, progress=quiet)
    assert evaluated(store, base, reward="warmth", iterations=1).reward == "warmth"
    mood.version = "2"
    rescore(store, RewardConfig(name="tests.pipelines.bad_rewards:moody"), run=None, dry_run=False, progress=quiet)
    with pytest.raises(StoreError, match=r"^reward 'moody' has values in several versions: .* one of moody@1, moody@2$"):
        evaluated(store, base)
    one, two = (evaluated(store, base, reward=f"moody@{version}", iterations=1) for version in "12")
    assert replace(one, version="2") == two
    with pytest.raises(StoreError, match=r"^the store has no values of reward 'moody@3'; it has moody@1, moody@2, warmth@\w+$"):
        evaluated(store, base, reward="moody@3")


def test_damaged_latents_are_left_out_and_stay_where_they_are(experiment: Experiment, base: str) -> None:
    row = fresh(experiment, 0)[0]
    flipped(Path(experiment.store.directory.path(row["latents_file"])), row["latents_offset"] + row["latents_header"] + 3)
    found = evaluated(experiment.store, base, iterations=1)
    assert (found.trajectories, found.left_out["damaged"]) == (7, 1)
    assert experiment.store.quarantined() == set()


def test_trajectories_that_two_shards_hold_count_once(experiment: Experiment, base: str) -> None:
    before = evaluated(experiment.store, base)
    doubled(experiment.store)
    assert evaluated(experiment.store, base) == before


def test_a_policy_whose_weights_are_gone(experiment: Experiment, base: str) -> None:
    trained = rows_of(experiment, "updates", 1)[0]["new_policy_id"]
    shutil.rmtree(experiment.store.directory.path("states"))
    with pytest.raises(
        StoreError,
        match=rf"^the store does not keep the weights of policy {trained} \(iteration 2 of run small-\w+\)\. "
        rf"Policies that it has: {base} \(base, iteration 0\)$",
    ):
        evaluated(experiment.store, trained)


def test_nothing_to_weigh(experiment: Experiment, base: str) -> None:
    for path in experiment.store.files("rewards", iteration=0):
        Path(experiment.store.directory.path(path)).unlink()
    with pytest.raises(StoreError, match=rf"no stored trajectory can be weighed for policy {base}: small-\w+ has 8 traj.* 0 "):
        evaluated(experiment.store, base, iterations=1)


def test_code_that_a_store_names_does_not_run(experiment: Experiment, base: str) -> None:
    with pytest.raises(
        StoreError, match=r"is built by 'tests.pipelines.helpers:shared_policy', Python code .* add --trust-code"
    ):
        evaluate_offline(experiment.store, base)
    with pytest.raises(StoreError, match=r"was trained on 'tests\.pipelines\.bad_rewards:moody', .* --reward, one of moody@1$"):
        evaluate_offline(experiment.store, base, trust_code=True)
