"""Low-rank adapters (LoRA, arXiv 2106.09685) on a transformer, through peft: the adapter is the policy, the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Lora:
    """rank r, alpha: the update is alpha / r B A. targets: ends of module names; None: the family's.

    seed: of A, drawn from a Gaussian; B begins at 0, so that the adapter begins as no change.
    Defaults are Flow-GRPO's (arXiv 2505.05470).
    """

    rank: int = 32
    alpha: int = 64
    targets: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"policy.options.lora: rank {self.rank} and alpha {self.alpha} must be positive")


def add_adapter(transformer: Any, lora: Lora, default_targets: Sequence[str]) -> None:
    """Add a trainable float32 adapter to a frozen transformer. Raises ValueError when no module has a target's name."""
    from peft import LoraConfig

    targets = list(lora.targets or default_targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=targets)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # a function of the seed: every process begins as the same policy
        torch.manual_seed(lora.seed)
        transformer.add_adapter(config)
    for parameter in adapter_parameters(transformer):
        parameter.data = parameter.data.to(torch.float32)  # small updates would be rounded away
        parameter.requires_grad_(True)


def adapter_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter."""
    return [parameter for name, parameter in transformer.named_parameters() if ".lora_" in name]
