"""The head of two rewards: linear layers from a feature to one number, without activations between them.

Published checkpoints have the sizes 768-1024-128-64-16-1, with dropouts in between that do nothing once trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines import weights

KEY = re.compile(r"layers\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class LinearHead:
    """layers: (weight (out, in), bias (out,)) in order, float32. digest: of all of them."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    digest: str

    def __call__(self, features: Tensor) -> list[float]:
        """One number for each feature of (N, D)."""
        for weight, bias in self.layers:
            features = torch.nn.functional.linear(features, weight, bias)
        values: list[float] = features[:, 0].tolist()
        return values


def load_head(path: str, width: int, device: torch.device) -> LinearHead:
    """Read a head from a .safetensors file with `layers.<i>.weight` and `.bias`, in the order of i.

    width: D of the features that it will get. Raises ValueError when the file is of another kind, damaged, or does not lead
    from `width` numbers to one.
    """
    if Path(path).suffix in (".pt", ".pth", ".bin"):
        raise ValueError(
            f"the head {path!r} is a pickle, which can run code: convert it once with safetensors.torch.save_file("
            f"torch.load({path!r}, map_location='cpu', weights_only=True), 'head.safetensors') and name that file"
        )
    if not Path(path).is_file():
        raise ValueError(f"there is no head {path!r}: name a .safetensors file")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"the head {path!r} is damaged, or no safetensors file: {error}") from error
    found = {(int(key[1]), key[2]): tensors[key[0]].float() for key in map(KEY.fullmatch, tensors) if key}
    places = sorted({place for place, _ in found})
    if not places or len(found) != len(tensors) or len(found) != 2 * len(places):
        raise ValueError(f"the head {path!r} must hold layers.<i>.weight and layers.<i>.bias, got {', '.join(sorted(tensors))}")
    layers = tuple((found[place, "weight"].to(device), found[place, "bias"].to(device)) for place in places)
    expected = width
    for place, (weight, bias) in zip(places, layers, strict=True):
        if weight.ndim != 2 or weight.shape[1] != expected or bias.shape != weight.shape[:1]:
            shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ValueError(
                f"the head {path!r} is of another model: layers.{place} is {shapes}, its input has {expected} numbers"
            )
        expected = weight.shape[0]
    if expected != 1:
        raise ValueError(f"the head {path!r} ends in {expected} numbers instead of 1")
    return LinearHead(layers, weights.policy_id(tensors))
