"""The plan of one training iteration: which trajectories, in which role, with which advantage and weight, in which batch.

Everything `train` will do is decided here, from stored numbers only, and stored before it happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import polars as pl
import pyarrow as pa

from opgrpo_data.errors import StoreError
from opgrpo_data.ids import derived_seed
from opgrpo_data.schema import PLANS, conform

ADVANTAGE_DELTA = 1e-4


@dataclass(frozen=True)
class PlanRule:
    """How scored groups become a plan (docs/maths.md, section 4).

    advantage_std: divide by the reward's standard deviation within the group, or over the whole batch.
    advantage_clip: |advantage| is cut here.
    weight_reduction: whether log w sums over the D elements of a latent (true densities) or takes their mean.
    weight_min, weight_max: the importance weight of a continuation is cut to this range.
    optimizer_steps: the batch is split into so many updates; microbatch: trajectories per forward pass.
    window: only denoising steps k < window are trained; None trains all that have a density.
    seed: of the shuffle that deals trajectories to optimizer steps.
    """

    advantage_std: Literal["group", "global"]
    advantage_clip: float
    weight_reduction: Literal["sum", "mean"]
    weight_min: float
    weight_max: float
    optimizer_steps: int
    microbatch: int
    window: int | None
    seed: int


def build_plan(trajectories: pa.Table, rewards: pa.Table, excluded: set[str], rule: PlanRule) -> pa.Table:
    """The plan (schema PLANS) over the trajectories of one iteration that have a finite reward.

    Rows lie in the order of execution: optimizer_step, then microstep. A trajectory without a reward, or in quarantine,
    is left out; its group's advantages are made of the members that remain. Raises StoreError when none remain.
    """
    members = (
        cast(pl.DataFrame, pl.from_arrow(trajectories))
        .join(
            cast(pl.DataFrame, pl.from_arrow(rewards.select(["trajectory_id", "value"]))).rename({"value": "reward"}),
            on="trajectory_id",
        )
        .filter(pl.col("reward").is_finite() & ~pl.col("trajectory_id").is_in(list(excluded)))
        .sort("trajectory_id")  # a join keeps no order, and sums depend on it in their last bit
    )
    if members.is_empty():
        raise StoreError("no trajectory of this iteration has a usable reward: see the view reward_errors")
    planned = members.with_columns(
        advantage=advantages(rule).clip(-rule.advantage_clip, rule.advantage_clip),
        importance_weight=importance_weights(members, rule),
        train_steps=trained_steps(members, rule.window),
        role=pl.when(pl.col("prefix_steps") > 0).then(pl.lit("continuation")).otherwise(pl.lit("fresh")),
    )
    return conform(_deal(planned, rule).to_arrow(), PLANS)


def advantages(rule: PlanRule) -> pl.Expr:
    """A = (R - mean of the group) / (std + delta), population std of the group or of the batch (docs/maths.md, section 4)."""
    reward = pl.col("reward")
    centred = reward - reward.mean().over("group_id")
    spread = reward.std(ddof=0).over("group_id") if rule.advantage_std == "group" else reward.std(ddof=0)
    return centred / (spread + ADVANTAGE_DELTA)


def importance_weights(members: pl.DataFrame, rule: PlanRule) -> pl.Series:
    """w = exp(sum over the prefix of (l_old - l_behaviour)), clipped; 1 for fresh members (docs/maths.md, section 4).

    Log-probs are float64 sums over the D elements of a latent; `mean` divides them by D.
    """
    prefix = pl.col("prefix_steps").fill_null(0)
    difference = pl.col("old_logprob").list.head(prefix).list.sum() - pl.col("behaviour_logprob").list.head(prefix).list.sum()
    scale = 1 / pl.col("num_elements") if rule.weight_reduction == "mean" else pl.lit(1.0)
    weight = (difference * scale).exp().clip(rule.weight_min, rule.weight_max)
    chosen = pl.when(prefix > 0).then(weight).otherwise(pl.lit(1.0))
    return members.select(chosen.alias("importance_weight")).to_series()


def trained_steps(members: pl.DataFrame, window: int | None) -> pl.Series:
    """Denoising steps that enter the loss: those inside the window that have a density (transition_std > 0)."""
    steps = [
        [k for k, std in enumerate(stds) if std > 0 and (window is None or k < window)]
        for stds in members["transition_std"].to_list()
    ]
    return pl.Series("train_steps", steps, pl.List(pl.Int32))


def _deal(planned: pl.DataFrame, rule: PlanRule) -> pl.DataFrame:
    """Shuffle the batch by a hash of seed and id, then cut it into optimizer steps and microsteps of near-equal size."""
    keys = [derived_seed(rule.seed, trajectory) for trajectory in planned["trajectory_id"]]
    count = len(keys)
    shuffled = planned.with_columns(pl.Series("key", keys)).sort("key", "trajectory_id").drop("key")
    steps = [position * rule.optimizer_steps // count for position in range(count)]
    dealt = shuffled.with_columns(
        pl.Series("optimizer_step", steps, pl.Int32),
        rank=pl.lit(0, pl.Int32),
    )
    within = pl.int_range(pl.len()).over("optimizer_step")
    return dealt.with_columns(microstep=(within // rule.microbatch).cast(pl.Int32))
