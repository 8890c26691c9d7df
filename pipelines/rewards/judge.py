"""From a reward's scores to what is stored: a value with its detail, or an error, for every sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opgrpo_data import ids
from pipelines.rewards.base import Media, Reward, Score, UnavailableError


@dataclass(frozen=True)
class Judgement:
    """What became of one sample: a value with its detail (JSON text), or an error."""

    value: float | None
    detail: str | None
    error: str | None


def failed(error: str) -> Judgement:
    """No value, and why."""
    return Judgement(None, None, error)


def judge(
    reward: Reward, pictures: Sequence[Media], texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> list[Judgement]:
    """Score samples. A batch that raises is tried again one by one: one bad sample must not cost its neighbours theirs."""
    try:
        scores = reward.score(pictures, texts, metadata)
        if len(scores) != len(pictures):
            raise ValueError(f"it returned {len(scores)} scores for {len(pictures)} samples")
        return [judgement(score) for score in scores]
    except UnavailableError as error:
        return [failed(str(error))] * len(pictures)
    except Exception as error:  # whatever a user's reward raises becomes an error row
        if len(pictures) == 1:
            return [failed(f"{type(error).__name__}: {error}")]
        singles = zip(pictures, texts, metadata, strict=True)
        return [judge(reward, [picture], [text], [data])[0] for picture, text, data in singles]


def judgement(score: Score) -> Judgement:
    """What is stored of a score. Raises TypeError or ValueError when its value is no number or its detail no JSON."""
    if score.error is not None:
        return failed(score.error)
    if not math.isfinite(score.value):
        return failed(f"the value is {score.value}, not a finite number")
    return Judgement(score.value, ids.canonical_json(dict(score.detail)), None)
