"""Advantages of composite rewards against float64 NumPy: the parts summed, standardised over the batch, or decoupled (GDPO)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opgrpo_data.errors import StoreError
from tests.opgrpo_data import factories
from tests.opgrpo_data.factories import located_row, plan_rule, reward_row, rewards, trajectories

DELTA = 1e-4
Values = NDArray[np.float64]


def planned(groups: Mapping[str, Sequence[Sequence[float]]], weights: Sequence[float], **rule: Any) -> list[float]:
    """Advantages of the members of groups, in their order; a member is the list of its parts' values."""
    names = [f"part.{i}" for i in range(len(weights))]
    rows, scored = [], []
    for group, members in groups.items():
        for i, values in enumerate(members):
            rows.append(located_row(f"{group}-{i}", group_id=group, prompt_id=f"p{group}", member_index=i))
            detail = {"parts": dict(zip(names, values, strict=True)), "weights": dict(zip(names, weights, strict=True))}
            value = sum(w * v for w, v in zip(weights, values, strict=True))
            scored.append(reward_row(f"{group}-{i}", value, detail=json.dumps(detail | {"details": {}})))
    plan = factories.plan(trajectories(rows), rewards(scored), plan_rule(**rule))
    found = {row["trajectory_id"]: row["advantage"] for row in plan.to_pylist()}
    assert {row["trajectory_id"]: row["value"] for row in scored} == {r["trajectory_id"]: r["reward"] for r in plan.to_pylist()}
    return [found[row["trajectory_id"]] for row in rows]


def grouped(values: Values, groups: Sequence[int], form: str) -> Values:
    """A of one reward, (N,): the formula of docs/maths.md, loop by loop."""
    advantages = np.zeros_like(values)
    for group in set(groups):
        members = values[np.array(groups) == group]
        spread = (members if form == "group" else values).std(ddof=0) + DELTA
        if members.max() != members.min():
            advantages[np.array(groups) == group] = (members - members.mean()) / spread
    return advantages


def reference(matrix: Values, weights: Sequence[float], groups: Sequence[int], parts: str, form: str) -> Values:
    """Advantages (N,) of a matrix (N, parts)."""
    if parts == "sum":
        return grouped(matrix @ np.array(weights), groups, form)
    if parts == "zscore":
        return grouped((matrix - matrix.mean(0)) / (matrix.std(0, ddof=0) + DELTA) @ np.array(weights), groups, form)
    summed = np.stack([grouped(column, groups, form) for column in matrix.T], axis=1) @ np.array(weights)
    # The published form subtracts the batch mean, which is 0.
    return np.asarray((summed - summed.mean()) / (summed.std(ddof=0) + DELTA))


VALUE = st.integers(-40, 40).map(lambda n: n / 8)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.3, 1.0, -0.5, 2.0, 0.0]), min_size=1, max_size=3),
    parts=st.sampled_from(["sum", "zscore", "gdpo"]),
    form=st.sampled_from(["group", "global"]),
    data=st.data(),
)
def test_advantages_are_numpys(sizes: list[int], weights: list[float], parts: str, form: str, data: st.DataObject) -> None:
    member = st.lists(VALUE, min_size=len(weights), max_size=len(weights))
    groups = {str(n): data.draw(st.lists(member, min_size=size, max_size=size)) for n, size in enumerate(sizes)}
    matrix = np.array([values for members in groups.values() for values in members], dtype=np.float64)
    labels = [int(name) for name, members in groups.items() for _ in members]
    expected = reference(matrix, weights, labels, parts, form)
    found = planned(groups, weights, advantage_parts=parts, advantage_std=form)
    assert found == pytest.approx(expected.tolist(), rel=1e-7, abs=1e-7)


def test_golden_gdpo() -> None:
    """Two parts, one group of two: (0, 1) and (0, 2) are (-1, 1) alike to the sum; by hand.

    Part a: 0, 0 is dead. Part b: 1, 2 has mean 1.5 and std 0.5. S = -+ 0.5/(0.5 + delta) * weight 3, whose std is |S|.
    """
    s = 3 * 0.5 / (0.5 + DELTA)
    found = planned({"g": [[0.0, 1.0], [0.0, 2.0]]}, [1.0, 3.0], advantage_parts="gdpo")
    assert found == pytest.approx([-s / (s + DELTA), s / (s + DELTA)], rel=1e-12)


def test_golden_zscore() -> None:
    """A part a thousand times larger drowns the other in the sum; standardised, both count. Values by hand.

    a: 0, 1, 1, 0 (mean 0.5, std 0.5), b: 1000, 3000, 1000, 3000 (mean 2000, std 1000): z = -+1 each, up to delta.
    """
    members = [[0.0, 1000.0], [1.0, 3000.0], [1.0, 1000.0], [0.0, 3000.0]]
    a, b = 0.5 / (0.5 + DELTA), 1000 / (1000 + DELTA)
    sums = np.array([-a - b, a + b, a - b, b - a])
    expected = sums / (math.sqrt((sums**2).mean()) + DELTA)
    assert planned({"g": members}, [1.0, 1.0], advantage_parts="zscore") == pytest.approx(expected.tolist(), rel=1e-12)
    raw = planned({"g": members}, [1.0, 1.0])
    assert raw[1] > 0.99
    assert abs(raw[2] - raw[0]) < 0.01


def test_gdpo_tells_apart_what_the_sum_does_not() -> None:
    """One reward gained or both: the sum, divided by its std in the group, gives both groups -1 and 1. GDPO gives the second
    twice as much."""
    narrow, wide = [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]
    summed = planned({"a": narrow, "b": wide}, [1.0, 1.0])
    decoupled = planned({"a": narrow, "b": wide}, [1.0, 1.0], advantage_parts="gdpo")
    assert summed == pytest.approx([-1, 1, -1, 1], abs=1e-3)
    assert decoupled[3] == pytest.approx(2 * decoupled[1], rel=1e-3)


@pytest.mark.parametrize("parts", ["zscore", "gdpo"])
@pytest.mark.parametrize("form", ["group", "global"])
def test_a_group_of_equals_has_exactly_no_advantage(parts: str, form: str) -> None:
    groups = {"a": [[0.1, 0.7]] * 3, "b": [[0.1, 0.2], [0.3, 0.9], [0.7, 0.4]]}
    found = planned(groups, [0.3, 0.7], advantage_parts=parts, advantage_std=form)
    assert found[:3] == [0.0] * 3
    assert all(found[3:])


def test_the_clip_comes_last() -> None:
    found = planned({"g": [[0.0]] * 99 + [[1.0]]}, [1.0], advantage_parts="gdpo", advantage_clip=5.0)
    assert max(found) == 5.0


def test_a_composite_of_one_part_has_the_advantages_of_the_part() -> None:
    """zscore of one part only rescales; GDPO of one group divides by a std of 1."""
    groups = {"g": [[1.0], [2.0], [3.0], [6.0]]}
    for parts in ("zscore", "gdpo"):
        assert planned(groups, [1.0], advantage_parts=parts) == pytest.approx(planned(groups, [1.0]), rel=1e-3)


@pytest.mark.parametrize("detail", ["{}", None, '{"parts": {"a": 1}}'])
def test_rewards_without_parts_are_refused(detail: str | None) -> None:
    table = rewards([reward_row("t0", 1.0, detail=detail)])
    with pytest.raises(StoreError, match=r"the stored rewards do not tell their parts: score with reward.name composite"):
        factories.plan(trajectories([located_row("t0")]), table, plan_rule(advantage_parts="gdpo"))
