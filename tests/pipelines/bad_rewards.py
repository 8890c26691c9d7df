"""A reward that behaves, until a test sets its mood: rewards of users fail in every way that code can fail."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.rewards.base import Media, Score

BAD_MOODS = ("raises", "nan", "infinite", "not JSON", "not a number", "NaN in the detail")


@dataclass
class Mood:
    """What goes wrong, with which pictures (their digests; None: all), and what has been asked so far."""

    kind: str = "good"
    pictures: set[str] | None = None
    version: str = "1"
    batches: list[int] = field(default_factory=list)


MOOD = Mood()


class Moody:
    """Scores the mean brightness of a picture, 0..1."""

    name = "moody"

    @property
    def version(self) -> str:
        """Of the judgement."""
        return MOOD.version

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per picture, except in a bad mood."""
        assert len(media) == len(prompts) == len(metadata)
        MOOD.batches.append(len(media))
        scores = [self._one(picture) for picture in media]
        affected = MOOD.pictures is None or any(digest(picture) in MOOD.pictures for picture in media)
        return scores + scores[:1] if MOOD.kind == "one too many" and affected else scores

    def _one(self, picture: Media) -> Score:
        right = Score(brightness(picture), {"height": picture.shape[0]})
        if MOOD.pictures is not None and digest(picture) not in MOOD.pictures:
            return right
        match MOOD.kind:
            case "raises":
                raise RuntimeError("the reward server is down")
            case "nan":
                return Score(float("nan"), {})
            case "infinite":
                return Score(float("inf"), {})
            case "not JSON":
                return Score(1.0, {"picture": object()})
            case "not a number":
                return Score("1", {})  # type: ignore[arg-type]
            case "NaN in the detail":
                return Score(1.0, {"height": float("nan")})
        return right


def moody() -> Moody:
    """The factory."""
    return Moody()


def brightness(picture: Media) -> float:
    """Mean over pixels and channels, 0..1."""
    return float(picture.mean() / 255)


def digest(picture: Media) -> str:
    """Name of a picture."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


not_callable = 3


def picky(*, colour: str) -> Moody:
    """A factory with an option."""
    assert colour
    return Moody()
