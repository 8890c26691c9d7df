"""Rewards whose model sees a few frames of every sample: the frames of a whole batch go to the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opgrpo_data.ids import canonical_json
from pipelines.rewards.base import Media, Score
from pipelines.rewards.frames import frames
from pipelines.rewards.function import short_hash


def versioned(number: str, *parts: Any) -> str:
    """The version of a reward whose judgement depends on `parts` too: digests of models, options (all JSON-able)."""
    return f"{number}-{short_hash(canonical_json(parts).encode())}"


def chosen(media: Sequence[Media], count: int) -> tuple[list[Media], list[int]]:
    """Up to `count` frames (H, W, 3) of every sample, and for every frame the index of its sample.

    They are the middles of `count` equal parts of the video; an image is its own only frame. Raises ValueError for what is
    no sample.
    """
    pictures, owners = [], []
    for owner, sample in enumerate(media):
        of_sample = frames(sample)
        used = min(count, len(of_sample))
        pictures += [of_sample[(2 * part + 1) * len(of_sample) // (2 * used)] for part in range(used)]
        owners += [owner] * used
    return pictures, owners


def by_sample(values: Sequence[Any], owners: Sequence[int], samples: int) -> list[list[Any]]:
    """The values of every sample's frames, in order."""
    grouped: list[list[Any]] = [[] for _ in range(samples)]
    for value, owner in zip(values, owners, strict=True):
        grouped[owner].append(value)
    return grouped


def by_size(pictures: Sequence[Media]) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """Pictures of one size stacked (N, H, W, 3), with their indices: no model has to pad one for another's sake."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        sizes.setdefault(picture.shape, []).append(index)
    for indices in sizes.values():
        yield indices, np.stack([pictures[index] for index in indices])


def checked_count(count: int) -> int:
    """The option `frames` of a reward. Raises ValueError unless it is at least 1."""
    if count < 1:
        raise ValueError(f"reward.options.frames is how many frames of a video are judged, at least 1, got {count}")
    return count


@dataclass(frozen=True)
class SampledReward:
    """The mean over a sample's chosen frames of what `judge` says of (frames, their prompts)."""

    name: str
    version: str
    frames: int
    judge: Callable[[Sequence[Media], Sequence[str]], Sequence[float]]

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample; the detail holds the value of every frame judged. The metadata is not read."""
        pictures, owners = chosen(media, self.frames)
        if not pictures:
            return []
        values = [float(value) for value in self.judge(pictures, [prompts[owner] for owner in owners])]
        return [Score(float(np.mean(own)), {"frames": own}) for own in by_sample(values, owners, len(media))]
