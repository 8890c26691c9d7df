"""Tiny models of the classes that rewards load, with random weights: written as users would have them, loaded by our code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

SIZE = 16
"""Pixels along each side of what the tiny CLIP and BLIP see; pictures of this size are not resized."""
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCAB = {token: i for i, token in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS), "re", "red</w>", START, END])}
BERT_VOCAB = {
    token: i
    for i, token in enumerate(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "and", "photo", "of", "[DEC]", "[ENC]"]
    )
}
LABELS = ("bench", "remote", "dog")


def pictures(count: int, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Random pictures (count, size, size, 3) uint8 of smooth colours."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, 2, 2, 3))
    return coarse.repeat(size // 2, axis=1).repeat(size // 2, axis=2).astype(np.uint8)


def pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """What CLIP's preprocessing makes of pictures of its own size, in float64: (N, 3, SIZE, SIZE)."""
    return torch.from_numpy(((images / 255 - CLIP_MEAN) / CLIP_STD).transpose(0, 3, 1, 2))


def _randomised(build: Callable[[Any], nn.Module], config: Any, seed: int) -> Any:
    """A model with weights large enough for different inputs to differ."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = build(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
    return model.eval()


def save_clip(folder: Path, seed: int = 0, positions: int = 12) -> Path:
    """A CLIPModel of width 16 with 8 features and room for `positions` tokens, with its processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    tokens = {"bos_token_id": CLIP_VOCAB[START], "eos_token_id": CLIP_VOCAB[END], "pad_token_id": CLIP_VOCAB[END]}
    text = {**shared, **tokens, "vocab_size": len(CLIP_VOCAB), "max_position_embeddings": positions}
    vision = {**shared, "image_size": SIZE, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=3.0)
    _randomised(CLIPModel, config, seed).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=CLIP_VOCAB, merges=[("r", "e"), ("re", "d</w>")])
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_blip(folder: Path, seed: int = 0) -> Path:
    """A BlipForImageTextRetrieval with a text encoder of width 16 and a vision model of width 24, as ImageReward's folder."""
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shared = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 13, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**shared, **special, "hidden_size": 16, "vocab_size": len(BERT_VOCAB), "max_position_embeddings": 40}
    vision = {**shared, "hidden_size": 24, "image_size": SIZE, "patch_size": 4, "layer_norm_eps": 1e-6}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    _randomised(BlipForImageTextRetrieval, config, seed).save_pretrained(folder)
    BertTokenizer(vocab=BERT_VOCAB).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def save_yolos(folder: Path, seed: int = 0) -> Path:
    """A YolosForObjectDetection that proposes 5 objects of LABELS."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    config = YolosConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=(32, 32),
        patch_size=8,
        num_detection_tokens=5,
        **_labels(),
    )
    _randomised(YolosForObjectDetection, config, seed).save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_rt_detr(folder: Path, seed: int = 0) -> Path:
    """An RTDetrForObjectDetection that proposes 6 objects of LABELS."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    widths: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    backbone = RTDetrResNetConfig(**widths, layer_type="basic", out_features=["stage2", "stage3", "stage4"])
    encoder = {
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [8, 16, 16],
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
    }
    decoder = {"decoder_layers": 1, "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "decoder_in_channels": [16, 16, 16]}
    config = RTDetrConfig(
        backbone_config=backbone, **encoder, **decoder, d_model=16, num_queries=6, num_denoising=0, **_labels()
    )
    _randomised(RTDetrForObjectDetection, config, seed).save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def _labels() -> dict[str, dict[Any, Any]]:
    return {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}


def save_head(path: Path, sizes: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """A head with the published layers' names (0, 2, 4, 6, 7) as far as it has layers; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place, n_in, n_out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        tensors[f"layers.{place}.weight"] = torch.randn(n_out, n_in, generator=generator)
        tensors[f"layers.{place}.bias"] = torch.randn(n_out, generator=generator)
    save_file(tensors, path)
    return tensors


def head_value(tensors: dict[str, torch.Tensor], features: NDArray[np.float64]) -> NDArray[np.float64]:
    """The head in float64 NumPy: (N, D) to (N,)."""
    for place in (0, 2, 4, 6, 7):
        if f"layers.{place}.weight" in tensors:
            weight, bias = (tensors[f"layers.{place}.{part}"].double().numpy() for part in ("weight", "bias"))
            features = features @ weight.T + bias
    return features[:, 0]
