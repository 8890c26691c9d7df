"""A preference-like reward on the embedded world: a smooth scalar, part what the prompt says and part taste.

Taste is balance: how near the centre of the picture the drawn things lie on the whole. It can be raised without painting what
was asked for, as learned preference models can; the strict verifier, which stands in the detail and is never trained on, tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.embedded import scenes
from pipelines.embedded.verifier import verify
from pipelines.rewards.base import Media, Reward, Score

TASTE = 0.4
"""Share of the reward that is balance; the rest is the verifier's partial credit."""

RARE_BALANCE = 0.9


def balance(picture: NDArray[np.uint8]) -> float:
    """exp(-(distance / radius)^2) of the centre of mass of all that differs from the ground, in (0, 1].

    picture: (H, W, 3) uint8. radius is a quarter of the side; an empty picture has its centre of mass in a corner.
    """
    drawn = np.abs(picture.astype(np.float64) - np.array(scenes.GROUND)).sum(-1)
    weight = drawn.sum()
    side = len(picture)
    if weight == 0:
        return float(np.exp(-2 * (side / 2) ** 2 / (side / 4) ** 2))
    rows, columns = np.indices(drawn.shape) + 0.5 - side / 2
    squares = (rows * drawn).sum() ** 2 + (columns * drawn).sum() ** 2
    return float(np.exp(-squares / weight**2 / (side / 4) ** 2))


@dataclass(frozen=True)
class Preference:
    """0.6 of the verifier's partial credit and 0.4 of balance, in [0, 1]."""

    name: str = "preference"
    version: str = "1"

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per picture; the detail keeps the strict verdict as the check that nothing is hacked."""
        verdicts = verify(np.stack(list(media)), metadata) if len(media) else []
        taste = [balance(picture) for picture in media]
        return [
            Score((1 - TASTE) * v.soft + TASTE * b, {"strict": v.strict, "soft": v.soft, "balance": b})
            for v, b in zip(verdicts, taste, strict=True)
        ]


@dataclass(frozen=True)
class Rare:
    """1 where the strict verifier is content and the picture is well balanced, else 0: a reward that is seldom found."""

    name: str = "rare"
    version: str = "1"

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per picture; the detail says what it lacked."""
        scores = Preference().score(media, prompts, metadata)
        return [Score(float(s.detail["strict"] and s.detail["balance"] >= RARE_BALANCE), s.detail) for s in scores]


def rare() -> Reward:
    """Factory, for `reward: {name: benchmarks.steps_to_target.preference:rare}`."""
    return Rare()


def preference() -> Reward:
    """Factory, for `reward: {name: benchmarks.steps_to_target.preference:preference}`."""
    return Preference()
