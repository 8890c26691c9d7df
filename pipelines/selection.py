"""Stage `select`: from scored trajectories to the replay buffer and the plan of the iteration."""

from __future__ import annotations

from opgrpo_data import buffer
from opgrpo_data.errors import StoreError
from opgrpo_data.plan import build_plan
from opgrpo_data.store import iteration_folder
from pipelines.experiment import Experiment, Outcome
from pipelines.reuse import reused_rows
from pipelines.score import reward_files


def select(experiment: Experiment, iteration: int, dry_run: bool = False) -> Outcome:
    """Publish the buffer after this iteration (empty for flow_grpo), then its plan.

    Raises StoreError when trajectories or rewards of the iteration are missing.
    """
    store, config = experiment.store, experiment.config
    plan_path = f"{iteration_folder('plans', experiment.run_id, iteration)}.parquet"
    buffer_path = f"{iteration_folder('buffers', experiment.run_id, iteration)}.parquet"
    if store.directory.exists(plan_path) and store.directory.exists(buffer_path):
        return Outcome("select", iteration, 0, 1)
    trajectories = store.read_tables("trajectories", store.files("trajectories", run=experiment.run_id, iteration=iteration))
    rewards = store.read_tables("rewards", reward_files(experiment, iteration))
    _check_complete(experiment, iteration, trajectories.num_rows, len(set(rewards["trajectory_id"].to_pylist())))
    rewards = rewards.filter(rewards["error"].is_null())
    damaged = store.quarantined()
    reused = reused_rows(experiment, iteration)
    plan = build_plan(trajectories, rewards, reused, damaged, iteration=iteration, rule=config.plan_rule(iteration))
    before = experiment.buffer_path(iteration - 1)
    replayable = trajectories if config.algorithm == "op_grpo" else trajectories.slice(0, 0)
    snapshot = buffer.select(
        store.read_tables("buffers", [before] if before is not None else []),
        buffer.candidates(replayable, rewards),
        damaged,
        run_id=experiment.run_id,
        iteration=iteration,
        rule=config.buffer_rule,
    )
    if not dry_run:
        store.publish_table(buffer_path, snapshot)
        store.publish_table(plan_path, plan)
    detail = {"planned": plan.num_rows, "buffer": snapshot.num_rows}
    return Outcome("select", iteration, 1, 0, detail)


def _check_complete(experiment: Experiment, iteration: int, drawn: int, judged: int) -> None:
    rollout = experiment.config.rollout
    expected = rollout.prompts_per_iteration * rollout.group_size
    if drawn < expected:
        raise StoreError(f"iteration {iteration} has {drawn} of {expected} trajectories: run `opgrpo rollout` first")
    if judged < drawn:
        raise StoreError(f"iteration {iteration} has rewards for {judged} of {drawn} trajectories: run `opgrpo score` first")
