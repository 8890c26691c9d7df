"""What all families share: what is trained, adapters, other weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import sampler
from pipelines.policies.base import POLICIES
from pipelines.policies.pipeline_policy import PipelinePolicy
from tests.pipelines.policies.families import CASES, TEXTS, Case


def _start(policy: PipelinePolicy, count: int) -> Tensor:
    return sampler.batch_noise(range(count), -1, policy.latent_shape, policy.device)


@torch.no_grad()
def _velocity(policy: PipelinePolicy, texts: Sequence[str], **more: Any) -> Tensor:
    sigmas = torch.linspace(0.2, 1, len(texts), dtype=torch.float64)
    return policy.velocity(_start(policy, len(texts)), sigmas, policy.encode(texts), **more)


# -- what is trained --------------------------------------------------------------------------------------------------


def test_only_the_transformer_is_trainable(tiny_policy: PipelinePolicy) -> None:
    parts = [*tiny_policy.pipeline.components.items(), *tiny_policy.text_pipeline().components.items()]
    modules = {name: part for name, part in parts if isinstance(part, torch.nn.Module)}
    assert {"transformer", "vae", "text_encoder"} <= modules.keys()
    for name, module in modules.items():
        assert not module.training
        assert {parameter.requires_grad for parameter in module.parameters()} == {name == "transformer"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_adapter(case: Case, folder: Path, dtype: str) -> None:
    whole, adapted = (case.policy(folder, dtype=dtype, lora=lora) for lora in (None, {"rank": 2, "alpha": 4}))
    targets = whole.architecture.lora_targets
    matched = {name for name, _ in whole.trainable.named_modules() if name.endswith(targets)}
    assert all(any(name.endswith(target) for name in matched) for target in targets)
    trained = {name: parameter for name, parameter in adapted.trainable.named_parameters() if parameter.requires_grad}
    assert {name.partition(".lora_")[0] for name in trained} == matched
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert torch.equal(_velocity(adapted, TEXTS), _velocity(whole, TEXTS))  # an adapter begins as no change
    velocity = adapted.velocity(_start(adapted, 1), torch.tensor([0.5]).double(), adapted.encode(TEXTS[:1]))
    torch.autograd.backward(velocity.square().mean())
    moved = {name for name, parameter in trained.items() if parameter.grad is not None and bool(parameter.grad.any())}
    assert {name for name in trained if "lora_B" in name and _reached(name)} <= moved
    assert all("lora_B" in name for name in moved)  # as long as B is 0, A moves nothing


def _reached(name: str) -> bool:
    """Whether the output depends on a module: what the last block does to the text is not read by anyone."""
    text = ("to_add_out", "ff_context", "txt_mlp", "add_q_proj")
    return not any(part in name for part in text)


def test_gradients_are_the_same_with_checkpointing(case: Case, folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = case.policy(folder, gradient_checkpointing=checkpointing)
        velocity = policy.velocity(_start(policy, 2), torch.tensor([0.9, 0.3]).double(), policy.encode(TEXTS[:2]))
        torch.autograd.backward(velocity.square().mean())
        gradients.append({name: parameter.grad for name, parameter in policy.trainable.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)
    reached = [gradient is not None and bool(gradient.any()) for gradient in gradients[0].values()]
    assert sum(reached) > 0.85 * len(reached)


def test_other_weights_may_stand_in(tiny_policy: PipelinePolicy) -> None:
    shifted = {name: parameter.detach() * 1.1 for name, parameter in tiny_policy.trainable.named_parameters()}
    before = _velocity(tiny_policy, TEXTS)
    assert not torch.equal(_velocity(tiny_policy, TEXTS, weights=shifted), before)
    assert torch.equal(_velocity(tiny_policy, TEXTS), before)


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_the_registry_knows_it(case: Case, folder: Path, tiny_policy: PipelinePolicy) -> None:
    built = POLICIES.build(tiny_policy.family, model=str(folder), device="cpu", **case.options)
    assert (built.family, built.base_model, built.latent_shape) == (tiny_policy.family, str(folder), tiny_policy.latent_shape)


def test_a_pipeline_of_another_class(case: Case, folder: Path, tmp_path: Path) -> None:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    told = f"cannot load the {name} '{tmp_path}': it is a DDPMPipeline, not a {name}: choose another policy.family"
    with pytest.raises(ValueError, match=f"^{told}$"):
        case.policy(tmp_path)


def test_a_folder_without_its_weights(case: Case, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "transformer")
    with pytest.raises(ValueError, match="cannot load the ") as caught:
        case.policy(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["height", "width"])
def test_sizes_that_it_cannot_draw(case: Case, folder: Path, side: str) -> None:
    multiple = 16 if case.name == "wan" else 8
    for pixels in (0, -multiple, multiple + 4):
        with pytest.raises(ValueError, match=f"^policy.options.{side} {pixels} must be a multiple of {multiple}$"):
            case.policy(folder, **{side: pixels})


@pytest.mark.parametrize("case", ["flux", "qwen_image", "wan"], indirect=True)
@pytest.mark.parametrize("tokens", [0, -1, 1025])
def test_texts_that_it_cannot_read(case: Case, folder: Path, tokens: int) -> None:
    told = rf"^policy.options.max_sequence_length {tokens} must be from 1 to (512|1024)$"
    with pytest.raises(ValueError, match=told):
        case.policy(folder, max_sequence_length=tokens)


def test_the_cases_are_all_families() -> None:
    assert {name.removesuffix("_without_t5") for name in CASES} == set(POLICIES.known)
