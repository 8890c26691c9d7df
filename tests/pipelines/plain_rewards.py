"""Rewards that behave the same in every process: plain functions, and a factory that leaves traces in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.rewards.base import Media, Score
from tests.pipelines.bad_rewards import brightness as brightness_of
from tests.pipelines.bad_rewards import digest


def warmth(media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    """Red less blue, -1..1."""
    return [float((sample[..., 0].mean() - sample[..., 2].mean()) / 255) for sample in media]


def named(media: Sequence[Media], _prompts: Sequence[str], metadata: Sequence[Any], *, scale: float = 1.0) -> Any:
    """Brightness, as an array; with a version of its own and an option."""
    return np.array([scale * brightness_of(sample) for sample in media], np.float32)


named.version = "7"  # type: ignore[attr-defined]


def detailed(media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Scores of its own making."""
    return [Score(brightness_of(sample), {"prompt": text}) for sample, text in zip(media, prompts, strict=True)]


def textual(media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Any]:
    """No numbers."""
    return ["1.0" for _ in media]


def unversioned(media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    """With a version that is no text."""
    return [0.0 for _ in media]


unversioned.version = 3  # type: ignore[attr-defined]


def three_options(url: str, model: str, size: int) -> Any:
    """A factory, though it takes three arguments."""
    return Traced(f"{url}-{model}-{size}", Path(), None, None)


@dataclass(frozen=True)
class Traced:
    """Brightness. Leaves a file per build and batch in `folder`; what it does with the sample of `digest` is up to `mood`."""

    name: str
    folder: Path
    digest: str | None
    mood: str | None
    version: str = "1"

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample, unless the marked one is among them."""
        (self.folder / f"batch-{os.getpid()}-{len(list(self.folder.iterdir()))}-{len(media)}").touch()
        if any(digest(sample) == self.digest for sample in media):
            if self.mood == "dies":
                os._exit(9)
            raise RuntimeError("cannot look at it")
        return [Score(brightness_of(sample), {}) for sample in media]


def traced(folder: str, name: str = "traced", digest: str | None = None, mood: str | None = None, version: str = "1") -> Traced:
    """The factory; it fails in processes other than `mood: only PID`."""
    if mood is not None and mood.startswith("only") and str(os.getpid()) not in mood:
        raise ValueError("this reward cannot be built here")
    (Path(folder) / f"built-{os.getpid()}").touch()
    return Traced(name, Path(folder), digest, mood, version)
