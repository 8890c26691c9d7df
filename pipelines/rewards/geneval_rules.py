"""GenEval's rules (Ghosh et al., arXiv 2310.11513), as a pure function of the objects that a detector found.

The rules and their numbers are those of GenEval's evaluate_images.py, the partial credit is that of Flow-GRPO's reward server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipelines.rewards.box_colour import COLOURS
from pipelines.rewards.detection import Detection

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

View = Literal["strict", "soft"]
Objects = Mapping[str, Sequence[Detection]]
"""Label -> its objects, the surest first."""

RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> the direction (x, y) in which the first object lies from the second; y grows downwards."""
MAX_OBJECTS = 16
"""Per label; the surest are kept."""
POSITION_MARGIN = 0.1
"""Share of the two boxes' added widths (heights) by which an offset is shortened before it counts."""
MIN_DIRECTION = 0.5
"""Share of the distance between two centres that the shortened offset must exceed."""


@dataclass(frozen=True)
class Clause:
    """At least `count` objects; of that colour, if any; each in the relation to every object of the clause at the index."""

    label: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: all clauses, and of every excluded label fewer than its count."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, metadata: Mapping[str, Any]) -> Request:
        """Read a record of GenEval's evaluation_metadata.jsonl. Raises ValueError when it is of another form."""
        try:
            include = tuple(_clause(entry, index) for index, entry in enumerate(metadata["include"]))
            exclude = tuple((str(entry["class"]), _count(entry)) for entry in metadata.get("exclude", ()))
            tag = str(metadata["tag"])
        except (KeyError, TypeError, ValueError) as error:
            told = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"not GenEval's metadata: {told}; got {dict(metadata)}") from error
        if not include and not exclude:
            raise ValueError(f"GenEval metadata that asks for nothing: {dict(metadata)}")
        return cls(tag, include, exclude)

    @property
    def labels(self) -> set[str]:
        """Every label that counts."""
        return {clause.label for clause in self.include} | {label for label, _ in self.exclude}


def _count(entry: Mapping[str, Any]) -> int:
    count = entry["count"]
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count {count!r} is not a number of objects, at least 1")
    return count


def _clause(entry: Mapping[str, Any], index: int) -> Clause:
    colour, position = entry.get("color"), entry.get("position")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color {colour!r} is none of {', '.join(COLOURS)}")
    if position is not None:
        relation, target = position
        if relation not in RELATIONS or target not in range(index):
            raise ValueError(
                f"position {position!r} is not a relation ({', '.join(RELATIONS)}) and the index of an earlier clause"
            )
        position = (relation, target)
    return Clause(str(entry["class"]), _count(entry), colour, position)


def overlap(a: Detection, b: Detection) -> float:
    """Intersection over union of two boxes, counted in pixels that lie on both edges, as GenEval does."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0]) + 1
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1]) + 1
    both = max(width, 0.0) * max(height, 0.0)
    areas = [max(x1 - x0 + 1, 0.0) * max(y1 - y0 + 1, 0.0) for x0, y0, x1, y1 in (a.box, b.box)]
    union = sum(areas) - both
    return both / union if union else 0.0


def kept(detections: Sequence[Detection], threshold: float, max_overlap: float = 1.0) -> dict[str, list[Detection]]:
    """Per label the surest MAX_OBJECTS above the threshold, less those that overlap a surer one of their label.

    max_overlap: intersection over union from which two are one object; 1 keeps all, as GenEval does.
    """
    objects: dict[str, list[Detection]] = {}
    for detection in sorted((d for d in detections if d.score > threshold), key=lambda d: -d.score):
        objects.setdefault(detection.label, []).append(detection)
    for label, found in objects.items():
        apart: list[Detection] = []
        for one in found[:MAX_OBJECTS]:
            if max_overlap == 1 or all(overlap(one, surer) < max_overlap for surer in apart):
                apart.append(one)
        objects[label] = apart
    return objects


def related(first: Detection, second: Detection, relation: str) -> bool:
    """Whether the first box lies there, seen from the second: the offset of their centres, shortened by POSITION_MARGIN of
    their sizes, goes that way by more than half the distance between the centres."""
    a, b = np.reshape(first.box, (2, 2)), np.reshape(second.box, (2, 2))
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shortened = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0)
    if (np.abs(shortened) < 1e-3).all():
        return False
    return bool(shortened @ np.array(RELATIONS[relation]) > MIN_DIRECTION * np.linalg.norm(offset))


@dataclass(frozen=True)
class Judgement:
    """strict: GenEval's verdict, 0 or 1. soft: Flow-GRPO's credit, at most 1. missing: what the picture lacks, in words."""

    strict: int
    soft: float
    missing: tuple[str, ...]


def judge(objects: Objects, request: Request, colours: Mapping[Detection, str]) -> Judgement:
    """Compare a picture's objects with the request. colours: of every object that `to_be_named` lists."""
    groups: list[Sequence[Detection] | None] = []
    missing = []
    for clause in request.include:
        found = objects.get(clause.label, ())[: clause.count]
        fault = _fault(clause, found, groups, colours)
        groups.append(found if fault is None else None)
        missing += [] if fault is None else [fault]
    for label, count in request.exclude:
        if (seen := len(objects.get(label, ()))) >= count:
            missing.append(f"fewer than {count} {label}: found {seen}")
    return Judgement(int(not missing), _credit(objects, request, colours), tuple(missing))


def to_be_named(objects: Objects, request: Request) -> list[Detection]:
    """The objects whose colour matters: the surest, as many as were asked for."""
    coloured = [clause for clause in request.include if clause.colour is not None]
    return list(dict.fromkeys(one for clause in coloured for one in objects.get(clause.label, ())[: clause.count]))


def _fault(
    clause: Clause,
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colours: Mapping[Detection, str],
) -> str | None:
    """What is wrong with the surest `count` objects of a clause; None if nothing is."""
    wanted = f"{clause.count} {clause.label}"
    if len(found) < clause.count:
        return f"{wanted}: found {len(found)}"
    if clause.colour is not None:
        named = [colours[one] for one in found]
        if set(named) != {clause.colour}:
            return f"{clause.count} {clause.colour} {clause.label}: found {', '.join(named)}"
    if clause.position is not None:
        relation, index = clause.position
        told, targets = f"{wanted} {relation} clause {index}", groups[index]
        if targets is None:
            return f"{told}: that clause is not met"
        if not all(related(one, target, relation) for one in found for target in targets):
            return f"{told}: found elsewhere"
    return None


def _credit(objects: Objects, request: Request, colours: Mapping[Detection, str]) -> float:
    """Mean over the checks of all clauses: Flow-GRPO's partial credit.

    Per clause 1 - |found - count| / count, where all objects of the label count and too many cost (from twice too many on, the
    credit is negative). Where that is 1, the share with the right colour, then 1 or 0 for the position; where it is not, and
    there is a colour or a position, one 0 for both. Two things differ: Flow-GRPO adds a 1 after the 0 of a wrong position,
    which looks like a slip, and ignores exclusions. Here a label excluded and nowhere included gives a 0 where it is seen.
    """
    checks: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in request.include:
        found = objects.get(clause.label, ())
        checks.append(1 - abs(clause.count - len(found)) / clause.count)
        matched = len(found) == clause.count
        if not matched and (clause.colour or clause.position):
            checks.append(0.0)
        if matched and clause.colour is not None:
            right = sum(colours[one] == clause.colour for one in found)
            checks.append(right / clause.count)
            matched = right == clause.count
        if matched and clause.position is not None:
            relation, index = clause.position
            targets = groups[index]
            matched = targets is not None and all(related(one, target, relation) for one in found for target in targets)
            checks.append(float(matched))
        groups.append(found if matched else None)
    included = {clause.label for clause in request.include}
    checks += [0.0 for label, n in request.exclude if label not in included and len(objects.get(label, ())) >= n]
    return float(np.mean(checks)) if checks else 1.0
