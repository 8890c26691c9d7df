"""Tokenizers and text encoders of the embedded pipeline: CLIP in miniature, every word of the grammar one token.

B prompts in a batch, L tokens, E = 2 * HIDDEN features per token (both encoders side by side), as in SD3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.embedded import scenes

MAX_TOKENS = 10
"""The longest prompt has eight words; start and end take one token each."""
HIDDEN = 32
START, END = "<|startoftext|>", "<|endoftext|>"


class Encoded(NamedTuple):
    """What SD3's transformer is conditioned on: tokens (B, L, E) and pooled (B, E), float32."""

    tokens: Tensor
    pooled: Tensor


def build_tokenizer(words: Sequence[str] | None = None, spelled: str = "", max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-pair encoding) whose merges make one token of each word, by default of the scenes' grammar.

    spelled: further letters, of which texts may spell words that are no tokens.
    """
    merges: list[tuple[str, str]] = []
    words = scenes.vocabulary() if words is None else words
    letters = sorted({letter for word in words for letter in word} | set(spelled))
    vocab = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    for word in words:
        symbols = _apply(merges, [*word[:-1], f"{word[-1]}</w>"])
        while len(symbols) > 1:  # merges of earlier words come first, hence still hold: only the rest is joined here
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = [symbols[0] + symbols[1]]
            vocab.append(symbols[0])
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_tokens)


def _apply(merges: Sequence[tuple[str, str]], symbols: list[str]) -> list[str]:
    """Byte-pair encoding of one word: the merges in order of rank."""
    for left, right in merges:
        at = 0
        while at < len(symbols) - 1:
            if (symbols[at], symbols[at + 1]) == (left, right):
                symbols[at : at + 2] = [left + right]
            at += 1
    return symbols


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """An untrained text encoder. Two layers: SD3 reads the tokens after the last layer but one, the pooled at the end."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return CLIPTextModelWithProjection(config)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """(B, L) int64, padded to the tokenizer's longest text, as the pipeline itself tokenizes."""
    longest = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def encode(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> Encoded:
    """Token ids (B, L) -> what `StableDiffusion3Pipeline.encode_prompt` makes with max_sequence_length=0."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return Encoded(tokens, torch.cat([output.text_embeds for output in outputs], dim=-1))
