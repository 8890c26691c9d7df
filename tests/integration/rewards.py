"""Rewards that fail in the ways users' rewards fail, for use by import path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.rewards.base import Media, Score


class Failing:
    """Gives 0.5 everywhere but to samples whose prompt starts with `word`: there it does what `how` says."""

    version = "1"

    def __init__(self, how: str, word: str = "") -> None:
        self.name = f"failing_{how}"
        self.how = how
        self.word = word

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Half a point a picture, or a failure."""
        if self.how == "raises" and any(prompt.startswith(self.word) for prompt in prompts):
            raise RuntimeError("the reward model ran away")
        return [Score(math.nan if self.how == "nan" else 0.5, {}) for _ in media]
