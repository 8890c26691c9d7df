"""Tokenizers and text encoders of the tiny pipelines: the published classes, trained or filled on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import pre_tokenizers

from tests.pipelines.policies.randomised import randomised

WORDS = ("a", "red", "circle", "two", "blue", "squares", "left", "of", "square", "one", "green", "diamond", "blurry")
QWEN_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
CLIP_TOKENS = 77
FEATURES = 32
"""Of every text encoder; of a CLIP's projection too."""


def clip_tokenizer() -> Any:
    """Byte pairs, every word one token."""
    tokenizer = _trained(transformers.CLIPTokenizer(), WORDS)
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def clip(class_name: str, seed: int) -> Any:
    """CLIPTextModel or CLIPTextModelWithProjection of two layers."""
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=FEATURES,
        intermediate_size=FEATURES,
        projection_dim=FEATURES,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomised(getattr(transformers, class_name)(config), seed)


def t5_tokenizer() -> Any:
    """Unigram pieces: words, and letters for the others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def t5(class_name: str, features: int, seed: int) -> Any:
    """T5EncoderModel or UMT5EncoderModel of two layers."""
    config_class = transformers.UMT5Config if class_name.startswith("UMT5") else transformers.T5Config
    config = config_class(
        vocab_size=len(t5_tokenizer()),
        d_model=features,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomised(getattr(transformers, class_name)(config), seed)


def qwen_tokenizer() -> Any:
    """The template of Qwen-Image is the 34 tokens before the prompt that it is with the published tokenizer."""
    texts = [QWEN_TEMPLATE, "user\n", "assistant\n", *WORDS, *(f" {word}" for word in WORDS)]
    return _trained(transformers.Qwen2Tokenizer(), texts, new_special_tokens=["<|im_start|>", "<|im_end|>"])


def qwen(seed: int) -> Any:
    """Qwen2.5-VL of two layers, with a vision tower that nobody asks."""
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": FEATURES,
        "patch_size": 2,
        "fullatt_block_indexes": [0],
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": FEATURES,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return randomised(transformers.Qwen2_5_VLForConditionalGeneration(config), seed)


def _trained(tokenizer: Any, texts: Sequence[str], **settings: Any) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer.train_new_from_iterator(texts, 2000, initial_alphabet=alphabet, show_progress=False, **settings)
