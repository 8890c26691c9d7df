"""The procedural world: which scenes exist, what prompts say about them and how they look.

A scene is a set of objects on a 3x3 grid. An object is a (shape, colour) pair. Four kinds of prompt describe scenes:

| kind       | example                                        | objects in the scene |
| ---------- | ---------------------------------------------- | -------------------- |
| `single`   | "a red circle"                                 | 1                    |
| `count`    | "three blue squares"                           | 2 to 4, all alike    |
| `two`      | "a red circle and a blue square"               | 2, different         |
| `position` | "a red circle left of a blue square"           | 2, different, placed |

A `Spec` is the meaning of a prompt; several texts may share it. The train and the held-out split share no spec, hence
no text: a held-out prompt is a combination that the reward never saw.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out"]
Kind = Literal["single", "count", "two", "position"]

GRID = 3
"""Cells along each side."""
CELL = 8
"""Pixels along each side of a cell."""
IMAGE_SIZE = GRID * CELL
"""Pixels along each side of a picture."""
SHAPE_SIZE = 7
"""Pixels along each side of a shape: one pixel of ground always separates neighbours."""

GROUND: tuple[int, int, int] = (22, 24, 38)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 72, 85),
    "green": (88, 196, 110),
    "blue": (72, 126, 240),
    "yellow": (250, 208, 84),
}
SHAPES: dict[str, tuple[str, ...]] = {
    "square": ("#######",) * 7,
    "circle": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "triangle": ("...#...", "..###..", "..###..", ".#####.", ".#####.", "#######", "#######"),
    "diamond": ("...#...", "..###..", ".#####.", "#######", ".#####.", "..###..", "...#..."),
}
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> sign of (x, y) of the first object minus the second; y grows downwards."""
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
KINDS: tuple[Kind, ...] = ("single", "count", "two", "position")

PROMPTS_PER_KIND: dict[Split, int] = {"train": 96, "held_out": 32}
HELD_OUT_SHARE = 0.25
"""Share of each kind's specs that only the held-out split uses."""

_TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "single": (
        "a {a}",
        "one {a}",
        "a single {a}",
        "just one {a}",
        "a picture of a {a}",
        "a picture of one {a}",
        "only one {a}",
        "a drawing of a {a}",
    ),
    "count": ("{n} {a}s", "a picture of {n} {a}s", "exactly {n} {a}s", "a drawing of {n} {a}s"),
    "two": ("a {a} and a {b}", "one {a} and one {b}"),
    "position": ("a {a} {r} a {b}", "one {a} {r} one {b}"),
}

Object = tuple[str, str]
"""(shape, colour)."""
Cell = tuple[int, int]
"""(row, column), both 0..GRID-1, row 0 on top."""


@dataclass(frozen=True)
class Spec:
    """What a prompt asks for: the exact multiset of objects, and for `position` where objects[0] is seen from [1]."""

    kind: Kind
    objects: tuple[Object, ...]
    relation: str | None = None

    def metadata(self) -> dict[str, Any]:
        """JSON-able form, all that the verifier needs; `Spec.parse` reads it back."""
        objects = [{"shape": shape, "colour": colour} for shape, colour in self.objects]
        return {"kind": self.kind, "objects": objects, "relation": self.relation}

    @classmethod
    def parse(cls, metadata: Mapping[str, Any]) -> Spec:
        """Read `metadata()` back, refusing what this world does not know."""
        missing = {"kind", "objects"} - set(metadata)
        if missing:
            raise ValueError(f"scene metadata lacks {sorted(missing)}, got keys {sorted(metadata)}; use scenes.prompts()")
        objects = tuple((str(o["shape"]), str(o["colour"])) for o in metadata["objects"])
        for shape, colour in objects:
            if shape not in SHAPES or colour not in COLOURS:
                raise ValueError(f"unknown object '{colour} {shape}'; known: {list(COLOURS)} x {list(SHAPES)}")
        relation = metadata.get("relation")
        if metadata["kind"] not in KINDS or (metadata["kind"] == "position") != (relation in RELATIONS):
            raise ValueError(
                f"kind {metadata['kind']!r} with relation {relation!r} is not a scene; "
                f"kinds: {list(KINDS)}, relations (position only): {list(RELATIONS)}"
            )
        return cls(metadata["kind"], objects, relation)


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt of the embedded world: its text and the metadata that the verifier checks pictures against."""

    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """Objects and the distinct cells they stand in, index by index."""

    objects: tuple[Object, ...]
    cells: tuple[Cell, ...]


@cache
def specs(kind: Kind) -> tuple[Spec, ...]:
    """Every spec of a kind, in a fixed order; "A left of B" and "B right of A" appear once, whichever way round."""
    everything = list(itertools.product(SHAPES, COLOURS))
    pairs = list(itertools.combinations(everything, 2))
    match kind:
        case "single":
            return tuple(Spec(kind, (one,)) for one in everything)
        case "count":
            return tuple(Spec(kind, (one,) * n) for n in NUMBERS for one in everything)
        case "two":
            return tuple(Spec(kind, pair) for pair in pairs)
        case "position":
            return tuple(Spec(kind, pair, relation) for pair in pairs for relation in RELATIONS)


def text(spec: Spec, template: int = 0, swap: bool = False) -> str:
    """Say a spec in words. `swap` names the second object first, inverting the relation: the meaning is the same."""
    phrases = [f"{colour} {shape}" for shape, colour in spec.objects]
    relation = spec.relation
    if swap and spec.kind in ("two", "position"):
        phrases.reverse()
        relation = opposite(relation) if relation else None
    form = _TEMPLATES[spec.kind][template % len(_TEMPLATES[spec.kind])]
    return form.format(a=phrases[0], b=phrases[-1], n=NUMBERS.get(len(phrases), ""), r=relation)


def opposite(relation: str) -> str:
    """The relation seen from the other object: "left of" -> "right of"."""
    x, y = RELATIONS[relation]
    return next(name for name, direction in RELATIONS.items() if direction == (-x, -y))


def vocabulary() -> list[str]:
    """Every word that a prompt can contain, sorted."""
    words = {word for kind in KINDS for form in _TEMPLATES[kind] for word in form.split() if "{" not in word}
    words |= {word for relation in RELATIONS for word in relation.split()}
    return sorted(words | set(COLOURS) | set(SHAPES) | {f"{shape}s" for shape in SHAPES} | set(NUMBERS.values()))


@cache
def _prompts(split: Split) -> tuple[ScenePrompt, ...]:
    result = []
    for index, kind in enumerate(KINDS):
        rng = np.random.default_rng(index)
        everything = specs(kind)
        order = rng.permutation(len(everything))
        cut = round(len(everything) * HELD_OUT_SHARE)
        mine = order[:cut] if split == "held_out" else order[cut:]
        # Each spec once, then each again in its next wording, until the quota is full: no text comes twice.
        for n in range(PROMPTS_PER_KIND[split]):
            spec = everything[int(mine[n % len(mine)])]
            swap = bool(rng.random() < 0.5)
            result.append(ScenePrompt(text(spec, template=n // len(mine) + n, swap=swap), spec.metadata()))
    return tuple(result)


def prompts(split: Split) -> list[ScenePrompt]:
    """The prompts of a split, equally many of each kind. Deterministic; the splits share no spec.

    A quarter of each kind's specs is held out.
    """
    if split not in PROMPTS_PER_KIND:
        raise ValueError(f"unknown split {split!r}; known: {list(PROMPTS_PER_KIND)}")
    return [ScenePrompt(p.text, Spec.parse(p.metadata).metadata()) for p in _prompts(split)]


def related(first: tuple[float, float], second: tuple[float, float], relation: str) -> float:
    """How far `first` (x, y) lies from `second` in the relation's direction, in the units of the input."""
    x, y = RELATIONS[relation]
    return x * (first[0] - second[0]) + y * (first[1] - second[1])


def sample_scene(spec: Spec, rng: np.random.Generator, apart: int = 1) -> Scene:
    """A scene that satisfies the spec, uniform over the placements with objects in relation at least `apart` cells apart."""
    while True:
        chosen = rng.choice(GRID * GRID, size=len(spec.objects), replace=False)
        cells = tuple((int(c) // GRID, int(c) % GRID) for c in chosen)
        if spec.relation is None or related(cells[0][::-1], cells[1][::-1], spec.relation) >= apart:
            return Scene(spec.objects, cells)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: (IMAGE_SIZE, IMAGE_SIZE, 3) uint8, RGB."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = GROUND
    for (shape, colour), (row, column) in zip(scene.objects, scene.cells, strict=True):
        y, x = row * CELL, column * CELL
        image[y : y + SHAPE_SIZE, x : x + SHAPE_SIZE][shape_mask(shape)] = COLOURS[colour]
    return image


@cache
def shape_mask(shape: str) -> NDArray[np.bool_]:
    """A shape's pixels: (SHAPE_SIZE, SHAPE_SIZE) bool. Shared: do not write to it."""
    return np.array([[pixel == "#" for pixel in line] for line in SHAPES[shape]])


def near_miss(spec: Spec, rng: np.random.Generator) -> Scene:
    """A scene that almost satisfies the spec: one attribute altered, one object too many or few, or the relation wrong."""
    edits = ["recolour", "reshape", "add"] + (["remove"] if len(spec.objects) > 1 else [])
    if spec.kind == "count":
        edits = ["add", "remove", "add", "remove", "recolour", "reshape"]
    if spec.relation is not None and rng.random() < 0.5:
        wrong = [relation for relation in RELATIONS if relation != spec.relation]
        while True:
            scene = sample_scene(Spec("position", spec.objects, wrong[rng.integers(len(wrong))]), rng)
            if related(scene.cells[0][::-1], scene.cells[1][::-1], spec.relation) < 1:
                return scene
    return Scene(*_edited(sample_scene(spec, rng), edits[rng.integers(len(edits))], rng))


def _edited(scene: Scene, edit: str, rng: np.random.Generator) -> tuple[tuple[Object, ...], tuple[Cell, ...]]:
    objects, cells = list(scene.objects), list(scene.cells)
    at = int(rng.integers(len(objects)))
    shape, colour = objects[at]
    others = [o for o in itertools.product(SHAPES, COLOURS) if o not in objects]
    if edit == "remove":
        del objects[at], cells[at]
    elif edit == "add":
        free = [(row, column) for row in range(GRID) for column in range(GRID) if (row, column) not in cells]
        objects.append(objects[at] if rng.random() < 0.5 else others[rng.integers(len(others))])
        cells.append(free[rng.integers(len(free))])
    else:
        keep = 0 if edit == "recolour" else 1
        near = [o for o in others if o[keep] == (shape, colour)[keep]]
        objects[at] = near[rng.integers(len(near))]
    return tuple(objects), tuple(cells)


def batch(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Draw many scenes: (B, IMAGE_SIZE, IMAGE_SIZE, 3) uint8."""
    return np.stack([render(scene) for scene in scenes])
