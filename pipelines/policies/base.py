"""What a policy is: a denoiser that predicts velocities for latents under encoded prompts, and decodes samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opgrpo_data.io import Directory
from pipelines.registry import Registry
from pipelines.rewards.base import Media


class Policy(Protocol):
    """A model behind one face. Built once, kept in memory; only the trainable weights change.

    base_model: what it was loaded from. dtype: of activations; float16 gradients are scaled (`Learner.backward`).
    model_id: names the content of all files that the model is made of: with others, a run cannot go on.
    identity: what makes two policies with equal trainable weights different, "" for a whole float32 model; part of policy_id.
    """

    guidance_scale: float
    device: torch.device
    dtype: torch.dtype

    @property
    def base_model(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def model_id(self) -> str: ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one trajectory's latent, for example (C, H, W), or (C, F, H, W) of a video."""
        ...

    @property
    def trainable(self) -> nn.Module:
        """The module whose parameters that require a gradient are the policy: all of them, or an adapter's."""
        ...

    def prepare(self, directory: Directory, prompts: Sequence[str]) -> None:
        """Encode what the store at `directory` has no conditions of yet: from then on no text encoder is needed."""
        ...

    def encode(self, prompts: Sequence[str]) -> Any:
        """The condition of B prompts, in the order given, as `velocity` takes it."""
        ...

    def velocity(self, latents: Tensor, sigmas: Tensor, condition: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v(x, sigma, c), guidance included: latents (N, *latent_shape) float32, sigmas (N,) float64, result float32.

        `weights` stand in for the trainable ones (those of a reference or an old policy).
        """
        ...

    def sigmas(self, num_steps: int) -> NDArray[np.float64]:
        """The family's own sigma grid, (num_steps + 1,), from 1 down to 0."""
        ...

    def decode(self, latents: Tensor) -> list[Media]:
        """Samples x_T (B, *latent_shape) to what people see, uint8: images (H, W, 3) or videos (F, H, W, 3)."""
        ...


POLICIES: Registry[Policy] = Registry(
    "policy family",
    {
        "flux": "pipelines.policies.flux:load",
        "qwen_image": "pipelines.policies.qwen_image:load",
        "sd3": "pipelines.policies.sd3:load",
        "wan": "pipelines.policies.wan:load",
    },
)
