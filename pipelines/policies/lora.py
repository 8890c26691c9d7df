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
        whole = all(type(number) is int for number in (self.rank, self.alpha, self.seed))
        if not whole or self.rank < 1 or self.alpha < 1:
            raise ValueError(
                f"policy.options.lora: rank {self.rank!r} and alpha {self.alpha!r} must be whole numbers from 1, and seed "
                f"{self.seed!r} a whole number"
            )
        if isinstance(self.targets, str):
            raise ValueError(f"policy.options.lora.targets {self.targets!r} must be a list of names")


def add_adapter(transformer: Any, lora: Lora, default_targets: Sequence[str]) -> None:
    """Add a trainable float32 adapter to a frozen transformer.

    Raises ValueError when no module has the name of one of the adapter's own targets, or it is none that can be adapted.
    """
    from peft import LoraConfig

    targets = list(lora.targets or default_targets)
    names = [f".{name}" for name, _ in transformer.named_modules()]
    unknown = [target for target in lora.targets or () if not any(name.endswith(f".{target}") for name in names)]
    if unknown:
        raise ValueError(
            f"policy.options.lora.targets: no module has a name that ends with {unknown}; by default they are "
            f"{list(default_targets)}"
        )
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=targets)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # a function of the seed: every process begins as the same policy
        torch.manual_seed(lora.seed)
        try:
            transformer.add_adapter(config)
        except ValueError as error:  # peft's own shows the whole module
            raise ValueError(
                f"policy.options.lora.targets {targets}: not all of them can be adapted; name linear layers, by default "
                f"{list(default_targets)}"
            ) from error
    for parameter in adapter_parameters(transformer):
        parameter.data = parameter.data.to(torch.float32)  # small updates would be rounded away
        parameter.requires_grad_(True)


def adapter_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter."""
    return [parameter for name, parameter in transformer.named_parameters() if ".lora_" in name]
