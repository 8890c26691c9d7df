"""ImageReward (Xu et al., arXiv 2304.05977): what people who rank pictures of one prompt would say.

A BLIP text encoder reads the prompt while it looks at the picture; a linear head turns its first output, that of [CLS], into
one number, which is centred and scaled.

The published weights are one pickle of the original BLIP code, THUDM/ImageReward's ImageReward.pt, which no transformers class
reads: whoever wants them converts them once, into a folder and a head. This project ships no converted copy and has not
run one. The folder is `BlipForImageTextRetrieval.save_pretrained`'s, beside a tokenizer and an image processor:

- config.json: vision_config of ViT-L/16 (hidden_size 1024, intermediate_size 4096, num_hidden_layers 24,
  num_attention_heads 16, image_size 224, patch_size 16, layer_norm_eps 1e-6), text_config of BERT base (vocab_size 30524,
  encoder_hidden_size 1024, max_position_embeddings 512).
- model.safetensors: the tensors of `blip.`, under these names. `blip.visual_encoder.` is vision_model. with cls_token
  embeddings.class_embedding, pos_embed embeddings.position_embedding, patch_embed.proj embeddings.patch_embedding,
  blocks.<i>. encoder.layers.<i>. (there attn.proj self_attn.projection, attn.qkv self_attn.qkv, norm1 layer_norm1, norm2
  layer_norm2, mlp unchanged) and norm post_layernorm. `blip.text_encoder.` keeps its names. Nothing else is needed.
- the tokenizer of bert-base-uncased with the tokens [DEC] and [ENC] added, in this order, as 30522 and 30523.
- preprocessor_config.json: a CLIPImageProcessor (shortest edge to 224, bicubic, middle 224x224, CLIP's mean and deviation).
- the head, a file of its own: the tensors of `mlp.` without that prefix, layers.0, .2, .4, .6 and .7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.linear_head import load_head
from pipelines.rewards.pretrained import CHUNK, Pretrained, load
from pipelines.rewards.sampled import SampledReward, checked_count, versioned

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Constants of the authors' code, which centres and scales the head's output by them."""
TOKENS = 35
"""Every prompt is padded or cut to this length, as in training."""
UNUSED = ("itm_head.", "vision_proj.", "text_proj.")
"""Parts of BlipForImageTextRetrieval that the reward does not run."""


def image_reward(
    *,
    model: str,
    head: str,
    frames: int = 4,
    dtype: str = "float32",
    device: str | None = None,
) -> Reward:
    """(head([CLS]) - 0.167) / 1.033, about -2 to 2; of a video, the mean over `frames` evenly spaced frames.

    model: hub id or folder of a BlipForImageTextRetrieval; head: .safetensors file; what they must hold is told in this
    module's docstring. Raises ValueError when one of them cannot be loaded, or they do not fit.
    """
    blip = load("BLIP model", "BlipForImageTextRetrieval", {"blip"}, model, unused=UNUSED, dtype=dtype, device=device)
    mark = load_head(head, blip.model.config.text_config.hidden_size, blip.device)

    @torch.inference_mode()
    def judge(pictures: Sequence[Media], prompts: Sequence[str]) -> list[float]:
        starts = range(0, len(pictures), CHUNK)
        raw = [mark(_first_output(blip, pictures[s : s + CHUNK], prompts[s : s + CHUNK])) for s in starts]
        return [(value - MEAN) / STD for chunk in raw for value in chunk]

    version = versioned(VERSION, blip.digest, mark.digest, checked_count(frames))
    return SampledReward("image_reward", version, frames, judge)


def _first_output(blip: Pretrained, pictures: Sequence[Media], prompts: Sequence[str]) -> Tensor:
    """The text encoder's output at [CLS], given N pictures and their prompts: (N, D) float32."""
    tokens = blip.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    seen = blip.model.vision_model(**blip.pixels(pictures)).last_hidden_state
    output = blip.model.text_encoder(
        input_ids=tokens["input_ids"].to(blip.device),
        attention_mask=tokens["attention_mask"].to(blip.device),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=blip.device),
    )
    first: Tensor = output.last_hidden_state[:, 0].float()
    return first
