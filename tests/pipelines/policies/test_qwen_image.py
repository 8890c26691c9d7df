"""Qwen-Image: prompts of many lengths, a mask where they meet, and guidance that keeps the norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.io import Directory
from pipelines import sampler
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.qwen_image import QwenImage
from tests.pipelines.policies.families import CASES, TEXTS

QWEN = CASES["qwen_image"]
TAIL = 5
"""Tokens of the template after the prompt: end, newline, start, "assistant", newline."""


@pytest.fixture
def policy(folder_of: Callable[[str], Path]) -> PipelinePolicy:
    """On the tiny pipeline, without guidance."""
    return QWEN.policy(folder_of("qwen_image"))


def test_a_condition_is_as_long_as_its_prompt(policy: PipelinePolicy) -> None:
    lengths = [len(text.split()) + TAIL for text in TEXTS]
    assert len(set(lengths)) > 1
    condition = policy.encode(TEXTS)
    assert condition["embeds"].shape == (3, max(lengths), 32)
    assert condition["mask"].dtype == torch.int64
    assert condition["mask"].sum(1).tolist() == lengths
    assert not condition["embeds"][condition["mask"] == 0].any()
    assert bool(condition["embeds"][condition["mask"] == 1].any(1).all())


def test_the_prompt_survives_the_template(policy: PipelinePolicy) -> None:
    """34 tokens of template go, as many as there are: what is left differs from the first token on."""
    embeds = policy.encode(["red", "blue"])["embeds"]
    assert float((embeds[0, 0] - embeds[1, 0]).abs().max()) > 0.1


def test_padding_is_never_seen(policy: PipelinePolicy) -> None:
    latents = sampler.batch_noise([1, 2], -1, policy.latent_shape, policy.device)
    sigmas = torch.tensor([0.7, 0.7], dtype=torch.float64)
    condition = dict(policy.encode(TEXTS[:2]))
    with torch.no_grad():
        before = policy.velocity(latents, sigmas, condition)
        condition["embeds"] = torch.where(condition["mask"][..., None] == 1, condition["embeds"], torch.tensor(50.0))
        after = policy.velocity(latents, sigmas, condition)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("texts", "masked"), [(TEXTS[:1], False), ((TEXTS[0], "a blue square"), False), (TEXTS, True)])
def test_there_is_a_mask_only_where_there_is_padding(policy: PipelinePolicy, texts: tuple[str, ...], masked: bool) -> None:
    masks: list[Any] = []

    def see(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["encoder_hidden_states_mask"])

    handle = policy.pipeline.transformer.register_forward_pre_hook(see, with_kwargs=True)
    latents = sampler.batch_noise(range(len(texts)), -1, policy.latent_shape, policy.device)
    with torch.no_grad():
        policy.velocity(latents, torch.ones(len(texts), dtype=torch.float64), policy.encode(texts))
    handle.remove()
    assert (masks[0] is not None) == masked


@given(st.floats(1.1, 10), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_guidance_keeps_each_patchs_norm(scale: float, seed: int) -> None:
    """In float64 NumPy, patch by patch: w = u + scale (g - u), then w |g| / |w| over the patch's 2 x 2 x C numbers."""
    rng = np.random.default_rng(seed)
    unguided, guided = rng.standard_normal((2, 2, 3, 4, 6))
    found = QwenImage(16, 24, 16).guide(torch.tensor(unguided), torch.tensor(guided), scale).numpy()
    for n in range(2):
        for y in range(0, 4, 2):
            for x in range(0, 6, 2):
                u, g = (values[n, :, y : y + 2, x : x + 2] for values in (unguided, guided))
                w = u + scale * (g - u)
                golden = w * np.sqrt((g**2).sum() / (w**2).sum())
                np.testing.assert_allclose(found[n, :, y : y + 2, x : x + 2], golden, rtol=1e-9)


def test_the_empty_prompt_of_guidance_is_a_space(folder_of: Callable[[str], Path], directory: Directory) -> None:
    guided = QWEN.policy(folder_of("qwen_image"), guidance_scale=4.0)
    assert guided.negative_prompt == " "
    guided.prepare(directory, TEXTS)
    condition = guided.encode(TEXTS)
    assert condition["mask"][:3].sum(1).tolist() == [1 + TAIL] * 3


def test_defaults_are_flow_grpos(folder_of: Callable[[str], Path]) -> None:
    policy = QWEN.load(str(folder_of("qwen_image")), device="cpu")
    assert policy.latent_shape == (4, 128, 128)
    assert policy.architecture.encoding == (512,)


def test_the_grid_is_stretched_to_its_terminal(policy: PipelinePolicy) -> None:
    assert policy.sigmas(8)[-2] == pytest.approx(0.02, rel=1e-5)


def test_long_prompts_are_cut(folder_of: Callable[[str], Path]) -> None:
    policy = QWEN.policy(folder_of("qwen_image"), max_sequence_length=4)
    whole = QWEN.policy(folder_of("qwen_image")).encode(TEXTS[1:2])
    cut = policy.encode(TEXTS[1:2])
    assert cut["mask"].tolist() == [[1] * 4]
    assert torch.equal(cut["embeds"], whole["embeds"][:, :4])
