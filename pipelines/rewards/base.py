"""What a reward is: a batch of media with their prompts in, one score per sample out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.registry import Registry

Media = NDArray[np.uint8]
"""One sample as people see it: an image (H, W, 3) or a video (F, H, W, 3), uint8, 0..255, RGB."""


@dataclass(frozen=True)
class Score:
    """One reward for one sample.

    `value` is what advantages are made of; a NaN or an infinity counts as a failure of the reward. `detail` is the
    reward's own record, stored as JSON beside the value. `error` says why this one sample has no value, which then does
    not count: the others of its batch keep theirs.
    """

    value: float
    detail: Mapping[str, Any]
    error: str | None = None


class UnavailableError(ValueError):
    """Nothing can be judged now, whatever the sample: the batch fails as a whole, and nobody tries its samples one by one."""


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


def _factory(found: Any) -> Callable[..., Reward]:
    """What a name leads to, as a factory: a plain function that scores becomes one that wraps it."""
    from pipelines.rewards.function import FunctionReward, scores_by_itself

    return partial(FunctionReward.of, found) if scores_by_itself(found) else found


REWARDS: Registry[Reward] = Registry(
    "reward",
    {
        "aesthetic": "pipelines.rewards.aesthetic:aesthetic",
        "clip_score": "pipelines.rewards.clip_score:clip_score",
        "colourfulness": "pipelines.rewards.colourfulness:colourfulness",
        "composite": "pipelines.rewards.composite:composite",
        "geneval": "pipelines.rewards.geneval:geneval",
        "http": "pipelines.rewards.http:http",
        "image_reward": "pipelines.rewards.image_reward:image_reward",
        "jpeg_compressibility": "pipelines.rewards.jpeg_size:compressibility",
        "jpeg_incompressibility": "pipelines.rewards.jpeg_size:incompressibility",
        "motion_smoothness": "pipelines.rewards.motion_smoothness:motion_smoothness",
        "ocr": "pipelines.rewards.ocr:ocr",
        "pickscore": "pipelines.rewards.pickscore:pickscore",
        "scene_soft": "pipelines.rewards.scene:soft",
        "scene_strict": "pipelines.rewards.scene:strict",
        "sharpness": "pipelines.rewards.sharpness:sharpness",
    },
    _factory,
)


def build_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """The reward of a name (ours, or `module:attribute`) and its options. Raises ValueError as `Registry.build` does."""
    return checked(REWARDS.build(name, **options), name)
