"""Rewards of the world of strings: how near what a picture says is to what its prompt asks for, or whether it is the same.

They are two views of one reading, so a run trained on one can be reported on the other: both write all of it into the detail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.strings import world
from pipelines.rewards.base import Reward, Score
from pipelines.rewards.ocr import levenshtein

VERSION = "1"
"""Bump whenever a picture's score can change: stored scores name the version that made them."""


def similarity(found: str, wanted: str) -> float:
    """1 - distance / longer length, in [0, 1]: 1 exactly when the strings are equal."""
    return 1 - levenshtein(found, wanted) / max(len(found), len(wanted), 1)


@dataclass(frozen=True)
class StringReward:
    """Scores pictures (H, W, 3) uint8 against the "string" in their prompt's metadata."""

    name: str
    view: Literal["edit", "exact"]
    version: str = VERSION

    def score(
        self,
        media: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> list[Score]:
        """One score per picture; the metadata alone decides, the prompt's text is not read."""
        if not len(media):
            return []
        scores = []
        for found, known in zip(world.read(np.stack(list(media))), metadata, strict=True):
            if not isinstance(wanted := known.get("string"), str):
                raise ValueError(f'a prompt of strings needs metadata {{"string": ...}}, got {dict(known)}')
            exact, edit = found == wanted, similarity(found, wanted)
            detail = {"read": found, "exact": exact, "edit": edit, "kind": f"{len(wanted)} letters"}
            scores.append(Score(value=edit if self.view == "edit" else float(exact), detail=detail))
        return scores


def edit_distance() -> Reward:
    """Partial credit in [0, 1] by edit distance; 1.0 exactly when `exact` gives 1.0."""
    return StringReward("string_edit", "edit")


def exact() -> Reward:
    """1.0 if the picture says exactly what the prompt asks for, else 0.0."""
    return StringReward("string_exact", "exact")
