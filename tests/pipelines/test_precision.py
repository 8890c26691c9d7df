"""Low precision: float32 masters, scaled gradients, and every way of training resumed bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opgrpo_data.store import Store
from pipelines import sampler, weights
from pipelines.config import RunConfig
from pipelines.experiment import Experiment
from pipelines.learner import Learner
from pipelines.loop import STAGES
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from pipelines.settings import TrainConfig
from tests.pipelines.helpers import created, each, merged, reopened, small

TEXTS = ["a red circle", "two blue squares"]
ADAPTER: Mapping[str, Any] = {"rank": 64, "alpha": 64}
"""Of 64 features: 4096 numbers a matrix, from where on the 8-bit optimizer uses 8 bits."""
KINDS: dict[str, dict[str, Any]] = {
    "whole, float32": {},
    "whole, bfloat16": {"dtype": "bfloat16"},
    "adapter, float32": {"lora": ADAPTER},
    "adapter, bfloat16": {"lora": ADAPTER, "dtype": "bfloat16"},
}


def _learner(options: Mapping[str, Any], **settings: Any) -> Learner:
    return Learner(load("embedded", device="cpu", **options), TrainConfig(**({"max_grad_norm": 1e9} | settings)))


def _velocity(policy: PipelinePolicy, **more: Any) -> Tensor:
    latents = sampler.batch_noise(range(len(TEXTS)), -1, policy.latent_shape, policy.device)
    return policy.velocity(latents, torch.tensor([0.9, 0.3]).double(), policy.encode(TEXTS), **more)


def _gradient(learner: Learner, size: float = 1.0) -> dict[str, Tensor]:
    """Of a loss of the velocity, as `step` sees it: gathered by `backward`, without the scale."""
    policy = learner.policy
    assert isinstance(policy, PipelinePolicy)
    learner.zero_grad()
    learner.backward(size * _velocity(policy).double().square().mean())
    return {name: p.grad / learner.loss_scale for name, p in learner.parameters.items() if p.grad is not None}


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Relative to the norm of all of it."""
    pairs = [(a.double(), b.double()) for _, a, b in each(ours, theirs)]
    norms = [
        sum(float(part.square().sum()) for part in parts) ** 0.5 for parts in ([a - b for a, b in pairs], [b for _, b in pairs])
    ]
    return float(norms[0] / norms[1])


def _random_step(learner: Learner, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.step(learner.config.lr)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for _, a, b in each(ours, theirs))


# -- masters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole, float32", "adapter, float32", "adapter, bfloat16"])
def test_float32_parameters_are_their_own_masters(kind: str) -> None:
    learner = _learner(KINDS[kind])
    assert learner.parameters.keys() == learner.model.keys() == weights.trainable(learner.policy.trainable).keys()
    assert all(parameter is learner.model[name] for name, parameter in learner.parameters.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_steps_that_rounding_would_lose_add_up(dtype: str) -> None:
    """Adam with one gradient again and again: g / (|g| + eps) of the learning rate each time, whatever the betas."""
    steps, lr = 40, 1e-6
    learner, kind = _learner({"dtype": dtype}, lr=lr), getattr(torch, dtype)
    assert not any(parameter is learner.model[name] for name, parameter in learner.parameters.items())
    before, model_before = _copied(learner.parameters), _copied(learner.model)
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in before.items()}
    for _ in range(steps):
        for name, parameter in learner.parameters.items():
            parameter.grad = gradients[name] * learner.loss_scale
        learner.step(lr)
    kept = moved = 0
    for name, parameter in learner.parameters.items():
        w, g = before[name].double().numpy(), gradients[name].double().numpy()
        golden = w - steps * lr * g / (np.abs(g) + 1e-8)
        # Each step rounds a master once.
        np.testing.assert_allclose(parameter.detach().numpy(), golden, rtol=steps * 2**-24, atol=steps * lr * 1e-3)
        used = learner.model[name]
        assert used.dtype == kind
        assert torch.equal(used, parameter.detach().to(kind))
        one_step = (model_before[name] - lr * gradients[name].sign().to(kind)).to(kind)
        lost = one_step == model_before[name]  # one step alone would be rounded away
        kept += int(lost.sum())
        moved += int((lost & (used != model_before[name])).sum())
    count = sum(tensor.numel() for tensor in before.values())
    assert kept > 0.8 * count
    assert moved > 0.005 * count


def test_the_model_holds_rounded_masters_after_real_steps() -> None:
    learner = _learner({"dtype": "bfloat16"}, lr=1e-4)
    before = _copied(learner.parameters)
    for _ in range(3):
        _gradient(learner)
        learner.step(1e-4)
    assert all(parameter.grad is None for parameter in learner.model.values())
    assert all(torch.equal(learner.model[name], p.detach().bfloat16()) for name, p in learner.parameters.items())
    assert not _equal(_copied(learner.parameters), before)
    assert any(not torch.equal(p.detach(), p.detach().bfloat16().float()) for p in learner.parameters.values())


def test_a_low_precision_gradient_is_gathered_in_float32() -> None:
    """Parts of a batch whose sum bfloat16 could not hold: 1 + 2^-9 is 1 there."""
    learner = _learner({"dtype": "bfloat16"})
    learner.zero_grad()
    name, used = next(iter(learner.model.items()))
    for size in (1.0, 2.0**-9):
        learner.backward(size * used.flatten()[0].float())
    found = learner.parameters[name].grad
    assert found is not None
    assert float(found.flatten()[0]) == 1 + 2.0**-9
    assert int(found.count_nonzero()) == 1


# -- float16 ----------------------------------------------------------------------------------------------------------


def test_float16_gradients_are_the_float32_models() -> None:
    golden = _gradient(_learner({}))
    assert _difference(_gradient(_learner({"dtype": "float16"})), golden) < 0.01
    assert _difference(_gradient(_learner({"dtype": "bfloat16"})), golden) < 0.1


@pytest.mark.parametrize("options", [{}, {"lora": ADAPTER}], ids=["whole", "adapter"])
def test_small_gradients_survive_in_float16_because_they_are_scaled(options: dict[str, Any]) -> None:
    """A loss of a hundred-thousandth, as of a small advantage: float16 ends at 6e-8."""
    size = 1e-5
    golden = _gradient(_learner(options), size)
    learner = _learner({**options, "dtype": "float16"})
    scaled = _gradient(learner, size)
    learner.loss_scale = 1.0
    unscaled = _gradient(learner, size)
    assert _difference(scaled, golden) < 0.02
    assert _difference(unscaled, golden) > 10 * _difference(scaled, golden)
    dead = sum(int((tensor == 0).sum()) for tensor in unscaled.values()) - sum(int((t == 0).sum()) for t in golden.values())
    assert dead > 0.3 * sum(tensor.numel() for tensor in unscaled.values())


def test_the_scale_does_not_change_a_step() -> None:
    """A power of two: the step of a float16 model's adapter is that of the unscaled gradient, to the last bit."""
    ends = []
    for scale in (1.0, 4096.0):
        learner = _learner({"lora": ADAPTER, "dtype": "float16"}, max_grad_norm=0.1)
        learner.loss_scale = scale
        generator = torch.Generator().manual_seed(0)
        for parameter in learner.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        ends.append((learner.step(1e-3), _copied(learner.parameters)))
    assert ends[0][0] == ends[1][0]
    assert _equal(ends[0][1], ends[1][1])


def test_a_gradient_beyond_float16_is_refused_with_a_remedy() -> None:
    learner = _learner({"dtype": "float16"})
    before = learner.policy_id
    _gradient(learner, 1e4)
    told = "lower train.lr or replay.weight_max, or set policy.options.dtype to bfloat16"
    with pytest.raises(ValueError, match=f"^the gradient is (inf|nan): {told}$"):
        learner.step(1e-3)
    assert learner.policy_id == before


# -- averages and references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_wears_the_rounded_average_and_restores(kind: str) -> None:
    learner = _learner(KINDS[kind], lr=0.01)
    _random_step(learner, 0)
    learner.update_average(0)
    masters, model = _copied(learner.parameters), _copied(learner.model)
    with learner.averaged():
        assert _equal(_copied(learner.model), {name: t.to(model[name].dtype) for name, t in learner.average.items()})
        assert not _equal(_copied(learner.model), model)
    assert _equal(_copied(learner.model), model)
    assert _equal(_copied(learner.parameters), masters)


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_moves_in_every_nth_iteration(every: int) -> None:
    learner = _learner({"lora": {"rank": 1}}, lr=0.01, ema_every=every, ema_decay=0.5)
    moved = []
    for iteration in range(7):
        _random_step(learner, iteration)
        before = learner.average_id
        learner.update_average(iteration)
        moved.append(learner.average_id != before)
    assert moved == [(iteration + 1) % every == 0 for iteration in range(7)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_reference_is_the_base_model_and_the_old_policy_is_what_it_was(kind: str) -> None:
    options = KINDS[kind]
    golden = _velocity(load("embedded", device="cpu", **{name: value for name, value in options.items() if name != "lora"}))
    learner = _learner(options, lr=0.01)
    policy = learner.policy
    assert isinstance(policy, PipelinePolicy)
    _random_step(learner, 0)
    learner.remember_old()
    old = _velocity(policy)
    _random_step(learner, 1)
    assert torch.equal(_velocity(policy, weights=learner.reference), golden)
    assert torch.equal(_velocity(policy, weights=learner.old), old)
    assert not torch.equal(_velocity(policy), old)
    learner.reset()
    assert torch.equal(_velocity(policy), golden)


# -- resumed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(kind: str, optimizer: str, tmp_path: Path) -> None:
    options, store = KINDS[kind], Store.create(str(tmp_path / "store"))
    learner = _learner(options, lr=1e-3, optimizer=optimizer)
    for seed in range(2):
        _random_step(learner, seed)
        learner.update_average(seed)
    learner.save(store, "run", 2)
    policy_id, average_id = learner.policy_id, learner.average_id
    other = _learner(options, lr=1e-3, optimizer=optimizer)
    other.load(store, "run", 2, policy_id)
    assert (other.policy_id, other.average_id) == (policy_id, average_id)
    assert _equal(_copied(other.model), _copied(learner.model))
    _same_moments(learner, other)
    for one in (learner, other):
        for seed in (2, 3):
            _random_step(one, seed)
            one.update_average(seed)
    assert other.policy_id == learner.policy_id != policy_id
    assert other.average_id == learner.average_id != average_id
    assert _equal(_copied(other.model), _copied(learner.model))
    _same_moments(learner, other)


def _same_moments(learner: Learner, other: Learner) -> None:
    dtypes = set()
    for name, parameter in learner.parameters.items():
        ours, theirs = learner.optimizer.state[parameter], other.optimizer.state[other.parameters[name]]
        assert ours.keys() == theirs.keys()
        for moment, value in ours.items():
            assert type(theirs[moment]) is type(value)
            assert torch.equal(torch.as_tensor(theirs[moment]), torch.as_tensor(value))
            dtypes.add(torch.as_tensor(value).dtype)
    assert (torch.uint8 in dtypes) == (learner.config.optimizer == "adamw_8bit")


def test_a_run_of_an_adapter_goes_on_from_disk_as_from_memory(tmp_path: Path) -> None:
    """Real iterations: bfloat16, 8-bit moments, checkpoints, guidance; the second one begins in another process, as it were."""
    options = {**KINDS["adapter, bfloat16"], "device": "cpu", "gradient_checkpointing": True, "guidance_scale": 2.0}
    ends = []
    for name in ("memory", "disk"):
        experiment = created(tmp_path / name, _config(options, optimizer="adamw_8bit", pairs_per_pass=5))
        for iteration in range(2):
            experiment = reopened(experiment) if name == "disk" else experiment
            for stage in STAGES:
                stage(experiment, iteration)
        ends.append(_end(experiment))
    assert ends[0] == ends[1]


def _config(options: Mapping[str, Any], **train: Any) -> RunConfig:
    return small(**merged({"policy": {"family": "sd3", "options": dict(options)}}, {"train": {"lr": 1e-2, **train}}))


def _end(experiment: Experiment) -> tuple[str, str, str]:
    learner = experiment.learner(2)
    ids = (experiment.document["base_policy_id"], learner.policy_id, learner.average_id)
    assert len(set(ids)) == 3
    return ids


def test_without_bitsandbytes_it_says_what_to_install(policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r'^train.optimizer adamw_8bit needs bitsandbytes: pip install "opgrpo\[8bit\]"$'):
        Learner(policy, TrainConfig(optimizer="adamw_8bit"))
