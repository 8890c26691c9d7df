"""What a reward is: a batch of media with their prompts in, one score per picture out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.registry import Registry

Media = NDArray[np.uint8]
"""One sample as people see it: an image (H, W, 3), 0..255, RGB."""


@dataclass(frozen=True)
class Score:
    """One reward for one sample.

    `value` is what advantages are made of; a NaN or an infinity counts as a failure of the reward. `detail` is the
    reward's own record, stored as JSON beside the value.
    """

    value: float
    detail: Mapping[str, Any]


class Reward(Protocol):
    """Judges samples. Called once per batch; loads what it needs once, when it is built.

    `version` names the judgement: change it when the same picture may get another value, and `opgrpo score` will score
    again what the new version lacks.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Score B samples against their B prompts; `metadata` is what the prompt file said beside each text."""
        ...


def checked(reward: Reward, name: str) -> Reward:
    """Return what a factory built if it is a reward; raises ValueError that says what it lacks."""
    for attribute in ("name", "version"):
        if not isinstance(getattr(reward, attribute, None), str):
            raise ValueError(f"reward {name!r} built {type(reward).__name__}, which has no text attribute {attribute!r}")
    if not callable(getattr(reward, "score", None)):
        raise ValueError(f"reward {name!r} built {type(reward).__name__}, which has no method score")
    return reward


REWARDS: Registry[Reward] = Registry(
    "reward",
    {
        "scene_soft": "pipelines.rewards.scene:soft",
        "scene_strict": "pipelines.rewards.scene:strict",
    },
)
