"""The options of the plan, against NumPy: reused groups, epochs, subsets of steps, every way to weigh, what is read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.plan import PlanRule
from opgrpo_data.schema import PLANS, table_of
from tests.opgrpo_data import factories
from tests.opgrpo_data.factories import located_row, plan_rule, rewards, trajectories

Row = dict[str, Any]

# What a plan decides: everything else of a reused row stays as the earlier plan had it.
DECIDED = {
    "iteration",
    "optimizer_step",
    "microstep",
    "rank",
    "importance_weight",
    "train_steps",
    "first_latent",
    "last_latent",
    "age",
    "predicted_ess",
    "path_variance",
}


def past(*rows: Row, iteration: int = 0, **judged: Any) -> pa.Table:
    """Rows of an earlier plan, as group reuse hands them on: judged by the present old policy."""
    members = [row | {"iteration": iteration} for row in rows]
    values = {row["trajectory_id"]: float(i) for i, row in enumerate(members)}
    planned = factories.plan(trajectories(members), rewards(values), plan_rule(), iteration=iteration).to_pylist()
    told = {"old_logprob": [-1.0, -1.0, -1.0], "path_variance": [0.0, 0.0, 0.0]} | judged
    return table_of([row | {"role": "reused"} | told for row in planned], PLANS)


def fresh(count: int, *, spread: bool = True, **changes: Any) -> tuple[list[Row], dict[str, float]]:
    """One group of fresh members and their rewards."""
    rows = [located_row(f"f{i:02d}", **changes) for i in range(count)]
    return rows, {row["trajectory_id"]: float(i if spread else 0) for i, row in enumerate(rows)}


def planned(rows: list[Row], values: dict[str, float], rule: PlanRule, **more: Any) -> list[Row]:
    """The rows of a plan in the order of execution."""
    found: list[Row] = factories.plan(trajectories(rows), rewards(values), rule, **more).to_pylist()
    return found


def one_reused(rule: dict[str, Any] | None = None, *, steps: int = 3, **judged: Any) -> Row | None:
    """What becomes of one reused member beside two fresh ones of iteration 4; None: it is left out."""
    rows, values = fresh(2, iteration=4, steps=steps)
    old = past(located_row("old", steps=steps, prompt_id="p7", group_id="g7"), iteration=1, **judged)
    found = planned(rows, values, plan_rule(**rule or {}), reused=old, iteration=4)
    assert {row["trajectory_id"] for row in found if row["role"] != "reused"} == {"f00", "f01"}
    return next((row for row in found if row["role"] == "reused"), None)


# -- reused groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "window", "kept"),
    [
        (0.0, None, 3),
        (0.5, None, 2),  # exp(-0.6) = 0.55, exp(-0.9) = 0.41
        (0.7, None, 1),
        (0.74, None, 1),  # exp(-0.3) = 0.7408
        (0.75, None, 0),
        (0.0, 2, 2),
        (0.5, 1, 1),
        (0.7, 9, 1),
    ],
)
def test_a_reused_member_trains_and_weighs_its_trusted_prefix(floor: float, window: int | None, kept: int) -> None:
    judged: dict[str, Any] = {"path_variance": [0.3, 0.3, 0.3], "old_logprob": [-1.5, -2.5, -0.25]}
    row = one_reused({"reuse_ess": floor, "window": window}, **judged)
    if kept == 0:
        assert row is None
        return
    assert row is not None
    assert row["train_steps"] == list(range(kept))
    assert row["path_variance"] == [0.3] * kept
    # Behaviour densities are -1: no step more than what is trained enters the weight.
    assert row["importance_weight"] == pytest.approx(math.exp(sum([-0.5, -1.5, 0.75][:kept])), rel=1e-12)
    assert (row["first_latent"], row["last_latent"]) == (0, kept)


def test_a_reused_row_keeps_its_reward_advantage_and_place() -> None:
    [before] = past(located_row("old", prompt_id="p7", group_id="g7"), iteration=1).to_pylist()
    row = one_reused()
    assert row is not None
    assert row["age"] == 3
    assert row["iteration"] == 4
    assert {name: row[name] for name in row if name not in DECIDED} == {n: before[n] for n in before if n not in DECIDED}


def test_reused_rows_have_no_part_in_the_advantages_of_fresh_ones() -> None:
    rows, values = fresh(4)
    alone = {row["trajectory_id"]: row["advantage"] for row in planned(rows, values, plan_rule(advantage_std="global"))}
    old = past(located_row("old-0"), located_row("old-1"))
    found = planned(rows, values, plan_rule(advantage_std="global"), reused=old, iteration=1)
    assert {row["trajectory_id"]: row["advantage"] for row in found if row["role"] == "fresh"} == alone
    # Rewards 0 and 1 of the earlier plan, whatever the present batch is like.
    assert sorted(row["advantage"] for row in found if row["role"] == "reused") == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001])


def test_the_trusted_prefix_of_a_continuation_counts_whole_when_it_is_reused() -> None:
    """Its own prefix was off-policy before; the present old policy has judged all of it, and the tail."""
    rows, values = fresh(2, iteration=2)
    parent = located_row("old", prefix_steps=1, behaviour_logprob=[-1.0, -2.0, -4.0])
    old = past(parent, iteration=1, old_logprob=[-1.5, -1.75, -4.0], path_variance=[0.1, 0.1, 5.0])
    [row] = [r for r in planned(rows, values, plan_rule(reuse_ess=0.5), reused=old, iteration=2) if r["role"] == "reused"]
    assert row["train_steps"] == [0, 1]
    assert row["importance_weight"] == pytest.approx(math.exp(-0.5 + 0.25), rel=1e-12)


def test_reused_rows_in_quarantine_are_left_out() -> None:
    rows, values = fresh(2, iteration=1)
    old = past(located_row("old-0"), located_row("old-1"))
    found = planned(rows, values, plan_rule(), reused=old, excluded={"old-1", "f00"}, iteration=1)
    assert sorted(row["trajectory_id"] for row in found) == ["f01", "old-0"]


def test_steps_without_density_are_not_trained_though_the_prefix_spans_them() -> None:
    rows, values = fresh(2, iteration=1)
    old = past(located_row("old", transition_std=[0.5, 0.0, 0.5]), path_variance=[0.1, 0.0, 0.1])
    [row] = [r for r in planned(rows, values, plan_rule(reuse_ess=0.5), reused=old, iteration=1) if r["role"] == "reused"]
    assert row["train_steps"] == [0, 2]


# -- weights against an oracle -------------------------------------------------------------------------------------------

# Multiples of 1/64: sums of variances are exact, so that the trusted prefix does not depend on the order of summation.
LAMBDAS = st.integers(0, 96).map(lambda n: n / 64)
SHIFTS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)
MEMBERS = st.tuples(st.sampled_from(["fresh", "continuation", "reused"]), st.integers(1, 3), SHIFTS, st.tuples(*[LAMBDAS] * 3))


def oracle(members: list[tuple[str, int, list[float], tuple[float, ...]]], rule: PlanRule) -> dict[int, float]:
    """Weights of the members that are planned, from the formulas in docs/maths.md, sections 4 to 6."""
    weights, off_policy = {}, []
    for index, (role, prefix, shift, variance) in enumerate(members):
        kept = {"fresh": 0, "continuation": prefix}.get(role)
        if kept is None:
            trusted = np.flatnonzero(np.exp(-np.cumsum(variance)) < rule.reuse_ess)
            kept = min(int(trusted[0]) if len(trusted) else 3, rule.window or 3)
            if kept == 0:
                continue
        weights[index] = 1.0
        if kept == 0 or rule.weight.correction != "sequence":
            continue
        off_policy.append(index)
        log_w, total, budget = float(np.sum(shift[:kept])), float(np.sum(variance[:kept])), rule.weight.variance_budget
        if budget is not None and total > budget:
            a = np.sqrt(budget / total)
            log_w = a * (log_w + total / 2) - budget / 2
        if rule.weight.reduction == "mean":
            log_w /= 8  # elements
        weights[index] = float(np.clip(np.exp(log_w), rule.weight.lowest, rule.weight.highest))
    if rule.weight.normalised and off_policy:
        mean = np.mean([weights[index] for index in off_policy])
        weights |= {index: float(weights[index] / mean) for index in off_policy}
    return weights


@given(
    members=st.lists(MEMBERS, max_size=6),
    correction=st.sampled_from(["sequence", "sequence", "step", "none"]),
    reduction=st.sampled_from(["sum", "mean"]),
    budget=st.sampled_from([None, 0.0, 0.5, 2.0]),
    bounds=st.sampled_from([(0.0, 1e9), (0.1, 2.0), (0.9, 1.1)]),
    normalised=st.booleans(),
    reuse_ess=st.sampled_from([0.0, 0.37, 0.8]),
    window=st.sampled_from([None, 1, 2]),
)
@settings(deadline=None, max_examples=60)
def test_weights_are_numpys(members: list[Any], **options: Any) -> None:
    budget, (low, high), normalised = options.pop("budget"), options.pop("bounds"), options.pop("normalised")
    options |= {"variance_budget": budget, "weight_min": low, "weight_max": high, "weight_normalised": normalised}
    rule = plan_rule(weight_reduction=options.pop("reduction"), **options)
    now, values, old = [located_row("f", iteration=1)], {"f": 0.0}, []
    for index, (role, prefix, shift, variance) in enumerate(members):
        name, judged = f"m{index}", [b + s for b, s in zip([-100.0, 0.0, 50.0], shift, strict=True)]
        row = located_row(name, behaviour_logprob=[-100.0, 0.0, 50.0], old_logprob=judged, iteration=1)
        if role == "reused":
            old += past(row, old_logprob=judged, path_variance=list(variance)).to_pylist()
            continue
        kept = prefix if role == "continuation" else 0
        now.append(row | {"prefix_steps": kept, "path_variance": list(variance[:kept])})
        values[name] = 0.0
    found = {row["trajectory_id"]: row for row in planned(now, values, rule, reused=table_of(old, PLANS), iteration=1)}
    expected = {"f": 1.0} | {f"m{index}": weight for index, weight in oracle(members, rule).items()}
    assert {name: row["importance_weight"] for name, row in found.items()} == pytest.approx(expected, rel=1e-9)


SHIFTED: dict[str, Any] = {"prefix_steps": 2, "old_logprob": [-1.0, -2.0, 9.0], "path_variance": [0.5, 1.5]}


def weight_of(*, reused: bool = False, **rule: Any) -> float:
    """Of a continuation (log w = -0.25 over two steps, Lambda = 2), or of a member reused whole (Lambda 2, log w = -0.25)."""
    rows, values = fresh(2)
    behaviour = [-1.25, -1.5, 9.0]
    if reused:
        judged = {"old_logprob": SHIFTED["old_logprob"], "path_variance": [0.5, 1.5, 0.0]}
        old = past(located_row("x", behaviour_logprob=behaviour), **judged)
        found = planned(rows, values, plan_rule(**rule), reused=old, iteration=1)
    else:
        found = planned(
            [*rows, located_row("x", behaviour_logprob=behaviour, **SHIFTED)], values | {"x": 0.5}, plan_rule(**rule)
        )
    [row] = [row for row in found if row["trajectory_id"] == "x"]
    return float(row["importance_weight"])


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("correction", ["step", "none"])
def test_other_corrections_leave_the_weight_at_1(correction: str, reused: bool) -> None:
    assert weight_of(reused=reused, correction="sequence") == pytest.approx(math.exp(-0.25), rel=1e-12)
    assert weight_of(reused=reused, correction=correction) == 1.0
    assert weight_of(reused=reused, correction=correction, weight_min=3.0, weight_max=4.0) == 1.0  # nothing to cut either


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize(
    ("budget", "log_w"),
    [
        (None, -0.25),
        (2.0, -0.25),
        (9.0, -0.25),
        (0.5, 0.5 * 0.75 - 0.25),  # a = 1/2: a (log w + 1) - a^2
        (0.0, 0.0),
    ],
)
def test_variance_budget_by_hand(budget: float | None, log_w: float, reused: bool) -> None:
    assert weight_of(reused=reused, variance_budget=budget) == pytest.approx(math.exp(log_w), rel=1e-12)


def test_normalised_weights_have_mean_1_over_off_policy_rows_only() -> None:
    rows, values = fresh(3, iteration=1)
    shifts = {f"c{i}": [i / 4, 0.0, 0.0] for i in range(4)}
    rows += [
        located_row(name, iteration=1, prefix_steps=1, behaviour_logprob=[0.0] * 3, old_logprob=s) for name, s in shifts.items()
    ]
    values |= dict.fromkeys(shifts, 1.0)
    old = past(located_row("old", behaviour_logprob=[0.0] * 3), old_logprob=[-1.0, 0.0, 0.0])
    found = planned(rows, values, plan_rule(weight_normalised=True, epochs=2), reused=old, iteration=1)
    weights = {row["trajectory_id"]: row["importance_weight"] for row in found}
    off_policy = {**{name: math.exp(shift[0]) for name, shift in shifts.items()}, "old": math.exp(-1)}
    mean = sum(off_policy.values()) / 5
    assert {name: weights[name] for name in off_policy} == pytest.approx({n: w / mean for n, w in off_policy.items()})
    assert np.mean([weights[name] for name in off_policy]) == pytest.approx(1.0, rel=1e-12)
    assert {weights[f"f{i:02d}"] for i in range(3)} == {1.0}


def test_normalising_comes_after_the_cut_and_survives_weights_of_nothing() -> None:
    rows, values = fresh(2)
    for name, old in (("c0", 5.0), ("c1", 0.0)):
        rows.append(located_row(name, prefix_steps=1, behaviour_logprob=[0.0] * 3, old_logprob=[old, 0.0, 0.0]))
        values[name] = 1.0
    cut = {
        r["trajectory_id"]: r["importance_weight"]
        for r in planned(rows, values, plan_rule(weight_normalised=True, weight_max=3.0))
    }
    assert (cut["c0"], cut["c1"]) == (pytest.approx(1.5), pytest.approx(0.5))
    gone = [row | {"old_logprob": [-5000.0, 0.0, 0.0]} if row["prefix_steps"] else row for row in rows]
    weights = {r["trajectory_id"]: r["importance_weight"] for r in planned(gone, values, plan_rule(weight_normalised=True))}
    assert weights == {"f00": 1.0, "f01": 1.0, "c0": 0.0, "c1": 0.0}


# -- epochs and dealing --------------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 20),
    dead=st.integers(0, 20),
    epochs=st.integers(1, 3),
    steps=st.integers(1, 4),
    microbatch=st.integers(1, 8),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_every_epoch_goes_through_the_whole_batch(
    count: int, dead: int, epochs: int, steps: int, microbatch: int, seed: int
) -> None:
    """Each trajectory once an epoch; those with an advantage, and all of them, dealt evenly over its optimizer steps."""
    rows = [located_row(f"a{i}", group_id="a") for i in range(count)] + [
        located_row(f"d{i}", group_id="d") for i in range(dead)
    ]
    values = {f"a{i}": float(i) for i in range(count)} | {f"d{i}": 0.0 for i in range(dead)}
    found = planned(rows, values, plan_rule(epochs=epochs, optimizer_steps=steps, microbatch=microbatch, seed=seed))
    keys = [(row["optimizer_step"], row["microstep"]) for row in found]
    assert keys == sorted(keys)
    assert max(step for step, _ in keys) < epochs * steps
    by_epoch: dict[int, list[Row]] = defaultdict(list)
    for row in found:
        by_epoch[row["optimizer_step"] // steps].append(row)
    assert sorted(by_epoch) == list(range(epochs))
    for members in by_epoch.values():
        assert Counter(row["trajectory_id"] for row in members) == Counter(list(values))
        for kind in (members, [row for row in members if row["advantage"] != 0]):
            sizes = Counter(row["optimizer_step"] % steps for row in kind)
            counts = [sizes[step] for step in range(steps)]
            assert max(counts) - min(counts) <= 1
        if count + dead >= steps:
            assert {row["optimizer_step"] % steps for row in members} == set(range(steps))


def test_each_epoch_has_an_order_of_its_own_and_the_first_is_that_of_a_single_one() -> None:
    rows, values = fresh(12)
    single = planned(rows, values, plan_rule(optimizer_steps=2, seed=5))
    found = planned(rows, values, plan_rule(optimizer_steps=2, epochs=3, seed=5))
    assert found[:12] == single
    orders = [tuple(row["trajectory_id"] for row in found[i : i + 12]) for i in (0, 12, 24)]
    assert len(set(orders)) == 3
    assert [row["optimizer_step"] for row in found] == [step for step in range(6) for _ in range(6)]
    assert found == planned(rows, values, plan_rule(optimizer_steps=2, epochs=3, seed=5))


def test_epochs_repeat_everything_but_the_place() -> None:
    rows, values = fresh(6)
    found = planned(rows, values, plan_rule(epochs=3, step_fraction=0.5))
    by_id: dict[str, list[Row]] = defaultdict(list)
    for row in found:
        by_id[row["trajectory_id"]].append({n: v for n, v in row.items() if n not in ("optimizer_step", "microstep")})
    assert all(len(seen) == 3 and seen[0] == seen[1] == seen[2] for seen in by_id.values())


# -- subsets of denoising steps ------------------------------------------------------------------------------------------


@given(
    steps=st.integers(1, 12),
    fraction=st.floats(0.01, 1.0),
    window=st.none() | st.integers(1, 12),
    without=st.sets(st.integers(0, 11)),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_step_fraction_draws_a_subset_of_the_trainable_steps(
    steps: int, fraction: float, window: int | None, without: set[int], seed: int
) -> None:
    std = [0.0 if k in without else 0.5 for k in range(steps)]
    trainable = [k for k in range(steps) if std[k] > 0 and (window is None or k < window)]
    rows = [located_row(f"t{i}", steps=steps, transition_std=std) for i in range(3)]
    rule = plan_rule(step_fraction=fraction, window=window, seed=seed)
    found = planned(rows, {f"t{i}": 1.0 for i in range(3)}, rule)
    assert len(found) == (3 if trainable else 0)
    for row in found:
        chosen = row["train_steps"]
        assert set(chosen) <= set(trainable)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == max(1, round(fraction * len(trainable)))
        assert (row["first_latent"], row["last_latent"]) == (0, chosen[-1] + 1)
    assert found == planned(rows, {f"t{i}": 1.0 for i in range(3)}, rule)


def test_step_subsets_are_uniform_and_follow_seed_and_trajectory() -> None:
    """Two of four steps, 1200 times: each of the six pairs within four standard deviations of its share."""
    rows = [located_row(f"t{i:04d}", steps=4) for i in range(1200)]
    values = {row["trajectory_id"]: 0.0 for row in rows}
    by_seed = [
        {
            row["trajectory_id"]: tuple(row["train_steps"])
            for row in planned(rows, values, plan_rule(step_fraction=0.5, seed=seed))
        }
        for seed in (0, 1)
    ]
    counts = Counter(by_seed[0].values())
    assert len(counts) == 6
    assert all(abs(number - 200) < 4 * math.sqrt(1200 / 6 * 5 / 6) for number in counts.values())
    same = sum(by_seed[0][name] == by_seed[1][name] for name in values) / 1200
    assert same == pytest.approx(1 / 6, abs=0.05)


def test_a_reused_member_draws_its_steps_within_the_trusted_prefix_and_weighs_all_of_it() -> None:
    judged: dict[str, Any] = {"path_variance": [0.1] * 8, "old_logprob": [-1.25] * 8}
    row = one_reused({"reuse_ess": 0.5, "step_fraction": 0.5}, steps=8, **judged)
    assert row is not None
    assert len(row["train_steps"]) == 3  # of exp(-0.6) = 0.55: six
    assert max(row["train_steps"]) < 6
    assert row["path_variance"] == [0.1] * 6
    assert row["importance_weight"] == pytest.approx(math.exp(-0.25 * 6), rel=1e-12)


# -- which latents are read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "window", "expected"),
    [
        ("clipped", None, (0, 4)),
        ("clipped", 2, (0, 2)),
        ("forward", None, (4, 4)),
        ("forward", 2, (4, 4)),  # the sample, whatever steps are trained
    ],
)
def test_which_latents_training_reads(objective: str, window: int | None, expected: tuple[int, int]) -> None:
    rows, values = fresh(3, steps=4, iteration=1)
    old = past(located_row("old", steps=4), old_logprob=[-1.0] * 4, path_variance=[0.0] * 4)
    found = planned(rows, values, plan_rule(objective=objective, window=window), reused=old, iteration=1)
    assert {(row["first_latent"], row["last_latent"]) for row in found} == {expected}
    assert len(found) == 4


def test_a_trajectory_without_any_trainable_step_is_left_out() -> None:
    rows, values = fresh(2)
    rows.append(located_row("x", transition_std=[0.0, 0.0, 0.0]))
    found = planned(rows, values | {"x": 9.0}, plan_rule())
    assert sorted(row["trajectory_id"] for row in found) == ["f00", "f01"]
    assert next(row["advantage"] for row in found if row["trajectory_id"] == "f00") < -0.5  # x still counts for the group


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("fresh", 1.0),
        ("continuation", math.exp(-0.75)),
        ("reused", math.exp(-0.75)),
        ("reused, one step trusted", math.exp(-0.5)),
    ],
)
def test_a_plan_predicts_the_sample_size_that_its_weights_leave(role: str, expected: float) -> None:
    """exp(-Lambda) over just the steps that the weight counts."""
    rows, values = fresh(2, iteration=1)
    if role.startswith("reused"):
        old = past(located_row("x"), path_variance=[0.5, 0.25, 9.0])
        rule = plan_rule(reuse_ess=0.6 if "one" in role else 0.4)
        found = planned(rows, values, rule, reused=old, iteration=1)
    else:
        prefix: dict[str, Any] = {"prefix_steps": 2, "path_variance": [0.5, 0.25]} if role == "continuation" else {}
        found = planned([*rows, located_row("x", iteration=1, **prefix)], values | {"x": 1.0}, plan_rule(), iteration=1)
    assert next(row["predicted_ess"] for row in found if row["trajectory_id"] == "x") == pytest.approx(expected, rel=1e-12)


# -- signal, names, and groups without spread ------------------------------------------------------------------------------


def grouped(spread: list[bool]) -> tuple[list[Row], dict[str, float]]:
    """Groups of two: rewards 0 and 1 where there is spread, 1 and 1 where there is none."""
    rows = [located_row(f"t{2 * g + i}", group_id=f"g{g}", prompt_id=f"p{g}") for g in range(len(spread)) for i in range(2)]
    values = {row["trajectory_id"]: float(i % 2 or not spread[i // 2]) for i, row in enumerate(rows)}
    return rows, values


@given(spread=st.lists(st.booleans(), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_lr_scale_is_the_share_of_groups_with_an_advantage(spread: list[bool]) -> None:
    rows, values = grouped(spread)
    told = {row["lr_scale"] for row in planned(rows, values, plan_rule(lr_by_signal=True))}
    assert told == {sum(spread) / len(spread)}
    assert {row["lr_scale"] for row in planned(rows, values, plan_rule())} == {1.0}


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_equal_rewards_give_exactly_no_advantage(value: float, size: int) -> None:
    """The mean of equal numbers may differ from them in the last bit: that is no advantage."""
    rows, _ = fresh(size)
    found = planned(rows, {row["trajectory_id"]: value for row in rows}, plan_rule())
    assert {row["advantage"] for row in found} == {0.0}


def test_a_plan_does_not_depend_on_what_the_run_is_called() -> None:
    """Ids hash the run's name; the deal goes by iteration, prompt and member."""
    rule = plan_rule(optimizer_steps=3, step_fraction=0.5, epochs=2, seed=5)
    rows, values = fresh(12)
    renamed = [row | {"trajectory_id": f"{i * 7919 % 12:02d}x", "group_id": "other"} for i, row in enumerate(rows)]
    new_values = {new["trajectory_id"]: values[row["trajectory_id"]] for row, new in zip(rows, renamed, strict=True)}
    kept = ("member_index", "optimizer_step", "microstep", "advantage", "train_steps")
    first, second = planned(rows, values, rule), planned(renamed, new_values, rule)
    assert [[row[name] for name in kept] for row in first] == [[row[name] for name in kept] for row in second]
