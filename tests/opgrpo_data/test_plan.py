"""The plan against NumPy: advantages, importance weights, trained steps, and how trajectories are dealt to updates."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opgrpo_data.errors import StoreError
from opgrpo_data.schema import PLANS
from tests.opgrpo_data import factories
from tests.opgrpo_data.factories import located_row, plan_rule, rewards, trajectories

REWARDS = st.floats(-100, 100)


def plan_of(
    groups: Mapping[str, Sequence[float | None]], excluded: set[str] | None = None, **rule: Any
) -> dict[str, dict[str, Any]]:
    """Plan rows by trajectory_id, of fresh members `<group>-<i>` with these rewards."""
    values = {f"{group}-{i}": value for group, members in groups.items() for i, value in enumerate(members)}
    rows = [located_row(name, group_id=name.split("-")[0]) for name in values]
    plan = factories.plan(trajectories(rows), rewards(values), plan_rule(**rule), excluded=excluded or ())
    return {row["trajectory_id"]: row for row in plan.to_pylist()}


def reference(groups: dict[str, NDArray[np.float64]], form: str) -> dict[str, float]:
    """A = (R - mean of the group) / (std + 1e-4), std with ddof 0 over the group or over everything; by NumPy."""
    everything = np.concatenate(list(groups.values()))
    return {
        f"{group}-{i}": float((value - members.mean()) / ((members if form == "group" else everything).std(ddof=0) + 1e-4))
        for group, members in groups.items()
        for i, value in enumerate(members)
    }


# -- advantages ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(st.lists(REWARDS, min_size=1, max_size=6), min_size=1, max_size=4),
    form=st.sampled_from(["group", "global"]),
    clip=st.sampled_from([0.5, 1.5, 1e9]),
)
def test_advantages_are_numpys(members: list[list[float]], form: str, clip: float) -> None:
    groups = {f"g{n}": np.array(values) for n, values in enumerate(members)}
    planned = plan_of({name: list(values) for name, values in groups.items()}, advantage_std=form, advantage_clip=clip)
    expected = reference(groups, form)
    assert planned.keys() == expected.keys()
    for name, row in planned.items():
        assert row["advantage"] == pytest.approx(min(max(expected[name], -clip), clip), rel=1e-7, abs=1e-7)
        assert abs(row["advantage"]) <= clip


def test_golden_advantages() -> None:
    """Rewards 1, 2, 3, 6: mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    planned = plan_of({"g": [1.0, 2.0, 3.0, 6.0]})
    spread = math.sqrt(3.5) + 1e-4
    assert [planned[f"g-{i}"]["advantage"] for i in range(4)] == pytest.approx([-2 / spread, -1 / spread, 0.0, 3 / spread])
    assert planned["g-3"]["advantage"] == pytest.approx(1.603482, abs=1e-6)
    assert [planned[f"g-{i}"]["reward"] for i in range(4)] == [1.0, 2.0, 3.0, 6.0]


def test_global_std_is_over_the_whole_batch() -> None:
    """Groups 0, 2 and 10, 10: deviations -1, 1, 0, 0 from their own means; the batch 0, 2, 10, 10 has variance 20.75."""
    planned = plan_of({"a": [0.0, 2.0], "b": [10.0, 10.0]}, advantage_std="global")
    expected = 1 / (math.sqrt(20.75) + 1e-4)
    assert [planned[name]["advantage"] for name in ("a-0", "a-1", "b-0", "b-1")] == pytest.approx([-expected, expected, 0, 0])


def test_clip_is_symmetric_and_exact() -> None:
    planned = plan_of({"g": [0.0] * 99 + [1.0], "h": [0.0] * 99 + [-1.0]}, advantage_clip=5.0)
    assert (planned["g-99"]["advantage"], planned["h-99"]["advantage"]) == (5.0, -5.0)  # unclipped: 9.9 and -9.9


@pytest.mark.parametrize("form", ["group", "global"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_group_of_equals_has_no_advantage(form: str, value: float) -> None:
    planned = plan_of({"g": [value] * 4}, advantage_std=form)
    assert [row["advantage"] for row in planned.values()] == [0.0] * 4


@settings(max_examples=20, deadline=None)
@given(value=REWARDS, size=st.integers(1, 7))
def test_a_group_of_equals_has_no_advantage_beyond_rounding(value: float, size: int) -> None:
    """The delta of 1e-4 keeps the rounding of the mean from becoming a signal."""
    planned = plan_of({"g": [value] * size})
    assert [row["advantage"] for row in planned.values()] == pytest.approx([0.0] * size, abs=1e-9)


# -- importance weights --------------------------------------------------------------------------------------------------


@st.composite
def continuations(draw: st.DrawFn) -> dict[str, Any]:
    """A row with T steps and a prefix of 0..T of them, its log-probs as different as two policies make them."""
    steps = draw(st.integers(1, 6))
    densities = st.lists(st.floats(-300, 300), min_size=steps, max_size=steps)
    behaviour = draw(densities)
    differences = draw(st.lists(st.floats(-3, 3), min_size=steps, max_size=steps))
    return {
        "steps": steps,
        "prefix_steps": draw(st.integers(0, steps)),
        "behaviour_logprob": behaviour,
        "old_logprob": [b + d for b, d in zip(behaviour, differences, strict=True)],
        "num_elements": draw(st.integers(1, 100)),
    }


def expected_weight(row: dict[str, Any], reduction: str, low: float, high: float) -> float:
    """w = exp(sum over the prefix of (l_old - l_b)), per element if reduction is mean, clipped; 1 without a prefix."""
    kept = row["prefix_steps"]
    if kept == 0:
        return 1.0
    log_weight = (np.array(row["old_logprob"][:kept]) - np.array(row["behaviour_logprob"][:kept])).sum()
    return float(np.clip(np.exp(log_weight / (row["num_elements"] if reduction == "mean" else 1)), low, high))


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(continuations(), min_size=1, max_size=5),
    reduction=st.sampled_from(["sum", "mean"]),
    bounds=st.sampled_from([(0.0, 1e9), (0.0, 2.0), (0.5, 1.5)]),
)
def test_importance_weights_are_numpys(drawn: list[dict[str, Any]], reduction: str, bounds: tuple[float, float]) -> None:
    rows = [located_row(f"t{i}", **changes) for i, changes in enumerate(drawn)]
    rule = plan_rule(weight_reduction=reduction, weight_min=bounds[0], weight_max=bounds[1])
    plan = factories.plan(trajectories(rows), rewards({row["trajectory_id"]: 0.0 for row in rows}), rule)
    for planned in plan.to_pylist():
        changes = drawn[int(planned["trajectory_id"][1:])]
        assert planned["importance_weight"] == pytest.approx(expected_weight(changes, reduction, *bounds), rel=1e-9)
        assert planned["role"] == ("continuation" if changes["prefix_steps"] else "fresh")


def one_weight(rule: dict[str, Any] | None = None, **changes: Any) -> float:
    plan = factories.plan(trajectories([located_row("t", **changes)]), rewards({"t": 0.0}), plan_rule(**rule or {}))
    return float(plan["importance_weight"][0].as_py())


def test_golden_importance_weights() -> None:
    """log w = (-1.0 + 1.25) + (-2.0 + 1.5) = -0.25; the third step is tail and does not count."""
    two_steps: dict[str, Any] = {"prefix_steps": 2, "old_logprob": [-1.0, -2.0, 9.0], "behaviour_logprob": [-1.25, -1.5, 0.0]}
    assert one_weight(**two_steps) == pytest.approx(math.exp(-0.25), rel=1e-15)
    assert one_weight({"weight_reduction": "mean"}, **two_steps, num_elements=8) == pytest.approx(
        math.exp(-0.25 / 8), rel=1e-15
    )
    assert one_weight({"weight_min": 0.9}, **two_steps) == 0.9
    assert one_weight({"weight_max": 0.5}, **two_steps) == 0.5


def test_a_prefix_drawn_by_the_old_policy_itself_weighs_one() -> None:
    for kept in (1, 2, 3):
        assert one_weight(prefix_steps=kept, old_logprob=[-7.1, 0.3, 5.5], behaviour_logprob=[-7.1, 0.3, 5.5]) == 1.0


def test_fresh_members_weigh_one_whatever_the_bounds_and_densities() -> None:
    far: dict[str, Any] = {"old_logprob": [50.0, 0.0, 0.0], "behaviour_logprob": [0.0, 0.0, 0.0]}
    for prefix in (0, None):
        assert one_weight({"weight_min": 2.0, "weight_max": 3.0}, prefix_steps=prefix, **far) == 1.0


def test_a_weight_beyond_all_numbers_is_cut() -> None:
    far: dict[str, Any] = {"prefix_steps": 1, "old_logprob": [5000.0, 0.0, 0.0], "behaviour_logprob": [0.0, 0.0, 0.0]}
    assert one_weight({"weight_max": 2.0}, **far) == 2.0
    assert one_weight({"weight_min": 0.25}, **far | {"old_logprob": [-5000.0, 0.0, 0.0]}) == 0.25


# -- dealing -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), steps=st.integers(1, 6), microbatch=st.integers(1, 12), seed=st.integers(0, 3))
def test_every_trajectory_is_dealt_once_into_near_equal_bounded_batches(
    count: int, steps: int, microbatch: int, seed: int
) -> None:
    names = [f"t{i}" for i in range(count)]
    rule = plan_rule(optimizer_steps=steps, microbatch=microbatch, seed=seed)
    plan = factories.plan(trajectories([located_row(name) for name in names]), rewards(dict.fromkeys(names, 0.0)), rule)
    assert plan.schema == PLANS
    rows = plan.to_pylist()
    assert Counter(row["trajectory_id"] for row in rows) == Counter(names)
    assert {row["rank"] for row in rows} == {0}
    keys = [(row["optimizer_step"], row["microstep"]) for row in rows]
    assert keys == sorted(keys)
    micro: dict[int, Counter[int]] = defaultdict(Counter)
    for step, microstep in keys:
        micro[step][microstep] += 1
    sizes = [sum(batches.values()) for batches in micro.values()]
    assert len(micro) == min(steps, count)
    assert max(sizes) - min(sizes) <= 1
    assert max(micro) < steps
    for batches in micro.values():
        assert sorted(batches) == list(range(len(batches)))
        assert all(batches[m] == microbatch for m in range(len(batches) - 1))  # only the last one may be smaller
        assert 1 <= batches[len(batches) - 1] <= microbatch


def many(count: int = 24) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of 4 groups and their rewards: thirds, whose sums depend on their order."""
    rows = [located_row(f"t{i}", group_id=f"g{i % 4}", prefix_steps=i % 3, old_logprob=[-i / 7] * 3) for i in range(count)]
    return rows, {f"t{i}": (i * 7 % 11) / 3 for i in range(count)}


@pytest.mark.parametrize("form", ["group", "global"])
def test_the_plan_does_not_depend_on_the_order_of_its_input(form: str) -> None:
    rows, values = many()
    rule = plan_rule(advantage_std=form, optimizer_steps=3, microbatch=5)
    plan = factories.plan(trajectories(rows), rewards(values), rule)
    for seed in range(5):
        shuffle = random.Random(seed)
        shuffled = factories.plan(
            trajectories(shuffle.sample(rows, len(rows))),
            rewards(dict(shuffle.sample(list(values.items()), len(values)))),
            rule,
        )
        assert shuffled.equals(plan)  # bit for bit: the same plan must give the same policy


def test_the_seed_shuffles_the_batch() -> None:
    rows, values = many()
    orders = [
        factories.plan(trajectories(rows), rewards(values), plan_rule(seed=seed))["trajectory_id"].to_pylist()
        for seed in range(4)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(values) for order in orders)


# -- what is left out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "std", "expected"),
    [
        (None, [0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3]),
        (2, [0.5, 0.5, 0.5, 0.5], [0, 1]),
        (9, [0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3]),
        (None, [0.5, 0.5, 0.5, 0.0], [0, 1, 2]),
        (3, [0.0, 0.5, 0.0, 0.5], [1]),
    ],
)
def test_only_steps_inside_the_window_that_have_a_density_are_trained(
    window: int | None, std: list[float], expected: list[int]
) -> None:
    row = located_row("t", steps=4, transition_std=std, prefix_steps=1)
    plan = factories.plan(trajectories([row]), rewards({"t": 0.0}), plan_rule(window=window))
    assert plan["train_steps"].to_pylist() == [expected]
    assert (plan["first_latent"].to_pylist(), plan["last_latent"].to_pylist()) == ([0], [expected[-1] + 1])


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_leaves_its_trajectory_out(bad: float | None) -> None:
    planned = plan_of({"g": [1.0, bad, 3.0], "h": [5.0, 7.0]})
    assert sorted(planned) == ["g-0", "g-2", "h-0", "h-1"]
    assert planned["g-2"]["advantage"] == pytest.approx(1 / (1 + 1e-4))  # of the two that remain: mean 2, std 1


def test_trajectories_without_rewards_and_in_quarantine_are_left_out() -> None:
    rows = [located_row(f"t{i}") for i in range(4)]
    values = {"t0": 1.0, "t1": 3.0, "t2": 100.0, "elsewhere": 7.0}
    plan = factories.plan(trajectories(rows), rewards(values), plan_rule(), excluded={"t2", "unknown"})
    assert sorted(plan["trajectory_id"].to_pylist()) == ["t0", "t1"]
    assert sorted(plan["advantage"].to_pylist()) == pytest.approx([-1 / 1.0001, 1 / 1.0001])


@pytest.mark.parametrize("values", [{}, {"t0": None, "t1": math.nan}, {"t9": 1.0}])
def test_nothing_usable_is_an_error(values: dict[str, float | None]) -> None:
    rows = [located_row("t0"), located_row("t1")]
    with pytest.raises(StoreError, match="no trajectory of this iteration has a usable reward: see the view reward_errors"):
        factories.plan(trajectories(rows), rewards(values), plan_rule())


def test_all_in_quarantine_is_an_error() -> None:
    with pytest.raises(StoreError, match="no trajectory of this iteration has a usable reward"):
        factories.plan(trajectories([located_row("t0")]), rewards({"t0": 1.0}), plan_rule(), excluded={"t0"})


def test_a_plan_row_carries_what_training_needs() -> None:
    row = located_row("t", prefix_steps=1, iteration=3, prompt_id="p9", sigmas=[1.0, 0.5, 0.25, 0.0], noise_level=0.4)
    [planned] = factories.plan(trajectories([row]), rewards({"t": 2.5}), plan_rule(), iteration=3).to_pylist()
    carried = [name for name in PLANS.names if name in row]
    assert {"latents_offset", "latents_crc32", "old_logprob", "run_id", "iteration", "sigmas"} <= set(carried)
    assert {name: planned[name] for name in carried} == {name: row[name] for name in carried}
    assert {"prefix_steps", "path_variance", "transition_std", "num_elements"} <= set(carried)
    assert planned["reward"] == 2.5
    assert planned["age"] == 0
