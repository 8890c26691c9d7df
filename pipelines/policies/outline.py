"""A pipeline without its weights: shapes and classes on torch's meta device, to count with before anything is loaded.

For folders from their config files; for the published models of PUBLISHED without a network; for other hub ids from the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.policies.family import Family
from pipelines.policies.loading import Source, quiet_libraries

_SD3_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

# Model id -> part -> what differs from the defaults of its diffusers class, as the model's own config.json says.
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": {
            "qk_norm": "rms_norm",
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        "vae": _SD3_VAE,
    },
    "stabilityai/stable-diffusion-3.5-large": {
        "transformer": {
            "qk_norm": "rms_norm",
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        "vae": _SD3_VAE,
    },
    "black-forest-labs/FLUX.1-dev": {"transformer": {"guidance_embeds": True}, "vae": _SD3_VAE},
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {
        "transformer": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "vae": {},
    },
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"transformer": {}, "vae": {}},
    "Qwen/Qwen-Image": {"transformer": {}, "vae": {}},
}


class UnknownModelError(ValueError):
    """The model's configuration is neither here nor published, and the hub cannot be asked."""


@dataclass(frozen=True)
class Outline(Source):
    """A source whose pipelines have shapes only."""

    family: Family

    def load(self, dtype: torch.dtype, **components: Any) -> Any:
        """A pipeline with transformer and autoencoder on the meta device. Raises ValueError when nobody knows the model."""
        import diffusers

        own = {"transformer": self.family.transformer_class, "vae": self.family.vae_class}
        parts = {name: self._part(name, getattr(diffusers, class_name)) for name, class_name in own.items()}
        parts["transformer"].to(dtype)
        return self.pipeline_class(**parts, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **components)

    def _part(self, name: str, part_class: Any) -> Any:
        if not self.folder.is_dir() and self.model in PUBLISHED:
            with torch.device("meta"):
                return part_class(**PUBLISHED[self.model][name])
        try:
            config = part_class.load_config(str(self.folder), subfolder=name)
            with torch.device("meta"):
                return part_class.from_config(config)
        except (OSError, ValueError, TypeError) as error:
            raise UnknownModelError(
                f"cannot read the configuration of {self.model!r}, {name}: {' '.join(str(error).split())}"
            ) from error


def outlined(model: str, folder: str, family: Family) -> Outline:
    """The outline of a model in a folder or on a hub."""
    quiet_libraries()
    import diffusers

    return Outline(model, Path(folder), getattr(diffusers, family.pipeline_class), {}, family)
