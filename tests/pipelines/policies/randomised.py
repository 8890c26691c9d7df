"""Random weights for models that nobody trained."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def randomised(module: M, seed: int) -> M:
    """Matrices of variance 1 / inputs, scales of norms near 1, everything else of a tenth: nothing explodes or is zero.

    Layers that begin at zero, as output layers and gates do, would hide a wrong input.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        inputs = math.prod(parameter.shape[1:])
        if inputs > 1:
            parameter.copy_(drawn / inputs**0.5)
        else:
            parameter.copy_(0.1 * drawn + name.endswith(("weight", "gamma")))
    return module
