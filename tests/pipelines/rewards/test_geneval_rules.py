"""GenEval's rules case by case, on objects written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rewards.detection import Detection
from pipelines.rewards.geneval_rules import Judgement, Request, judge, kept, overlap, related, to_be_named


def at(label: str, x: float, y: float, score: float = 0.95, size: float = 10) -> Detection:
    """A square object around (x, y)."""
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def row(label: str, *scores: float) -> list[Detection]:
    """Objects side by side."""
    return [at(label, 20 * i, 0, score) for i, score in enumerate(scores)]


def judged(
    detections: Sequence[Detection], include: list[dict[str, Any]], exclude: Sequence[dict[str, Any]] = (), *colours: str
) -> Judgement:
    """The judgement above the threshold 0.3; colours: of the objects whose colour matters, in their order."""
    request = Request.parse({"tag": "x", "include": include, "exclude": list(exclude)})
    objects = kept(detections, 0.3)
    return judge(objects, request, dict(zip(to_be_named(objects, request), colours, strict=True)))


BENCH: dict[str, Any] = {"class": "bench", "count": 1}
DOG: dict[str, Any] = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    ("found", "count", "strict", "soft"),
    [
        (0, 1, 0, 0.0),
        (1, 1, 1, 1.0),
        (2, 1, 1, 0.0),  # GenEval: at least; Flow-GRPO: exactly
        (3, 1, 1, -1.0),
        (1, 3, 0, 1 / 3),
        (2, 3, 0, 2 / 3),
        (3, 3, 1, 1.0),
        (4, 3, 1, 2 / 3),
    ],
)
def test_counts(found: int, count: int, strict: int, soft: float) -> None:
    result = judged(row("bench", *[0.9] * found) + row("dog", 0.9), [{"class": "bench", "count": count}])
    assert result.strict == strict
    assert result.soft == pytest.approx(soft)
    assert result.missing == (() if strict else (f"{count} bench: found {found}",))


def test_excluded_is_fewer_than() -> None:
    two, fewer = [{"class": "bench", "count": 2}], [{"class": "bench", "count": 3}]
    assert judged(row("bench", 0.9, 0.9), two, fewer) == Judgement(1, 1.0, ())
    result = judged(row("bench", 0.9, 0.9, 0.9), two, fewer)
    assert result == Judgement(0, 0.5, ("fewer than 3 bench: found 3",))  # 1 - |2 - 3| / 2, and Flow-GRPO asks no more


def test_what_is_only_excluded_costs_a_check() -> None:
    none = [{"class": "cat", "count": 1}]
    assert judged([*row("bench", 0.9), at("cat", 0, 40)], [BENCH], none) == Judgement(0, 0.5, ("fewer than 1 cat: found 1",))
    assert judged(row("bench", 0.9), [BENCH], none) == Judgement(1, 1.0, ())
    assert judged([], [], none) == Judgement(1, 1.0, ())


def test_two_objects() -> None:
    both = [BENCH, DOG]
    assert judged([at("bench", 0, 0), at("dog", 30, 0)], both) == Judgement(1, 1.0, ())
    assert judged([at("bench", 0, 0)], both) == Judgement(0, 0.5, ("1 dog: found 0",))
    assert judged([], both) == Judgement(0, 0.0, ("1 bench: found 0", "1 dog: found 0"))


def test_colours() -> None:
    red = [BENCH | {"color": "red"}]
    assert judged(row("bench", 0.9), red, (), "red") == Judgement(1, 1.0, ())
    assert judged(row("bench", 0.9), red, (), "blue") == Judgement(0, 0.5, ("1 red bench: found blue",))
    assert judged([], red) == Judgement(0, 0.0, ("1 bench: found 0",))


def test_a_colour_is_asked_of_the_surest_objects() -> None:
    """GenEval looks at as many as were asked for; Flow-GRPO has already refused one too many."""
    red = [BENCH | {"color": "red"}]
    assert judged(row("bench", 0.5, 0.9), red, (), "red") == Judgement(1, 0.0, ())
    objects = kept(row("bench", 0.5, 0.9), 0.3)
    assert [one.score for one in to_be_named(objects, Request.parse({"tag": "colors", "include": red}))] == [0.9]


def test_all_of_several_must_have_the_colour() -> None:
    two = [{"class": "bench", "count": 2, "color": "red"}]
    result = judged(row("bench", 0.9, 0.8), two, (), "red", "blue")
    assert result == Judgement(0, 0.75, ("2 red bench: found red, blue",))  # the count is right, half the colours are
    assert judged(row("bench", 0.9, 0.8), two, (), "red", "red").strict == 1


LEFT = [DOG, BENCH | {"position": ["left of", 0]}]


@pytest.mark.parametrize(
    ("detections", "strict", "soft", "missing"),
    [
        ([at("bench", 0, 0), at("dog", 30, 0)], 1, 1.0, ()),
        ([at("bench", 60, 0), at("dog", 30, 0)], 0, 2 / 3, ("1 bench left of clause 0: found elsewhere",)),
        ([at("bench", 0, 0)], 0, 1 / 3, ("1 dog: found 0", "1 bench left of clause 0: that clause is not met")),
        ([at("dog", 0, 0)], 0, 1 / 3, ("1 bench: found 0",)),
        # The surest dog is to the right: that is enough for GenEval.
        ([at("bench", 0, 0), at("dog", 30, 0, 0.9), at("dog", -30, 0, 0.8)], 1, 1 / 3, ()),
    ],
)
def test_positions(detections: list[Detection], strict: int, soft: float, missing: tuple[str, ...]) -> None:
    """Three checks: two counts and a place. Without the dog: 0, 1, 0; without the bench: 1, 0, 0; with two dogs: 0, 1, 0."""
    result = judged(detections, LEFT)
    assert (result.strict, result.missing) == (strict, missing)
    assert result.soft == pytest.approx(soft)


def test_every_pair_must_be_in_place() -> None:
    two = [{"class": "dog", "count": 2}, BENCH | {"position": ["left of", 0]}]
    assert judged([at("bench", 0, 0), at("dog", 30, 0), at("dog", 60, 0)], two).strict == 1
    assert judged([at("bench", 45, 0), at("dog", 30, 0), at("dog", 60, 0)], two).strict == 0


def test_a_wrong_colour_leaves_the_position_unasked() -> None:
    clauses = [DOG, BENCH | {"color": "red", "position": ["left of", 0]}]
    result = judged([at("bench", 0, 0), at("dog", 30, 0)], clauses, (), "blue")
    assert (result.strict, result.missing) == (0, ("1 red bench: found blue",))
    assert result.soft == pytest.approx(2 / 3)  # 1, 1, 0: three checks


@pytest.mark.parametrize(
    ("offset", "relations"),
    [
        ((-10, 0), {"left of"}),  # shortened by a tenth of 10 + 10: 8 of 10
        ((10, 0), {"right of"}),
        ((0, -10), {"above"}),
        ((0, 10), {"below"}),
        ((-10, -10), {"left of", "above"}),  # 8 / 14.1 = 0.57 each
        ((-5, -10), {"above"}),  # 3 / 11.2 = 0.27, 8 / 11.2 = 0.72
        ((-3.9, 0), set()),  # 1.9 / 3.9 < 0.5
        ((-4.1, 0), {"left of"}),  # 2.1 / 4.1 > 0.5
        ((1.9, -1.9), set()),  # nothing is left of either
        ((0, 0), set()),
    ],
)
def test_relations(offset: tuple[float, float], relations: set[str]) -> None:
    names = ("left of", "right of", "above", "below")
    assert {name for name in names if related(at("a", 50 + offset[0], 50 + offset[1]), at("b", 50, 50), name)} == relations


@given(x=st.floats(-50, 50), y=st.floats(-50, 50), size=st.floats(1, 40))
def test_relations_are_mirrored(x: float, y: float, size: float) -> None:
    a, b = at("a", x, y, size=size), at("b", 0, 0)
    for name, opposite in (("left of", "right of"), ("above", "below")):
        assert related(a, b, name) == related(b, a, opposite)
        assert not (related(a, b, name) and related(a, b, opposite))


def test_the_surest_above_the_threshold_are_kept() -> None:
    objects = kept([*row("bench", 0.3, 0.31, 0.99), at("dog", 0, 0, 0.2)], 0.3)
    assert {label: [one.score for one in found] for label, found in objects.items()} == {"bench": [0.99, 0.31]}
    many = kept([at("bench", i, 0, 0.5 + i / 100) for i in range(20)] + [at("dog", 0, 0)], 0.3)
    assert [one.score for one in many["bench"]] == [pytest.approx(0.5 + i / 100) for i in range(19, 3, -1)]
    assert len(many["dog"]) == 1


def test_overlap_counts_pixels_on_both_edges() -> None:
    a, b = Detection("a", 1.0, (0, 0, 9, 9)), Detection("a", 1.0, (5, 0, 14, 9))
    assert overlap(a, b) == pytest.approx(50 / 150)  # 10 x 10 pixels each, 5 x 10 in both
    assert overlap(a, a) == 1.0
    assert overlap(a, Detection("a", 1.0, (10, 0, 19, 9))) == 0.0


def test_boxes_that_overlap_too_much_are_one_object() -> None:
    near = [Detection("a", 0.9, (0, 0, 9, 9)), Detection("a", 0.8, (1, 0, 10, 9)), Detection("b", 0.7, (0, 0, 9, 9))]
    assert {label: len(found) for label, found in kept(near, 0.3).items()} == {"a": 2, "b": 1}
    assert kept(near, 0.3, max_overlap=0.5) == {"a": near[:1], "b": near[2:]}
    chain = [Detection("a", 1 - i / 10, (5 * i, 0, 5 * i + 9, 9)) for i in range(3)]  # each overlaps the next by a third
    assert kept(chain, 0.3, max_overlap=0.3) == {"a": [chain[0], chain[2]]}  # what was dropped drops nothing


def test_parsing_genevals_own_records() -> None:
    record = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bench left of a dog",
    }
    request = Request.parse(record)
    assert [(c.label, c.count, c.colour, c.position) for c in request.include] == [
        ("dog", 1, None, None),
        ("bench", 1, None, ("left of", 0)),
    ]
    assert request.labels == {"dog", "bench"}
    assert Request.parse({"tag": "counting", "include": [], "exclude": [{"class": "cat", "count": 2}]}).labels == {"cat"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({}, "not GenEval's metadata: it lacks 'include'"),
        ({"include": [BENCH]}, "it lacks 'tag'"),
        ({"tag": "x", "include": [{"class": "bench"}]}, "it lacks 'count'"),
        ({"tag": "x", "include": [{"count": 1}]}, "it lacks 'class'"),
        ({"tag": "x", "include": [BENCH | {"count": 0}]}, "count 0 is not a number of objects, at least 1"),
        ({"tag": "x", "include": [BENCH | {"count": "two"}]}, "count 'two' is not a number of objects"),
        ({"tag": "x", "include": [BENCH | {"color": "teal"}]}, "color 'teal' is none of red, orange, yellow, "),
        ({"tag": "x", "include": [DOG, BENCH | {"position": ["near", 0]}]}, r"position \['near', 0\] is not a relation"),
        ({"tag": "x", "include": [BENCH | {"position": ["above", 0]}]}, r"position \['above', 0\] is not .* an earlier clause"),
        ({"tag": "x", "include": [DOG, BENCH | {"position": "above"}]}, "not GenEval's metadata: "),
        ({"tag": "x", "include": 3}, "not GenEval's metadata: "),
        ({"tag": "x", "include": []}, "GenEval metadata that asks for nothing"),
    ],
)
def test_metadata_of_another_form(record: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Request.parse(record)
