"""The learner: what is saved is everything, bit for bit, and the average is the average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store
from pipelines import weights
from pipelines.learner import Learner
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.settings import TrainConfig
from tests.pipelines.helpers import each, flipped, shared_policy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store.create(str(tmp_path / "store"))


def _step(learner: Learner, seed: int) -> None:
    """One optimizer step on a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.optimizer.step()


def _copied(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


def test_a_new_learner_is_the_base_policy(policy: PipelinePolicy) -> None:
    learner = Learner(policy, TrainConfig())
    assert learner.iteration == 0
    assert learner.policy_id == learner.average_id == weights.policy_id(learner.base)
    assert set(learner.parameters) == set(dict(policy.trainable.named_parameters()))


def test_adamw_takes_the_configured_step(policy: PipelinePolicy) -> None:
    """First AdamW step in closed form: w (1 - lr decay) - lr g / (|g| + eps), whatever the betas."""
    config = TrainConfig(lr=0.01, betas=(0.5, 0.9), weight_decay=0.1)
    learner = Learner(policy, config)
    before = _copied(learner)
    _step(learner, 0)
    for name, parameter in learner.parameters.items():
        assert parameter.grad is not None
        w, g = before[name].double().numpy(), parameter.grad.double().numpy()
        golden = w * (1 - 0.01 * 0.1) - 0.01 * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(parameter.detach().numpy(), golden, atol=2e-6)


def test_average_is_exponential(policy: PipelinePolicy) -> None:
    learner = Learner(policy, TrainConfig(lr=0.01, ema_decay=0.7))
    golden = {name: tensor.double().numpy() for name, tensor in learner.base.items()}
    for seed in range(3):
        _step(learner, seed)
        learner.update_average(0)
        for name, parameter in learner.parameters.items():
            golden[name] = 0.7 * golden[name] + 0.3 * parameter.detach().double().numpy()
    for name, tensor in learner.average.items():
        np.testing.assert_allclose(tensor.numpy(), golden[name], rtol=1e-5, atol=1e-6)
    assert learner.average_id != learner.policy_id


def test_without_decay_the_average_is_the_policy(policy: PipelinePolicy) -> None:
    learner = Learner(policy, TrainConfig(ema_decay=0.0))
    _step(learner, 0)
    learner.update_average(0)
    for _, average, parameter in each(learner.average, learner.parameters):
        torch.testing.assert_close(average, parameter.detach(), rtol=0, atol=1e-7)


def test_averaged_swaps_and_restores(policy: PipelinePolicy) -> None:
    learner = Learner(policy, TrainConfig(lr=0.01))
    _step(learner, 0)
    learner.update_average(0)
    trained = learner.policy_id
    with learner.averaged():
        assert learner.policy_id == learner.average_id != trained
    assert learner.policy_id == trained
    with pytest.raises(RuntimeError, match="inside"), learner.averaged():
        raise RuntimeError("inside")
    assert learner.policy_id == trained


def test_save_and_load_restore_every_bit(policy: PipelinePolicy, store: Store) -> None:
    config = TrainConfig(lr=0.01)
    learner = Learner(policy, config)
    for seed in range(2):
        _step(learner, seed)
        learner.update_average(0)
    learner.save(store, "run", 2)
    ids = learner.policy_id, learner.average_id
    named = [(m, n, p) for n, p in learner.parameters.items() for m in ("exp_avg", "exp_avg_sq", "step")]
    moments = {(m, n): learner.optimizer.state[p][m].clone() for m, n, p in named}
    _step(learner, 9)
    learner.update_average(0)
    after = _copied(learner)
    average_after = {name: tensor.clone() for name, tensor in learner.average.items()}

    other = Learner(shared_policy(), config)
    other.load(store, "run", 2, ids[0])
    assert other.iteration == 2
    assert (other.policy_id, other.average_id) == ids
    for (moment, name), tensor in moments.items():
        assert torch.equal(other.optimizer.state[other.parameters[name]][moment], tensor)
    _step(other, 9)
    other.update_average(0)
    for _, ours, theirs in each(_copied(other), after):
        assert torch.equal(ours, theirs)
    for _, ours, theirs in each(other.average, average_after):
        assert torch.equal(ours, theirs)


def test_loading_into_a_used_learner_forgets_what_it_was(policy: PipelinePolicy, store: Store) -> None:
    learner = Learner(policy, TrainConfig(lr=0.01))
    base_id = learner.policy_id
    _step(learner, 0)
    learner.save(store, "run", 1)
    trained = learner.policy_id
    for seed in range(1, 4):
        _step(learner, seed)
        learner.update_average(0)
    learner.load(store, "run", 1, trained)
    assert learner.policy_id == trained
    assert learner.average_id == base_id
    assert {int(learner.optimizer.state[p]["step"]) for p in learner.parameters.values()} == {1}
    learner.reset()
    assert learner.policy_id == learner.average_id == base_id
    assert not learner.optimizer.state
    assert learner.iteration == 0


def test_states_of_two_processes_lie_side_by_side(policy: PipelinePolicy, store: Store) -> None:
    learner = Learner(policy, TrainConfig(lr=0.01))
    policies = []
    for seed in range(2):
        _step(learner, seed)
        learner.save(store, "run", 1)
        policies.append(learner.policy_id)
    assert policies[0] != policies[1]
    for policy_id in policies:
        learner.load(store, "run", 1, policy_id)
        assert learner.policy_id == policy_id


@pytest.mark.parametrize("keep", [2, 3])
def test_prune_keeps_the_newest_of_its_run(policy: PipelinePolicy, store: Store, keep: int) -> None:
    learner = Learner(policy, TrainConfig(keep_states=keep))
    _step(learner, 0)
    for iteration in range(1, 5):
        learner.save(store, "run", iteration)
    learner.save(store, "run-2", 1)
    learner.prune(store, "run")
    kept = sorted(path.parent.name for path in Path(store.directory.path("states/run=run")).glob("*/*"))
    assert kept == [f"iter={i:06d}" for i in range(5 - keep, 5)]
    assert len(store.directory.list("states/run=run-2/iter=000001/*.safetensors")) == 1
    with pytest.raises(StoreError, match=r"run run keeps no training state of iteration 1; it keeps \[[23], "):
        learner.load(store, "run", 1, learner.policy_id)
    learner.prune(store, "none")


@pytest.mark.parametrize(
    ("lost", "kept", "remedy"),
    [
        (3, [2], "remove the updates of iteration 2 and train that one again"),
        (3, [1, 4], "begin a run of another name (`opgrpo init` with --set name=...)"),
        (3, [], "begin a run of another name (`opgrpo init` with --set name=...)"),
        (1, [], "remove the updates of iteration 0 and train that one again"),
    ],
)
def test_only_an_iteration_whose_beginning_is_kept_can_be_trained_again(
    lost: int, kept: list[int], remedy: str, policy: PipelinePolicy, store: Store
) -> None:
    learner = Learner(policy, TrainConfig())
    _step(learner, 0)
    for iteration in kept:
        learner.save(store, "run", iteration)
    with pytest.raises(StoreError) as caught:
        learner.load(store, "run", lost, learner.policy_id)
    assert str(caught.value) == (
        f"run run keeps no training state of iteration {lost}; it keeps {kept}. Restore it from a copy, or {remedy}"
    )


def test_a_missing_state_and_a_damaged_one(policy: PipelinePolicy, store: Store) -> None:
    learner = Learner(policy, TrainConfig())
    with pytest.raises(StoreError, match=r"run run keeps no training state of iteration 3; it keeps \[\]"):
        learner.load(store, "run", 3, learner.policy_id)
    _step(learner, 0)
    learner.save(store, "run", 1)
    path = f"states/run=run/iter=000001/{learner.policy_id}.safetensors"
    flipped(Path(store.directory.path(path)), 3)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        learner.load(store, "run", 1, learner.policy_id)


def test_reference_is_the_base(policy: PipelinePolicy) -> None:
    learner = Learner(policy, TrainConfig(lr=0.01))
    for seed in range(2):
        _step(learner, seed)
        assert weights.policy_id(learner.reference) == weights.policy_id(learner.base)
    assert learner.policy_id != weights.policy_id(learner.base)
