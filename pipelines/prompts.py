"""Where prompts come from: the embedded world, or a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from opgrpo_data import ids

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Prompt:
    """What generation is conditioned on, and what a reward needs to know about it."""

    text: str
    metadata: Mapping[str, Any]

    @property
    def prompt_id(self) -> str:
        """Hash of text and metadata."""
        return ids.prompt_id(self.text, self.metadata)


def load_prompts(source: str) -> dict[str, list[Prompt]]:
    """Prompts by split, `train` and `held_out`, duplicates dropped.

    source: 'embedded', or a file with one JSON object a line: {"text": ..., "metadata": {...}, "split": "train"}, the last
    two optional. Raises ValueError that names the line when the file is not like that, or when it holds no training prompt.
    """
    if source == "embedded":
        from pipelines.embedded.scenes import prompts

        return {split: [Prompt(p.text, p.metadata) for p in prompts(split)] for split in get_args(Split)}
    found: dict[str, dict[str, Prompt]] = {split: {} for split in get_args(Split)}
    try:
        lines = Path(source).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028, which JSON allows
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompt file {source!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            split, prompt = _parse(line, f"{source}:{number}")
            found[split].setdefault(prompt.prompt_id, prompt)
    if not found["train"]:
        raise ValueError(f'{source} holds no training prompt: give one JSON object a line, like {{"text": "a red square"}}')
    return {split: list(prompts.values()) for split, prompts in found.items()}


def thinned(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most `count` prompts, evenly spaced: sources often list prompts kind by kind."""
    kept = min(count, len(prompts))
    return [prompts[i * len(prompts) // kept] for i in range(kept)]


def _parse(line: str, where: str) -> tuple[str, Prompt]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str) or not document["text"].strip():
        raise ValueError(f'{where}: expected an object with a non-empty "text", got {line[:80]}')
    split, metadata = document.get("split", "train"), document.get("metadata", {})
    if split not in get_args(Split) or not isinstance(metadata, dict) or set(document) - {"text", "metadata", "split"}:
        raise ValueError(f'{where}: "split" is one of {get_args(Split)}, "metadata" an object, and nothing else: {line[:80]}')
    prompt = Prompt(document["text"], metadata)
    try:
        ids.canonical_json((prompt.text, metadata)).encode()
    except ValueError as error:
        raise ValueError(f"{where}: {error}; a prompt has to be plain JSON in UTF-8") from error
    return split, prompt
