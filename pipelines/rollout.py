"""Stage `rollout`: draw an iteration's trajectories and commit them, shard by shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import iteration_folder, now
from pipelines import sampler
from pipelines.experiment import Experiment, Outcome, software
from pipelines.groups import Member, ShardTask, shard_tasks
from pipelines.sampler import Transitions
from pipelines.trajectories import draw_continuations, draw_fresh, read_prefix, records


def rollout(experiment: Experiment, iteration: int, dry_run: bool = False) -> Outcome:
    """Write the shards that this iteration lacks: the policy at its start, on its prompts, replaying the last buffer."""
    store, config = experiment.store, experiment.config
    folder = iteration_folder("trajectories", experiment.run_id, iteration)
    buffer = _replayed(experiment, iteration)
    tasks = shard_tasks(config, experiment.run_id, experiment.prompts["train"], iteration, buffer)
    committed = set(store.files("trajectories", run=experiment.run_id, iteration=iteration))
    missing = [task for task in tasks if f"{folder}/{task.shard}.parquet" not in committed]
    detail = {
        "trajectories": sum(len(task.members) for task in missing),
        "continuations": sum(member.parent is not None for task in missing for member in task.members),
    }
    if missing and not dry_run:
        policy_id = experiment.learner(iteration).policy_id
        for task in experiment.progress.bar(missing, f"rollout {iteration}"):
            write_shard(store.directory, folder, task.shard, _draw_shard(experiment, task, iteration, policy_id))
    return Outcome("rollout", iteration, len(missing), len(tasks) - len(missing), detail)


def _replayed(experiment: Experiment, iteration: int) -> Mapping[str, Mapping[str, Any]]:
    """Buffer entries by prompt_id as the iteration before left them; none at the start, and none for flow_grpo."""
    if iteration == 0 or experiment.config.algorithm == "flow_grpo":
        return {}
    path = f"{iteration_folder('buffers', experiment.run_id, iteration - 1)}.parquet"
    if not experiment.store.directory.exists(path):
        raise StoreError(
            f"iteration {iteration} replays the buffer of iteration {iteration - 1}, which is not there: "
            f"run `opgrpo select` for that iteration first"
        )
    damaged = experiment.store.quarantined()
    entries = experiment.store.read_tables("buffers", [path]).to_pylist()
    return {entry["prompt_id"]: entry for entry in entries if entry["trajectory_id"] not in damaged}


def _draw_shard(experiment: Experiment, task: ShardTask, iteration: int, policy_id: str) -> Iterator[Record]:
    config, policy = experiment.config.rollout, experiment.policy
    grid = sampler.transitions(config.sampler, policy.sigmas(config.num_steps), config.noise_level)
    continued, prefixes = _read_prefixes(experiment, task.members, grid)
    replayed = {member.trajectory_id for member in continued}
    fresh = [member for member in task.members if member.trajectory_id not in replayed]
    common = _common_columns(experiment, iteration, policy_id, grid)
    for start in range(0, len(fresh), config.batch_size):
        members = fresh[start : start + config.batch_size]
        drawn = draw_fresh(policy, members, grid, config.storage_dtype)
        yield from records(policy, members, drawn, config, common)
    for start in range(0, len(continued), config.batch_size):
        members = continued[start : start + config.batch_size]
        prefix = torch.stack(prefixes[start : start + config.batch_size]).to(policy.device)
        drawn = draw_continuations(policy, members, prefix, grid, config.storage_dtype)
        yield from records(policy, members, drawn, config, common)


def _read_prefixes(experiment: Experiment, members: list[Member], grid: Transitions) -> tuple[list[Member], list[Tensor]]:
    """The members that continue a stored prefix, and those prefixes. A damaged one is quarantined: its slot is fresh."""
    continued: list[Member] = []
    prefixes: list[Tensor] = []
    for member in members:
        if member.parent is None:
            continue
        try:
            prefix = read_prefix(experiment.store.directory, member.parent, experiment.config.replay.prefix_steps)
        except CorruptionError as error:
            experiment.store.quarantine(member.parent["trajectory_id"], error)
            experiment.progress.warn(f"{error}; quarantined, its place in the group is drawn fresh")
            continue
        if tuple(prefix.shape[1:]) != experiment.policy.latent_shape or list(grid.sigmas) != member.parent["sigmas"]:
            raise StoreError(
                f"trajectory {member.parent['trajectory_id']} in the buffer has latents {tuple(prefix.shape[1:])} on another "
                f"sigma grid or of another shape than this policy's {experiment.policy.latent_shape}: it cannot be continued"
            )
        continued.append(member)
        prefixes.append(prefix)
    return continued, prefixes


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
