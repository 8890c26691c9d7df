"""Which trajectories an iteration draws: prompts, groups, members, shards. A function of config, buffer and iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


Entries = Mapping[str, Sequence[Mapping[str, Any]]]
"""The replay buffer as the iteration before left it: prompt_id to its entries, best first."""


def prompts_of(config: RunConfig, prompts: list[Prompt], iteration: int, buffer: Entries) -> list[Prompt]:
    """The prompts of an iteration, no prompt twice. Raises ValueError when there are too few.

    laps: each lap over the training split is a fresh permutation, dealt to iterations: a prompt is visited once a lap.
    regret: drawn without replacement, with the weights of `regret_weights`.
    """
    size = config.rollout.prompts_per_iteration
    if len(prompts) < size:
        raise ValueError(f"rollout.prompts_per_iteration is {size}, but there are only {len(prompts)} training prompts")
    if config.prompts.order == "regret":
        rng = np.random.default_rng(ids.derived_seed(config.seed, "prompts", iteration))
        weights = regret_weights(prompts, buffer, config.prompts.regret_floor)
        chosen = rng.choice(len(prompts), size, replace=False, p=weights / weights.sum())
        return [prompts[index] for index in chosen]
    lap, place = divmod(iteration, len(prompts) // size)
    order = np.random.default_rng(ids.derived_seed(config.seed, "prompts", lap)).permutation(len(prompts))
    return [prompts[index] for index in order[place * size : (place + 1) * size]]


def regret_weights(prompts: Sequence[Prompt], buffer: Entries, floor: float) -> NDArray[np.float64]:
    """Weight per prompt, (len(prompts),) in [floor, 1]: floor + (1 - floor) regret / largest regret.

    Regret is the best stored reward of a prompt less the mean of its last fresh members: what it could gain from being
    sharpened. A prompt never visited weighs 1.
    """
    regrets = np.full(len(prompts), np.nan)
    for index, prompt in enumerate(prompts):
        entries = buffer.get(prompt.prompt_id, ())
        if entries and entries[0]["fresh_mean"] is not None:
            best = max(entry["reward"] for entry in entries)
            regrets[index] = max(best - entries[0]["fresh_mean"], 0.0)
    largest = np.nanmax(regrets, initial=0.0)
    share = np.where(np.isnan(regrets), 1.0, regrets / largest if largest > 0 else 0.0)
    return np.asarray(floor + (1 - floor) * share)


def replayed_entries(config: RunConfig, entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of one prompt that its group continues, at most `replay.members`.

    With replay.proportion `signal` only those whose reward differs from the mean of the prompt's last fresh members by more
    than their std: the others would repeat what fresh members show anyway.
    """
    kept = list(entries[: config.replay.members])
    if config.replay.proportion == "signal":
        kept = [e for e in kept if e["fresh_mean"] is None or abs(e["reward"] - e["fresh_mean"]) > e["fresh_std"]]
    return kept


def shard_tasks(config: RunConfig, run_id: str, prompts: list[Prompt], iteration: int, buffer: Entries) -> list[ShardTask]:
    """All members of an iteration, dealt to shards.

    Composition is exact: `replay.members` continuations where the buffer holds so many entries for the prompt, the rest fresh.
    """
    chosen = prompts_of(config, prompts, iteration, buffer)
    per_shard = config.rollout.groups_per_shard
    return [
        ShardTask(
            f"{start // per_shard:05d}",
            [m for prompt in chosen[start : start + per_shard] for m in _group(config, run_id, prompt, iteration, buffer)],
        )
        for start in range(0, len(chosen), per_shard)
    ]


def _group(config: RunConfig, run_id: str, prompt: Prompt, iteration: int, buffer: Entries) -> list[Member]:
    group = ids.group_id(run_id, iteration, prompt.prompt_id)
    size = config.rollout.group_size
    replayed = replayed_entries(config, buffer.get(prompt.prompt_id, ()))
    parents = [None] * (size - len(replayed)) + replayed
    members = []
    for index, parent in enumerate(parents):
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
                parent=parent,
            )
        )
    return members
