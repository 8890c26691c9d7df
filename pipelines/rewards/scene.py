"""Rewards of the embedded world: the scene verifier, strict (0 or 1) and soft (partial credit).

They are two views of one judgement, so a run trained on one can always be reported on the other: both write `strict`
and `soft` into the detail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.embedded.verifier import verify
from pipelines.rewards.base import Reward, Score

VERSION = "1"
"""Bump whenever a picture's score can change: stored scores name the version that made them."""


@dataclass(frozen=True)
class SceneReward:
    """Scores pictures (H, W, 3) uint8 of the embedded world against their prompt's metadata."""

    name: str
    view: Literal["strict", "soft"]
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
        verdicts = verify(np.stack(list(media)), metadata)
        return [
            Score(
                value=float(v.strict if self.view == "strict" else v.soft),
                detail={"strict": v.strict, "soft": v.soft, **v.detail},
            )
            for v in verdicts
        ]


def strict() -> Reward:
    """1.0 if the picture shows exactly what the prompt says, else 0.0."""
    return SceneReward("scene_strict", "strict")


def soft() -> Reward:
    """Partial credit in [0, 1]; 1.0 exactly when `strict` gives 1.0."""
    return SceneReward("scene_soft", "soft")
