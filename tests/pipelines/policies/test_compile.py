"""torch.compile: the compiled network is the network, also with other weights in it and through its gradient."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from pipelines import sampler, weights
from pipelines.embedded import PIPELINE_DIR
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from tests.pipelines.policies.randomised import randomised

TOLERANCE = 2e-5
"""Relative to the largest velocity or gradient: fused kernels add in another order."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded pipeline with a transformer of one block: compiling takes a second for every layer."""
    shutil.copytree(PIPELINE_DIR, tmp_path / "model")
    config = SD3Transformer2DModel.load_config(PIPELINE_DIR / "transformer")
    transformer = SD3Transformer2DModel.from_config({**config, "num_layers": 1})
    randomised(transformer, 0).save_pretrained(tmp_path / "model" / "transformer")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What other tests compiled counts against the limit of recompilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _gradient(policy: PipelinePolicy, velocity: Tensor) -> Tensor:
    torch.autograd.backward(velocity.square().sum())
    return torch.cat([p.grad.flatten() for p in policy.trainable.parameters() if p.grad is not None])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiled_network_is_the_network(folder: Path) -> None:
    plain, compiled = (load(str(folder), device="cpu", max_sequence_length=0, compile=on) for on in (False, True))
    assert weights.policy_id(weights.trainable(compiled.trainable)) == weights.policy_id(weights.trainable(plain.trainable))
    assert (compiled.identity, compiled.encoder_id) == (plain.identity, plain.encoder_id)
    latents = sampler.batch_noise(range(3), -1, plain.latent_shape, plain.device)
    sigmas, condition = torch.tensor([1.0, 0.6, 0.2]).double(), plain.encode(["a red circle", "two blue squares", ""])
    other = {name: 1.1 * p.detach() for name, p in plain.trainable.named_parameters()}

    def close(ours: Tensor, theirs: Tensor) -> None:
        assert float((ours - theirs).detach().abs().max()) <= TOLERANCE * float(theirs.detach().abs().max())

    found, golden = (policy.velocity(latents, sigmas, condition) for policy in (compiled, plain))
    close(found, golden)
    close(_gradient(compiled, found), _gradient(plain, golden))
    with torch.no_grad():
        found_other, golden_other = (policy.velocity(latents, sigmas, condition, other) for policy in (compiled, plain))
    close(found_other, golden_other)
    assert float((golden - golden_other).detach().abs().max()) > 0.1
    assert torch.equal(compiled.velocity(latents, sigmas, condition), found)  # the other weights have left no trace
    weights.copy_into(compiled.trainable, other)  # as an optimizer does
    close(compiled.velocity(latents, sigmas, condition), golden_other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
