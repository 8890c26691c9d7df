"""CLIP (arXiv 2103.00020) as several rewards use it: normalised features of pictures and texts, in one space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.rewards.base import Media
from pipelines.rewards.pretrained import CHUNK, Pretrained, load


@dataclass(frozen=True)
class Clip:
    """A CLIPModel with its processor. digest: of what can change a feature. width: D of the features."""

    loaded: Pretrained

    @property
    def digest(self) -> str:
        return self.loaded.digest

    @property
    def width(self) -> int:
        return int(self.loaded.model.config.projection_dim)

    @property
    def scale(self) -> float:
        """exp(logit_scale): what a cosine is multiplied with to be a logit."""
        return float(self.loaded.model.logit_scale.double().exp())

    @torch.inference_mode()
    def image_features(self, pictures: Sequence[Media]) -> Tensor:
        """N pictures (H, W, 3) uint8 of any size to (N, D) float32 of length 1."""
        chunks = [pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)]
        return torch.cat([_unit(self.loaded.model.get_image_features(**self.loaded.pixels(chunk))) for chunk in chunks])

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """N texts to (N, D) float32 of length 1. What is beyond the model's last position (77 tokens) is not read."""
        distinct = list(dict.fromkeys(texts))
        longest = self.loaded.model.config.text_config.max_position_embeddings
        tokens = self.loaded.tokenizer(distinct, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs = {name: tokens[name].to(self.loaded.device) for name in ("input_ids", "attention_mask")}
        features = _unit(self.loaded.model.get_text_features(**inputs))
        return features[[distinct.index(text) for text in texts]]

    def cosines(self, pictures: Sequence[Media], texts: Sequence[str]) -> list[float]:
        """The cosine of each of N pictures with the text beside it."""
        cosines: list[float] = (self.image_features(pictures) * self.text_features(texts)).sum(-1).tolist()
        return cosines


def load_clip(model: str, *, processor: str | None = None, dtype: str = "float32", device: str | None = None) -> Clip:
    """A CLIPModel from a hub id or folder; `processor` lies beside it where it is None.

    device: None takes CUDA where there is one. Raises ValueError when it cannot be loaded.
    """
    return Clip(load("CLIP model", "CLIPModel", {"clip"}, model, processor=processor, dtype=dtype, device=device))


def _unit(output: Any) -> Tensor:
    """The projected features of a CLIPModel's output, in float32, divided by their lengths."""
    return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1)
