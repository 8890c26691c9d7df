"""A weighted sum of rewards, its parts. `opgrpo score` stores what each part says as a reward of its own as well."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opgrpo_data.ids import canonical_json
from pipelines.rewards.base import Media, Reward, Score, build_reward
from pipelines.rewards.function import short_hash
from pipelines.rewards.judge import Judgement, judge, judgement


@dataclass(frozen=True)
class Part:
    """A reward and its weight in the sum."""

    reward: Reward
    weight: float


@dataclass(frozen=True)
class Composite:
    """value = sum over the parts of weight * value; detail = the parts' values, weights and details, by name.

    A sample that some part cannot judge has no value.
    """

    parts: tuple[Part, ...]
    name: str = "composite"

    @property
    def version(self) -> str:
        """A hash of the parts' names, versions and weights."""
        return short_hash(canonical_json([[p.reward.name, p.reward.version, p.weight] for p in self.parts]).encode())

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample; a sample that a part fails on costs no other sample its score."""
        judged = [judge(part.reward, media, prompts, metadata) for part in self.parts]
        return [self.combined(said) for said in zip(*judged, strict=True)]

    def combined(self, said: Sequence[Judgement]) -> Score:
        """The score of one sample, from what each part said of it, in the order of the parts."""
        values, details = {}, {}
        for part, one in zip(self.parts, said, strict=True):
            if one.value is None:
                return Score(math.nan, {}, f"part {part.reward.name}: {one.error}")
            values[part.reward.name] = one.value
            details[part.reward.name] = json.loads(one.detail or "{}")
        weights = {part.reward.name: part.weight for part in self.parts}
        value = sum(weight * values[name] for name, weight in weights.items())
        return Score(value, {"parts": values, "weights": weights, "details": details})

    def judged(self, said: Sequence[Judgement]) -> Judgement:
        """What is stored of `combined`."""
        return judgement(self.combined(said))


def composite(parts: list[Mapping[str, Any]]) -> Reward:
    """The weighted sum of `parts`, each {name, weight, options}: a reward as in `reward.name`, and its factory's options.

    Raises ValueError when a part lacks its name or weight, has other keys, is a composite, or is called like another.
    """
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"composite needs a list of parts, each {{name, weight, options}}, got {parts!r}")
    built = tuple(_part(part) for part in parts)
    names = [Composite.name, *(part.reward.name for part in built)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"composite: several rewards are called {', '.join(twice)}: their values could not be told apart")
    return Composite(built)


def _part(given: Mapping[str, Any]) -> Part:
    if not isinstance(given, Mapping) or not {"name", "weight"} <= set(given) <= {"name", "weight", "options"}:
        raise ValueError(f"composite: a part has a name, a weight, and perhaps options, got {given!r}")
    weight = given["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"composite: the weight of part {given['name']} must be a finite number, got {weight!r}")
    reward = build_reward(given["name"], given.get("options") or {})
    if isinstance(reward, Composite):
        raise ValueError("composite: a part cannot be a composite: list its parts, with their weights multiplied")
    return Part(reward, float(weight))
