"""The plan of one training iteration: which trajectories, in which role, with which advantage and weight, in which batch.

Everything `train` will do is decided here, from stored numbers only, and stored before it happens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import polars as pl
import pyarrow as pa

from opgrpo_data import importance
from opgrpo_data.errors import StoreError
from opgrpo_data.ids import derived_seed
from opgrpo_data.schema import PLANS, conform

ADVANTAGE_DELTA = 1e-4


@dataclass(frozen=True)
class WeightRule:
    """How the weight of an off-policy member is formed (docs/maths.md, section 4).

    correction: sequence weighs it by exp(sum over its prefix of l_old - l_behaviour); step and none leave the weight at 1.
    reduction: whether log w sums over the D elements of a latent (true densities) or takes their mean.
    variance_budget: log w is damped so that its predicted variance is no more than this; None: not damped.
    lowest, highest: the weight is cut to this range. normalised: afterwards, off-policy weights are divided by their mean.
    """

    correction: Literal["sequence", "step", "none"]
    reduction: Literal["sum", "mean"]
    variance_budget: float | None
    lowest: float
    highest: float
    normalised: bool


@dataclass(frozen=True)
class PlanRule:
    """How scored groups become a plan (docs/maths.md, section 4).

    advantage_parts: what advantages are made of: the reward (sum), or the parts of a composite reward (zscore, gdpo).
    advantage_std: divide by the reward's standard deviation within the group, or over the whole batch.
    advantage_clip: |advantage| is cut here.
    weight: of continuations and reused members.
    reuse_ess: a reused member trains its longest prefix whose predicted effective sample size is at least this; 0: all of it.
    epochs: how often the batch is gone through; optimizer_steps: updates per epoch; microbatch: trajectories per forward pass.
    lr_by_signal: the learning rate is scaled by the share of this iteration's groups whose rewards differ.
    window: only denoising steps k < window are trained; None trains all that have a density.
    step_fraction: each trajectory trains a random share of those steps, at least one.
    objective: which latents training reads: clipped reads the trained steps' states, forward only the sample x_T.
    seed: of every random choice.
    """

    advantage_parts: Literal["sum", "zscore", "gdpo"]
    advantage_std: Literal["group", "global"]
    advantage_clip: float
    weight: WeightRule
    reuse_ess: float
    epochs: int
    optimizer_steps: int
    lr_by_signal: bool
    microbatch: int
    window: int | None
    step_fraction: float
    objective: Literal["clipped", "forward"]
    seed: int


def build_plan(
    trajectories: pa.Table, rewards: pa.Table, reused: pa.Table, excluded: set[str], *, iteration: int, rule: PlanRule
) -> pa.Table:
    """The plan (schema PLANS) over the trajectories of one iteration that have a finite reward, and reused ones.

    reused: rows of earlier plans (schema PLANS) with old_logprob and path_variance as the present old policy sees them.
    Rows lie in the order of execution: optimizer_step, then microstep. A trajectory without a reward, or in quarantine,
    is left out; its group's advantages are made of the members that remain. Raises StoreError when none remain.
    """
    members = scored_members(trajectories, rewards, excluded)
    if members.is_empty():
        raise StoreError("no trajectory of this iteration has a usable reward: see the view reward_errors")
    fresh = with_advantages(members, rule).with_columns(
        prefix_steps=pl.col("prefix_steps").fill_null(0),
        born_iteration=pl.col("iteration"),
        role=pl.when(pl.col("prefix_steps") > 0).then(pl.lit("continuation")).otherwise(pl.lit("fresh")),
    )
    rows = conform(fresh.to_arrow(), PLANS).to_pylist()
    rows += [row for row in reused.to_pylist() if row["trajectory_id"] not in excluded]
    return plan_of(rows, iteration=iteration, rule=rule)


def scored_members(trajectories: pa.Table, rewards: pa.Table, excluded: set[str]) -> pl.DataFrame:
    """Trajectories that have a finite reward and are not excluded, with the columns reward and detail; in a fixed order."""
    return (
        cast(pl.DataFrame, pl.from_arrow(trajectories))
        .join(
            cast(pl.DataFrame, pl.from_arrow(rewards.select(["trajectory_id", "value", "detail"]))).rename({"value": "reward"}),
            on="trajectory_id",
        )
        .filter(pl.col("reward").is_finite() & ~pl.col("trajectory_id").is_in(list(excluded)))
        # A join keeps no order, and sums depend on it in their last bit. trajectory_id would order by the run's name.
        .sort("prompt_id", "member_index", "trajectory_id")
    )


def with_advantages(members: pl.DataFrame, rule: PlanRule) -> pl.DataFrame:
    """Members (group_id, reward; of a composite reward detail as well) with their advantage, clipped."""
    return members.with_columns(advantage=advantages(members, rule).clip(-rule.advantage_clip, rule.advantage_clip))


def plan_of(rows: list[dict[str, Any]], *, iteration: int, rule: PlanRule) -> pa.Table:
    """Rows that have a role and an advantage as a plan: steps, weights, and their places in the order of execution.

    Rows of which no step is trained are left out. The rows are changed.
    """
    for row in rows:
        row["age"] = iteration - row["born_iteration"]
        row["train_steps"] = trained_steps(row, rule)
    rows = [row for row in rows if row["train_steps"]]
    scale = lr_scale(rows, rule)
    for row, weight in zip(rows, importance_weights(rows, rule.weight), strict=True):
        sample = len(row["transition_std"])
        first, last = (0, row["train_steps"][-1] + 1) if rule.objective == "clipped" else (sample, sample)
        row |= {
            "importance_weight": weight,
            "lr_scale": scale,
            "iteration": iteration,
            "first_latent": first,
            "last_latent": last,
        }
        known = (row["path_variance"] or [])[: off_policy_steps(row)]
        row["predicted_ess"] = None if row["role"] == "stored" else importance.predicted_ess(known)
    return pa.Table.from_pylist(_deal(rows, rule), schema=PLANS)


def advantages(members: pl.DataFrame, rule: PlanRule) -> pl.Series:
    """Advantage of each member, before it is clipped (docs/maths.md, section 4).

    sum: of the reward. zscore: of the weighted sum of the parts, each standardised over the batch. gdpo: the weighted sum
    of the parts' own advantages, over its standard deviation in the batch (GDPO, arXiv 2601.05242).
    """
    if rule.advantage_parts == "sum":
        return members.select(group_advantages(pl.col("reward"), rule)).to_series()
    parts, weights = reward_parts(members)
    told = pl.concat([members.select("group_id"), parts], how="horizontal")
    if rule.advantage_parts == "zscore":
        summed = pl.sum_horizontal(weight * standardised(pl.col(name)) for name, weight in weights.items())
        return told.with_columns(zscore=summed).select(group_advantages(pl.col("zscore"), rule)).to_series()
    summed = pl.sum_horizontal(weight * group_advantages(pl.col(name), rule) for name, weight in weights.items())
    return told.select(gdpo=summed).select(scaled(pl.col("gdpo"))).to_series()


def group_advantages(reward: pl.Expr, rule: PlanRule) -> pl.Expr:
    """A = (R - mean of the group) / (std + delta), population std of the group or of the batch (docs/maths.md, section 4)."""
    centred = reward - reward.mean().over("group_id")
    spread = reward.std(ddof=0).over("group_id") if rule.advantage_std == "group" else reward.std(ddof=0)
    # Equal rewards leave a rounding error that is no advantage: such a group is dead.
    dead = (reward.max() == reward.min()).over("group_id")
    return pl.when(dead).then(0.0).otherwise(centred / (spread + ADVANTAGE_DELTA))


def standardised(values: pl.Expr) -> pl.Expr:
    """(V - mean) / (std + delta) over the batch, population std."""
    return scaled(values - values.mean())


def scaled(values: pl.Expr) -> pl.Expr:
    """V / (std + delta) over the batch, population std.

    Sums of advantages have the mean 0 already, which nobody subtracts again: an advantage of 0 stays exactly 0.
    """
    return values / (values.std(ddof=0) + ADVANTAGE_DELTA)


def reward_parts(members: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, float]]:
    """The values of a composite reward's parts, one column a part, rows as in `members`; and the weights, by part.

    Raises StoreError when the reward rows do not tell them.
    """
    details = [json.loads(detail) if detail else {} for detail in members["detail"]]
    if not all({"parts", "weights"} <= set(detail) for detail in details):
        raise StoreError("the stored rewards do not tell their parts: score with reward.name composite, or plan by their sum")
    weights = {f"part {name}": weight for name, weight in details[0]["weights"].items()}
    values = {name: [detail["parts"][name.removeprefix("part ")] for detail in details] for name in weights}
    return pl.DataFrame(values, schema=dict.fromkeys(weights, pl.Float64)), weights


def off_policy_steps(row: dict[str, Any]) -> int:
    """How many first steps of a member another policy than the old one drew, and its weight counts.

    0 for fresh members, the prefix of a continuation, the trained prefix of a reused member (no more of that is trained);
    0 for a stored member, which nobody judged: what is not known is not weighed.
    """
    if row["role"] == "reused":
        return len(row["path_variance"])
    return 0 if row["role"] == "stored" else int(row["prefix_steps"])


def importance_weights(rows: Sequence[dict[str, Any]], rule: WeightRule) -> list[float]:
    """w = exp(sum over off-policy steps of l_old - l_behaviour), damped, cut, normalised; 1 for fresh members.

    Log-probs are float64 sums over the D elements of a latent; `mean` divides log w by D.
    """
    weights = np.ones(len(rows))
    stale = [i for i, row in enumerate(rows) if off_policy_steps(row) > 0]
    if rule.correction != "sequence" or not stale:
        return weights.tolist()
    for i in stale:
        row, kept = rows[i], off_policy_steps(rows[i])
        log_w = importance.log_weight(row["old_logprob"][:kept], row["behaviour_logprob"][:kept])
        if rule.variance_budget is not None:
            log_w = importance.damped(log_w, sum(row["path_variance"][:kept]), rule.variance_budget)
        if rule.reduction == "mean":
            log_w /= row["num_elements"]
        weights[i] = np.clip(np.exp(np.minimum(log_w, 700.0)), rule.lowest, rule.highest)
    if rule.normalised and weights[stale].sum() > 0:
        weights[stale] /= weights[stale].mean()
    return weights.tolist()


def trained_steps(row: dict[str, Any], rule: PlanRule) -> list[int]:
    """Denoising steps that enter the loss: inside the window, with a density (transition_std > 0), and for a reused member
    inside its longest trustworthy prefix, which `path_variance` is cut to here."""
    last = len(row["transition_std"]) if rule.window is None else rule.window
    if row["role"] == "reused":
        kept = min(importance.longest_prefix(row["path_variance"], rule.reuse_ess), last)
        row["path_variance"] = row["path_variance"][:kept]
        last = kept
    steps = [k for k, std in enumerate(row["transition_std"]) if std > 0 and k < last]
    if rule.step_fraction == 1 or not steps:
        return steps
    count = max(1, round(rule.step_fraction * len(steps)))
    order = np.random.default_rng(derived_seed(rule.seed, "steps", *origin(row))).permutation(len(steps))
    return sorted(steps[i] for i in order[:count])


def origin(row: dict[str, Any]) -> tuple[int, str, int]:
    """What tells a trajectory from every other of its run, whatever the run is called: random choices go by this."""
    return (row["born_iteration"], row["prompt_id"], row["member_index"])


def lr_scale(rows: Sequence[dict[str, Any]], rule: PlanRule) -> float:
    """Share of the iteration's own groups in which some member has an advantage; 1 unless `lr_by_signal`.

    The gradient of a batch shrinks with its dead groups, but Adam divides by its size: without this, what is left of the
    signal when nearly all groups succeed is taken in steps as large as at the start, and most of such a step is noise.
    """
    own = [row for row in rows if row["role"] != "reused"]
    live = {row["group_id"] for row in own if row["advantage"] != 0}
    return len(live) / len({row["group_id"] for row in own}) if rule.lr_by_signal and own else 1.0


def _deal(rows: Sequence[dict[str, Any]], rule: PlanRule) -> list[dict[str, Any]]:
    """Per epoch: shuffle by a hash of seed and origin, then cut into optimizer steps and microsteps of near-equal size.

    Members with an advantage are dealt evenly over the optimizer steps, and so are those without: no step goes empty.
    """
    dealt = []
    for epoch in range(rule.epochs):
        seed = rule.seed if epoch == 0 else derived_seed(rule.seed, "epoch", epoch)
        shuffled = sorted(rows, key=lambda row: (derived_seed(seed, *origin(row)), origin(row)))
        live = [row for row in shuffled if row["advantage"] != 0]
        order = live + [row for row in shuffled if row["advantage"] == 0]
        count = rule.optimizer_steps
        for number, members in enumerate(order[first::count] for first in range(count)):
            for position, row in enumerate(members):
                place = {"optimizer_step": epoch * count + number, "microstep": position // rule.microbatch}
                dealt.append(row | place | {"rank": 0})
    return dealt
