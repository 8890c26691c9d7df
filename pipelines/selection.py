"""Stage `select`: from scored trajectories to the replay buffer and the plan of the iteration."""

from __future__ import annotations

import itertools
from typing import cast

import polars as pl
import pyarrow as pa

from opgrpo_data import buffer
from opgrpo_data.errors import StoreError
from opgrpo_data.plan import build_plan, plan_of, scored_members, with_advantages
from opgrpo_data.schema import PLANS, conform
from opgrpo_data.store import iteration_folder
from pipelines.experiment import Experiment, Outcome
from pipelines.fitting import scored
from pipelines.offline import members
from pipelines.reuse import judged, reused_rows
from pipelines.score import reward_files


def select(experiment: Experiment, iteration: int, dry_run: bool = False) -> Outcome:
    """Publish the buffer after this iteration (empty for flow_grpo), then its plan; of an offline run the plan alone.

    Raises StoreError when trajectories or rewards of the iteration are missing.
    """
    store, config = experiment.store, experiment.config
    if config.algorithm == "offline":
        return _select_offline(experiment, iteration, dry_run)
    plan_path = f"{iteration_folder('plans', experiment.run_id, iteration)}.parquet"
    buffer_path = f"{iteration_folder('buffers', experiment.run_id, iteration)}.parquet"
    if store.directory.exists(plan_path) and store.directory.exists(buffer_path):
        return Outcome("select", iteration, 0, 1)
    trajectories = _distinct(
        store.read_tables("trajectories", store.files("trajectories", run=experiment.run_id, iteration=iteration))
    )
    rewards = store.read_tables("rewards", reward_files(experiment, iteration))
    _check_complete(experiment, iteration, trajectories.num_rows, len(set(rewards["trajectory_id"].to_pylist())))
    rewards = _distinct(rewards.filter(rewards["error"].is_null()))
    before = experiment.buffer_path(iteration - 1)
    previous = store.read_tables("buffers", [before] if before is not None else [])
    places = (table.select(["trajectory_id", "latents_file"]).to_pylist() for table in (trajectories, previous))
    unusable = store.unusable(itertools.chain.from_iterable(places))
    reused = reused_rows(experiment, iteration)
    plan = build_plan(trajectories, rewards, reused, unusable, iteration=iteration, rule=config.plan_rule(iteration))
    replayable = trajectories if config.algorithm == "op_grpo" else trajectories.slice(0, 0)
    snapshot = buffer.select(
        previous,
        buffer.candidates(replayable, rewards),
        unusable,
        run_id=experiment.run_id,
        iteration=iteration,
        rule=config.buffer_rule,
    )
    if not dry_run:
        store.publish_table(buffer_path, snapshot)
        store.publish_table(plan_path, plan)
    detail = {"planned": plan.num_rows, "buffer": snapshot.num_rows}
    return Outcome("select", iteration, 1, 0, detail)


def _distinct(table: pa.Table) -> pa.Table:
    """The first row of each trajectory: an import may have brought one that another shard holds as well."""
    found = cast(pl.DataFrame, pl.from_arrow(table)).unique("trajectory_id", keep="first", maintain_order=True)
    return found.to_arrow().cast(table.schema) if found.height < table.num_rows else table


def _select_offline(experiment: Experiment, iteration: int, dry_run: bool) -> Outcome:
    """The plan over the iteration's stored groups, with the weights that its old policy gives them."""
    store, rule = experiment.store, experiment.config.plan_rule(iteration)
    path = f"{iteration_folder('plans', experiment.run_id, iteration)}.parquet"
    if store.directory.exists(path):
        return Outcome("select", iteration, 0, 1)
    stored = members(experiment.store, experiment.config, experiment.offline_selection, iteration)
    if rule.advantage_parts == "sum":
        found = cast(pl.DataFrame, pl.from_arrow(stored))
    else:
        reward = experiment.reward(experiment.config.reward)
        found = scored_members(stored.drop_columns("reward"), scored(store, reward.name, reward.version), set())
    rows = conform(with_advantages(found, rule).to_arrow(), PLANS).to_pylist()
    if experiment.config.judges_stored:
        rows = judged(experiment, iteration, rows)
    plan = plan_of(rows, iteration=iteration, rule=rule)
    if not plan.num_rows:
        raise StoreError(
            f"none of the {stored.num_rows} stored trajectories of iteration {iteration} can be trained on: the policy is too "
            f"far from those that drew them (replay.reuse_ess {rule.reuse_ess}). End the run here (iterations={iteration}), or "
            f"take train.objective forward, which asks for no density"
        )
    if not dry_run:
        store.publish_table(path, plan)
    return Outcome("select", iteration, 1, 0, {"planned": plan.num_rows})


def _check_complete(experiment: Experiment, iteration: int, drawn: int, judged: int) -> None:
    rollout = experiment.config.rollout
    expected = rollout.prompts_per_iteration * rollout.group_size
    if drawn < expected:
        raise StoreError(f"iteration {iteration} has {drawn} of {expected} trajectories: run `opgrpo rollout` first")
    if judged < drawn:
        raise StoreError(f"iteration {iteration} has rewards for {judged} of {drawn} trajectories: run `opgrpo score` first")
