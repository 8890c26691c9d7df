"""What a policy is: a denoiser that predicts velocities for latents under encoded prompts, and decodes samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.registry import Registry
from pipelines.rewards.base import Media


class Policy(Protocol):
    """A model family behind one face. Built once, kept in memory; only `trainable` changes.

    base_model: what it was loaded from. latent_shape: of one trajectory's latent, for example (C, H, W).
    trainable: the module whose parameters are the policy. Its state dict is what policy_id hashes.
    """

    base_model: str
    family: str
    guidance_scale: float
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def trainable(self) -> nn.Module: ...

    def encode(self, prompts: Sequence[str]) -> Any:
        """The condition of B prompts, in the order given. Cached: a prompt is encoded once."""
        ...

    def velocity(self, latents: Tensor, sigmas: Tensor, condition: Any, module: nn.Module | None = None) -> Tensor:
        """v(x, sigma, c), guidance included: latents (N, *latent_shape) float32, sigmas (N,) float64, result float32.

        `module` stands in for `trainable` (a reference policy).
        """
        ...

    def sigmas(self, num_steps: int) -> NDArray[np.float64]:
        """The family's own sigma grid, (num_steps + 1,), from 1 down to 0."""
        ...

    def decode(self, latents: Tensor) -> list[Media]:
        """Samples x_T (B, *latent_shape) to what people see, uint8."""
        ...


POLICIES: Registry[Policy] = Registry("policy family", {"sd3": "pipelines.policies.sd3:load"})
