"""Which trajectories an iteration draws: prompts, groups, members, shards. A function of config, buffer and iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opgrpo_data import ids
from pipelines.config import RunConfig
from pipelines.prompts import Prompt


@dataclass(frozen=True)
class Member:
    """One trajectory to be drawn. `parent` is the buffer entry it continues, None for a fresh one.

    seed: of its own noise, steps 0..T-1. initial_seed: of x_0 (fresh members only).
    """

    trajectory_id: str
    group_id: str
    prompt: Prompt
    member_index: int
    seed: int
    initial_seed: int
    parent: Mapping[str, Any] | None


@dataclass(frozen=True)
class ShardTask:
    """The unit of work that is committed, skipped or retried as a whole."""

    shard: str
    members: list[Member]


def prompts_of(config: RunConfig, prompts: list[Prompt], iteration: int) -> list[Prompt]:
    """The prompts of an iteration: each lap over the training split is a fresh permutation, dealt to iterations.

    A prompt is visited at most once a lap, and no iteration holds it twice. Raises ValueError when there are too few.
    """
    size = config.rollout.prompts_per_iteration
    if len(prompts) < size:
        raise ValueError(f"rollout.prompts_per_iteration is {size}, but there are only {len(prompts)} training prompts")
    lap, place = divmod(iteration, len(prompts) // size)
    order = np.random.default_rng(ids.derived_seed(config.seed, "prompts", lap)).permutation(len(prompts))
    return [prompts[index] for index in order[place * size : (place + 1) * size]]


def shard_tasks(
    config: RunConfig, run_id: str, prompts: list[Prompt], iteration: int, buffer: Mapping[str, Mapping[str, Any]]
) -> list[ShardTask]:
    """All members of an iteration, dealt to shards. buffer: prompt_id to the entry that is replayed.

    Composition is exact: G - 1 fresh members and one continuation where the buffer holds the prompt, else G fresh.
    """
    chosen = prompts_of(config, prompts, iteration)
    per_shard = config.rollout.groups_per_shard
    return [
        ShardTask(
            f"{start // per_shard:05d}",
            [m for prompt in chosen[start : start + per_shard] for m in _group(config, run_id, prompt, iteration, buffer)],
        )
        for start in range(0, len(chosen), per_shard)
    ]


def _group(
    config: RunConfig, run_id: str, prompt: Prompt, iteration: int, buffer: Mapping[str, Mapping[str, Any]]
) -> list[Member]:
    group = ids.group_id(run_id, iteration, prompt.prompt_id)
    last = config.rollout.group_size - 1
    members = []
    for index in range(config.rollout.group_size):
        # Seeds depend on the experiment's seed, not on its name: a renamed run draws the same trajectories.
        seed = ids.derived_seed(config.seed, "member", iteration, prompt.prompt_id, index)
        shared = ids.derived_seed(config.seed, "group", iteration, prompt.prompt_id)
        members.append(
            Member(
                trajectory_id=ids.trajectory_id(group, index),
                group_id=group,
                prompt=prompt,
                member_index=index,
                seed=seed,
                initial_seed=shared if config.rollout.shared_initial_noise else seed,
                parent=buffer.get(prompt.prompt_id) if index == last else None,
            )
        )
    return members
