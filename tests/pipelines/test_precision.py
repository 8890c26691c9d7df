"""Lower precision: what the optimizer moves is float32, the model holds its rounding, and training states keep every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opgrpo_data.store import Store
from pipelines import sampler, weights
from pipelines.learner import FLOAT16_LOSS_SCALE, Learner
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from pipelines.settings import TrainConfig

LORA = {"rank": 32, "alpha": 16}
KINDS: dict[str, dict[str, Any]] = {
    "whole bfloat16": {"dtype": "bfloat16"},
    "whole float16": {"dtype": "float16"},
    "adapter on bfloat16": {"dtype": "bfloat16", "lora": LORA},
    "adapter on float32": {"lora": LORA},
}


def _learner(config: TrainConfig, **options: Any) -> Learner:
    return Learner(load("embedded", device="cpu", **options), config)


def _push(learner: Learner, seed: int, lr: float = 1e-3) -> None:
    """An optimizer step on a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    learner.zero_grad()
    for parameter in learner.parameters.values():
        parameter.grad = learner.loss_scale * torch.randn(parameter.shape, generator=generator)
    learner.step(lr)


def _velocity(policy: PipelinePolicy, **kwargs: Any) -> torch.Tensor:
    latents = sampler.batch_noise([1, 2], -1, policy.latent_shape, policy.device)
    return policy.velocity(
        latents, torch.tensor([0.3, 0.8]).double(), policy.encode(["a red circle", "two blue squares"]), **kwargs
    )


def test_a_float32_model_is_its_own_master() -> None:
    learner = _learner(TrainConfig())
    assert all(parameter is learner.model[name] for name, parameter in learner.parameters.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_moves_float32_and_the_model_rounds(kind: str) -> None:
    learner = _learner(TrainConfig(lr=1e-6, max_grad_norm=1e9), **KINDS[kind])
    assert {parameter.dtype for parameter in learner.parameters.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
    for step in range(3):  # the same gradient: AdamW moves by lr sign(g) at each step, far below half a bfloat16 digit
        _push(learner, 0, lr=1e-6)
        for name, parameter in learner.parameters.items():
            sign = torch.sign(parameter.grad if parameter.grad is not None else parameter)
            golden = before[name].double() - (step + 1) * 1e-6 * sign.double()
            moved = (parameter.double() - before[name].double()).abs().sum()
            torch.testing.assert_close(
                parameter.double(), golden, rtol=1e-6, atol=2e-8 + 1e-7 * float(before[name].abs().max())
            )
            assert float(moved.detach()) > 0
            assert torch.equal(learner.model[name].detach(), parameter.detach().to(learner.model[name].dtype))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_bit_for_bit(kind: str, optimizer: Any, tmp_path: Path) -> None:
    config, store = TrainConfig(optimizer=optimizer, max_grad_norm=1e9), Store.create(str(tmp_path / "store"))
    learner = _learner(config, **KINDS[kind])
    _push(learner, 0)
    learner.update_average(0)
    learner.save(store, "run", 1)
    other = _learner(config, **KINDS[kind])
    other.load(store, "run", 1, learner.policy_id)
    for one in (learner, other):
        _push(one, 1)
        one.update_average(1)
    assert other.policy_id == learner.policy_id
    assert other.average_id == learner.average_id


def test_moments_in_8_bits() -> None:
    learner = _learner(TrainConfig(optimizer="adamw_8bit", max_grad_norm=1e9))
    _push(learner, 0)
    large = max(learner.parameters.values(), key=lambda parameter: parameter.numel())
    assert {learner.optimizer.state[large][name].dtype for name in ("state1", "state2")} == {torch.uint8}


def test_8_bits_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r'train.optimizer adamw_8bit needs bitsandbytes: pip install "opgrpo\[8bit\]"'):
        _learner(TrainConfig(optimizer="adamw_8bit"))


def test_a_float16_loss_is_scaled_and_its_gradient_is_not() -> None:
    """A loss of which float16 would keep nothing: gradients of activations near 1e-9 are below its smallest number, 6e-8."""
    small, gradients = 1e-6, {}
    for dtype in ("float32", "float16"):
        learner = _learner(TrainConfig(max_grad_norm=1e9), dtype=dtype)
        learner.zero_grad()
        learner.backward(small * _velocity(learner.policy).square().mean())  # type: ignore[arg-type]
        scale = learner.loss_scale
        found = [parameter.grad / scale for parameter in learner.parameters.values() if parameter.grad is not None]
        gradients[dtype] = torch.cat([gradient.flatten().double() for gradient in found])
    assert scale == FLOAT16_LOSS_SCALE
    error = (gradients["float16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    unscaled = _learner(TrainConfig(), dtype="float16")
    unscaled.loss_scale = 1.0
    unscaled.zero_grad()
    unscaled.backward(small * _velocity(unscaled.policy).square().mean())  # type: ignore[arg-type]
    lost = torch.cat([p.grad.flatten().double() for p in unscaled.parameters.values() if p.grad is not None])
    assert float(error) < 0.1 < float((lost - gradients["float32"]).norm() / gradients["float32"].norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_where_it_began(kind: str) -> None:
    """Of an adapter: as if it were off."""
    learner = _learner(TrainConfig(max_grad_norm=1e9), **KINDS[kind])
    policy = learner.policy
    assert isinstance(policy, PipelinePolicy)
    base = load("embedded", device="cpu", dtype=KINDS[kind].get("dtype", "float32"))
    with torch.no_grad():
        before = _velocity(base)
        assert torch.equal(_velocity(policy), before)
        _push(learner, 0, lr=0.01)
        assert not torch.equal(_velocity(policy), before)
        assert torch.equal(_velocity(policy, weights=learner.reference), before)


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_weights_come_and_go(kind: str) -> None:
    learner = _learner(TrainConfig(ema_decay=0.5, max_grad_norm=1e9), **KINDS[kind])
    _push(learner, 0, lr=0.01)
    learner.update_average(0)
    own = {name: tensor.detach().clone() for name, tensor in learner.model.items()}
    with learner.averaged():
        for name, tensor in learner.model.items():
            assert torch.equal(tensor.detach(), learner.average[name].to(tensor.dtype))
    assert all(torch.equal(tensor.detach(), own[name]) for name, tensor in learner.model.items())


def test_the_average_waits_for_its_turn() -> None:
    learner = _learner(TrainConfig(ema_decay=0.5, ema_every=3, max_grad_norm=1e9))
    changed = []
    for iteration in range(6):
        _push(learner, iteration)
        before = learner.average_id
        learner.update_average(iteration)
        changed.append(learner.average_id != before)
    assert changed == [False, False, True, False, False, True]


def test_what_a_policy_id_covers(tmp_path: Path) -> None:
    """An adapter's weights do not say what they are added to, nor how strongly."""

    def identify(**options: Any) -> str:
        return _learner(TrainConfig(), **options).policy_id

    ids = [
        identify(**options) for options in ({}, *KINDS.values(), {"lora": {**LORA, "alpha": 17}}, {"lora": {**LORA, "seed": 1}})
    ]
    assert len(set(ids)) == len(ids)
    assert identify(lora=LORA) == identify(lora=LORA)


def test_an_adapted_layer_by_hand() -> None:
    """W x + alpha / r B A x, in float64 NumPy."""
    learner = _learner(TrainConfig(max_grad_norm=1e9), lora=LORA)
    _push(learner, 0, lr=0.1)
    layer = learner.policy.trainable.get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))  # type: ignore[call-overload]
    named = {name: parameter.detach().double().numpy() for name, parameter in layer.named_parameters()}
    w, b = named["base_layer.weight"], named["base_layer.bias"]
    low, high = named["lora_A.default.weight"], named["lora_B.default.weight"]
    point = x.double().numpy()
    golden = point @ w.T + b + LORA["alpha"] / LORA["rank"] * point @ low.T @ high.T
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), golden, rtol=1e-4, atol=1e-5)


def test_targets_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="no_such_layer") as caught:
        load("embedded", device="cpu", lora={"targets": ["no_such_layer"]})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"policy\.options\.lora: rank 0 and alpha 64 must be positive"):
        load("embedded", device="cpu", lora={"rank": 0})


def test_masters_round_to_the_models_own_weights() -> None:
    policy = load("embedded", device="cpu", dtype="bfloat16")
    for name, master in weights.masters(policy.trainable).items():
        assert torch.equal(master.to(torch.bfloat16), dict(policy.trainable.named_parameters())[name])
