"""Offline training: nothing is drawn, everything comes from trajectories that the store has (docs/maths.md, section 8).

What a run may train on is fixed when it begins, as a table in the store: it stays the same while others add to the store.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from opgrpo_data import buffer, ids
from opgrpo_data.buffer import BufferRule
from opgrpo_data.errors import StoreError
from opgrpo_data.schema import BUFFERS, PLANS, conform
from opgrpo_data.store import Store, iteration_folder
from pipelines.config import RunConfig
from pipelines.fitting import Asked, fitting, scored
from pipelines.progress import Progress
from pipelines.rewards.base import Reward

BEFORE = 0
"""The table lies in iteration 0 of a folder of its own: a plan of which nothing is dealt to optimizer steps yet."""


def open_filled(url: str) -> Store:
    """The store of an offline run, which must be there already. Raises StoreError."""
    try:
        return Store.open(url)
    except StoreError as error:
        raise StoreError(f"algorithm offline draws nothing, it needs a store with trajectories ({error})") from error


def fix_selection(
    store: Store, config: RunConfig, asked: Asked, reward: Reward, prompt_ids: set[str], progress: Progress
) -> str:
    """Write down which trajectories an offline run trains on, and in which groups, unless that is there; returns its path.

    Those of the run's prompts that are as asked, have the reward, can be read, and that offline.selection names. Raises
    StoreError when too few groups are left, saying of every run why.
    """
    path = f"{iteration_folder('plans', f'{config.run_id}-offline', BEFORE)}.parquet"
    if store.directory.exists(path):
        return path
    rewards = scored(store, reward.name, reward.version)
    found = fitting(store, asked, rewards, files=store.files("trajectories"), prompt_ids=prompt_ids)
    chosen = _chosen(_born_before(found.trajectories), rewards, config)
    groups = regrouped(chosen, config.rollout.group_size, config.run_id)
    count, needed = groups["group_id"].n_unique(), config.rollout.prompts_per_iteration
    told = "; ".join(found.told) or "it has none for this run's prompts"
    if count < needed:
        raise StoreError(
            f"an offline iteration takes {needed} groups (rollout.prompts_per_iteration), {store.directory.url} has {count} "
            f"whose rewards ({reward.name}, version {reward.version}) differ: {told}. To give stored trajectories that reward: "
            f"`opgrpo score --reward {reward.name}`"
        )
    store.publish_table(path, conform(groups.to_arrow(), PLANS))
    progress.say(f"offline: {groups.height} stored trajectories in {count} groups whose rewards differ; {told}")
    return path


def _born_before(trajectories: pa.Table) -> pl.DataFrame:
    """With born_iteration: the newest of every run are born just before iteration 0, as entries of an imported buffer are."""
    frame = cast(pl.DataFrame, pl.from_arrow(trajectories))
    return frame.with_columns(born_iteration=pl.col("iteration") - pl.col("iteration").max().over("run_id") - 1)


def _chosen(fits: pl.DataFrame, rewards: pa.Table, config: RunConfig) -> pl.DataFrame:
    """What offline.selection names; all where it is not set."""
    if (selection := config.offline.selection) is None or fits.is_empty():
        return fits
    rule = BufferRule(1.0, "multiplicative", selection, members=fits.height)
    aged = fits.with_columns(iteration=pl.col("born_iteration")).drop("reward", "born_iteration")
    entries, none = buffer.candidates(aged.to_arrow(), rewards), BUFFERS.empty_table()
    named = buffer.select(none, entries, set(), run_id="", iteration=-1, rule=rule, setting="offline.selection")
    return fits.filter(pl.col("trajectory_id").is_in(named["trajectory_id"].to_pylist()))


def regrouped(members: pl.DataFrame, size: int, run_id: str) -> pl.DataFrame:
    """Members in groups of one prompt each, as rows of a plan (schema PLANS and more) that nobody judged: role stored.

    A group stays as it was drawn where it has `size` members; the others are put together with their neighbours in age
    of the same run, whose policies are comparable; a run's last group may be smaller. Groups whose rewards are
    all equal have no advantage, and are left out.
    """
    order = ["prompt_id", "run_id", "iteration", "member_index", "trajectory_id"]
    whole = pl.len().over("group_id") == size
    # Numbers run on over the members that a run drew for a prompt and that are in no whole group.
    number = (pl.int_range(pl.len()) // size).over("prompt_id", "run_id")
    ordered = members.sort(order)
    loose = ordered.filter(~whole).with_columns(number=number)
    names = pl.struct("prompt_id", "run_id", "number").map_elements(
        lambda row: ids.group_id(f"{run_id}/{row['run_id']}", row["number"], row["prompt_id"]), return_dtype=pl.String
    )
    groups = pl.concat([ordered.filter(whole), loose.with_columns(group_id=names).drop("number")])
    return (
        groups.filter((pl.col("reward").max() != pl.col("reward").min()).over("group_id"))
        .sort(order)
        .select(pl.all().exclude("path_variance", "old_logprob"))
        .with_columns(
            run_id=pl.lit(run_id),
            iteration=pl.lit(-1),
            role=pl.lit("stored"),
            age=-1 - pl.col("born_iteration"),
            prefix_steps=pl.col("prefix_steps").fill_null(0),
        )
    )


def members(store: Store, config: RunConfig, table: pa.Table, iteration: int) -> pa.Table:
    """The stored trajectories of an iteration's groups (schema PLANS), without those that were damaged or dropped since.
    table: all that the run trains on, as `fix_selection` wrote it down.

    Each lap over the groups is a fresh permutation, dealt to iterations, `rollout.prompts_per_iteration` groups to each; a
    remainder too small for an iteration is left out of that lap.
    """
    groups = list(dict.fromkeys(table["group_id"].to_pylist()))
    size = config.rollout.prompts_per_iteration
    lap, place = divmod(iteration, len(groups) // size)
    order = np.random.default_rng(ids.derived_seed(config.seed, "offline", lap)).permutation(len(groups))
    mine = pa.array([groups[index] for index in order[place * size : (place + 1) * size]], pa.string())
    table = table.filter(pc.is_in(table["group_id"], value_set=mine))
    unusable = store.unusable(table.select(["trajectory_id", "latents_file"]).to_pylist())
    return table.filter(pc.invert(pc.is_in(table["trajectory_id"], value_set=pa.array(sorted(unusable), pa.string()))))
