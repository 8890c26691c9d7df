"""Stage `rollout`: draw an iteration's trajectories and commit them, shard by shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import iteration_folder, now
from pipelines import replay, sampler
from pipelines.experiment import Experiment, Outcome, software
from pipelines.groups import ShardTask, shard_tasks
from pipelines.sampler import Transitions
from pipelines.trajectories import draw_continuations, draw_fresh, records


def rollout(experiment: Experiment, iteration: int, dry_run: bool = False) -> Outcome:
    """Write the shards that this iteration lacks: the policy at its start, on its prompts, replaying the last buffer.

    With group reuse it also judges the trajectories that come back whole, since that takes the same policy. An offline run
    draws nothing, and judges only.
    """
    store, config = experiment.store, experiment.config
    folder = iteration_folder("trajectories", experiment.run_id, iteration)
    buffer = replay.buffer_entries(experiment, iteration)
    drawing = config.algorithm != "offline"
    tasks = shard_tasks(config, experiment.run_id, experiment.prompts["train"], iteration, buffer) if drawing else []
    missing = _missing(tasks, experiment, iteration)
    detail = {
        "trajectories": sum(len(task.members) for task in missing),
        "continuations": sum(member.parent is not None for task in missing for member in task.members),
    }
    if not dry_run:
        if missing:
            policy_id = experiment.learner(iteration).policy_id
            for task in experiment.progress.bar(missing, f"rollout {iteration}"):
                write_shard(store.directory, folder, task.shard, _draw_shard(experiment, task, iteration, policy_id))
        if config.judges_stored:
            detail["reused"] = replay.judge_reused(experiment, iteration, _grid(experiment))
    return Outcome("rollout", iteration, len(missing), len(tasks) - len(missing), detail)


def _missing(tasks: Sequence[ShardTask], experiment: Experiment, iteration: int) -> list[ShardTask]:
    """The tasks whose shards are not there, without members that came with an import, in shards of other names."""
    store, folder = experiment.store, iteration_folder("trajectories", experiment.run_id, iteration)
    named = {f"{folder}/{task.shard}.parquet": task for task in tasks}
    committed = set(store.files("trajectories", run=experiment.run_id, iteration=iteration))
    imported = set(store.read_tables("trajectories", sorted(committed - named.keys()))["trajectory_id"].to_pylist())
    lacking = [
        replace(task, members=[member for member in task.members if member.trajectory_id not in imported])
        for path, task in named.items()
        if path not in committed
    ]
    return [task for task in lacking if task.members]


def _grid(experiment: Experiment) -> Transitions:
    config = experiment.config.rollout
    return sampler.transitions(config.sampler, experiment.policy.sigmas(config.num_steps), config.noise_level)


def _draw_shard(experiment: Experiment, task: ShardTask, iteration: int, policy_id: str) -> Iterator[Record]:
    config, policy, grid = experiment.config.rollout, experiment.policy, _grid(experiment)
    admitted = replay.admit(experiment, task.members, grid)
    continued = {replayed.member.trajectory_id for replayed in admitted}
    fresh = [member for member in task.members if member.trajectory_id not in continued]
    common = _common_columns(experiment, iteration, policy_id, grid)
    for start in range(0, len(fresh), config.batch_size):
        members = fresh[start : start + config.batch_size]
        drawn = draw_fresh(policy, members, grid, config.storage_dtype)
        yield from records(policy, members, drawn, config, common)
    for members, stored, densities in replay.by_prefix(admitted, config.batch_size):
        drawn = draw_continuations(policy, members, stored, densities, grid, config.storage_dtype)
        yield from records(policy, members, drawn, config, common)


def _common_columns(experiment: Experiment, iteration: int, policy_id: str, grid: Transitions) -> dict[str, Any]:
    config, policy = experiment.config.rollout, experiment.policy
    return {
        "run_id": experiment.run_id,
        "iteration": iteration,
        "policy_id": policy_id,
        "base_model": policy.base_model,
        "sampler": config.sampler,
        "num_steps": config.num_steps,
        "noise_level": config.noise_level,
        "guidance_scale": policy.guidance_scale,
        "sigmas": grid.sigmas.tolist(),
        "transition_std": grid.std.tolist(),
        "latent_shape": list(policy.latent_shape),
        "latent_dtype": config.storage_dtype,
        "num_elements": math.prod(policy.latent_shape),
        "created_at": now(),
        "software": json.dumps(software()),
    }
