"""Adapters: they begin as no change, are a function of their seed, and compute W x + alpha / r B A x."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import sampler, weights
from pipelines.embedded import PIPELINE_DIR
from pipelines.policies.base import POLICIES
from pipelines.policies.lora import adapter_parameters
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import SD3, load

TEXTS = ["a red circle", "two blue squares"]
LORA: Mapping[str, Any] = {"rank": 4, "alpha": 6}
DEFAULTS = SD3(None, None, 0).lora_targets


def _velocity(policy: PipelinePolicy, **more: Any) -> Tensor:
    latents = sampler.batch_noise(range(len(TEXTS)), -1, policy.latent_shape, policy.device)
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor([0.9, 0.3]).double(), policy.encode(TEXTS), **more)


def _id(policy: PipelinePolicy) -> str:
    return weights.policy_id(weights.masters(policy.trainable), policy.identity)


def _adapted(**options: Any) -> PipelinePolicy:
    return load("embedded", device="cpu", **({"lora": LORA} | options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_begins_as_no_change(dtype: str) -> None:
    base, adapted = _adapted(lora=None, dtype=dtype), _adapted(dtype=dtype)
    assert torch.equal(_velocity(adapted), _velocity(base))
    trained = weights.trainable(adapted.trainable)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert set(map(id, trained.values())) == set(map(id, adapter_parameters(adapted.trainable)))
    frozen = dict(base.trainable.named_parameters())
    kept = {name.replace(".base_layer", ""): p for name, p in adapted.trainable.named_parameters() if name not in trained}
    assert kept.keys() == frozen.keys()
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in kept.items())
    assert {parameter.dtype for parameter in kept.values()} == {getattr(torch, dtype)}


def test_the_seed_draws_a_and_b_is_zero() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = weights.trainable(_adapted().trainable)
    assert torch.equal(torch.random.get_rng_state(), state)  # drawn aside
    torch.manual_seed(2)
    same, other = weights.trainable(_adapted().trainable), weights.trainable(_adapted(lora={**LORA, "seed": 1}).trainable)
    drawn = {name for name in one if ".lora_A." in name}
    assert 2 * len(drawn) == len(one)
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == (name not in drawn)
        assert bool(tensor.any()) == (name in drawn)
    spread = torch.cat([one[name].detach().flatten() for name in drawn]).std()
    assert float(spread) == pytest.approx(1 / LORA["rank"], rel=0.02)  # peft's Gaussian
    assert len({tuple(one[name].flatten()[:4].tolist()) for name in drawn}) == len(drawn)


def test_an_adapted_layer_in_closed_form() -> None:
    policy = _adapted()
    layer = policy.trainable.get_submodule("transformer_blocks.1.attn.to_q")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.trainable):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    own = {name: parameter.detach().double().numpy() for name, parameter in layer.named_parameters()}
    x = np.random.default_rng(0).standard_normal((5, 64))
    update = own["lora_B.default.weight"] @ own["lora_A.default.weight"]
    golden = x @ (own["base_layer.weight"] + 6 / 4 * update).T + own["base_layer.bias"]
    found = layer(torch.from_numpy(x).float())
    np.testing.assert_allclose(found.detach().numpy(), golden, rtol=1e-5, atol=1e-5 * np.abs(golden).max())


def test_other_weights_stand_in_for_the_adapter_alone() -> None:
    policy, base = _adapted(), _adapted(lora=None)
    off = {name: parameter.detach().clone() for name, parameter in weights.trainable(policy.trainable).items()}
    with torch.no_grad():
        for parameter in adapter_parameters(policy.trainable):
            parameter.add_(0.1)
    moved = _velocity(policy)
    assert float((moved - _velocity(base)).abs().max()) > 0.1
    assert torch.equal(_velocity(policy, weights=off), _velocity(base))
    assert torch.equal(_velocity(policy), moved)


# -- who it is --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded pipeline in a folder of another name."""
    folder = tmp_path / "another_name"
    shutil.copytree(PIPELINE_DIR, folder)
    return folder


def _from(folder: Path, **options: Any) -> PipelinePolicy:
    settings: dict[str, Any] = {"device": "cpu", "lora": LORA, "max_sequence_length": 0}
    return load(str(folder), **(settings | options))


def test_policy_id_says_what_the_adapter_is_added_to(copy: Path) -> None:
    """An adapter that began with the same seed has the same weights, whatever lies under it and however it is scaled."""
    base = _id(_adapted())
    assert _id(_adapted()) == base
    assert _id(_from(copy, device="cpu:0")) == base
    others = [
        _adapted(lora={**LORA, "alpha": 7}),
        _adapted(lora={**LORA, "rank": 5}),
        _adapted(lora={**LORA, "targets": ["attn.to_q"]}),
        _adapted(dtype="bfloat16"),
        _adapted(dtype="float16"),
        _adapted(lora=None),
        _adapted(lora=None, dtype="bfloat16"),
    ]
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.bias"][3] = torch.nextafter(state["proj_out.bias"][3], torch.tensor(9.0))
    save_file(state, file, metadata={"format": "pt"})
    changed = _from(copy)
    assert weights.policy_id(weights.trainable(changed.trainable)) == weights.policy_id(weights.trainable(_adapted().trainable))
    assert len({base, _id(changed), *map(_id, others)}) == 2 + len(others)


def test_a_whole_float32_model_is_its_weights(copy: Path) -> None:
    whole = _from(copy, lora=None)
    assert whole.identity == ""
    assert _id(whole) == _id(_adapted(lora=None))
    assert json.loads(_adapted(dtype="bfloat16").identity)[1:] == ["bfloat16", 4, 6]


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 0}, "policy.options.lora: rank 0 and alpha 64 must be whole numbers from 1, and seed 0 a whole number"),
        ({"rank": 1.5}, "policy.options.lora: rank 1.5 and alpha 64 must be whole numbers from 1, and seed 0 a whole number"),
        ({"rank": True}, "policy.options.lora: rank True and alpha 64 must be whole numbers from 1, and seed 0 a whole number"),
        ({"alpha": 0}, "policy.options.lora: rank 32 and alpha 0 must be whole numbers from 1, and seed 0 a whole number"),
        ({"seed": "a"}, "policy.options.lora: rank 32 and alpha 64 must be whole numbers from 1, and seed 'a' a whole number"),
        ({"targets": "attn.to_q"}, "policy.options.lora.targets 'attn.to_q' must be a list of names"),
        (
            {"targets": ["attn.to_q", "to_qq", "tn.to_q"]},
            "policy.options.lora.targets: no module has a name that ends with ['to_qq', 'tn.to_q']; "
            f"by default they are {list(DEFAULTS)}",
        ),
        (
            {"targets": ["attn"]},
            f"policy.options.lora.targets ['attn']: not all of them can be adapted; name linear layers, "
            f"by default {list(DEFAULTS)}",
        ),
    ],
)
def test_what_no_adapter_can_be(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        _adapted(lora=lora)


def test_an_unknown_option_of_an_adapter() -> None:
    said = r"^policy family 'sd3' cannot be built with options .*: TypeError: .*unexpected keyword argument 'rnak'$"
    with pytest.raises(ValueError, match=said):
        POLICIES.build("sd3", model="embedded", lora={"rnak": 3})
