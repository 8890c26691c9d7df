"""Replay: read the stored trajectories that come back, and let the old policy judge them.

Continuations (members of a group that keep a stored prefix) are judged here before their tail is drawn; whole past groups
that join the batch (group reuse) are judged into the table `densities`, which the plan reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.importance import longest_prefix
from opgrpo_data.schema import DENSITIES, table_of
from pipelines.experiment import Experiment
from pipelines.groups import Entries, Member
from pipelines.reuse import densities_path, reusable
from pipelines.sampler import Transitions
from pipelines.settings import ReplayConfig
from pipelines.trajectories import Densities, Stored, evaluate, read_prefixes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Replayed:
    """A member that continues its parent: x_0..x_K, (K+1, *latent_shape) float32, and the old policy's densities, (K,)."""

    member: Member
    states: Tensor
    logprob: Tensor
    path_variance: Tensor


def buffer_entries(experiment: Experiment, iteration: int) -> Entries:
    """The buffer that `iteration` replays; empty at the start, and for every algorithm but op_grpo.

    Entries put in quarantine since are still in it: which prompts an iteration visits must not change while it is drawn.
    """
    if experiment.config.algorithm != "op_grpo":
        return {}
    path = experiment.buffer_path(iteration - 1)
    if path is None:
        return {}
    if not experiment.store.directory.exists(path):
        raise StoreError(
            f"iteration {iteration} replays the buffer of iteration {iteration - 1}, which is not there: "
            f"run `opgrpo select` for that iteration first"
        )
    entries: dict[str, list[Row]] = {}
    for entry in experiment.store.read_tables("buffers", [path]).to_pylist():
        entries.setdefault(entry["prompt_id"], []).append(entry)
    return entries


def admit(experiment: Experiment, members: Sequence[Member], grid: Transitions) -> list[Replayed]:
    """The members that continue a stored prefix, each cut to the prefix it keeps (docs/maths.md, sections 3 and 5).

    A damaged parent is quarantined; one whose bytes were dropped, or that is below the floor of `replay.admission`, is passed
    over. Their places are drawn fresh.
    """
    replay = experiment.config.replay
    longest = grid.num_steps if replay.truncation == "none" else replay.prefix_steps
    parents = [(member, member.parent) for member in members if member.parent is not None]
    unusable = experiment.store.unusable(parent for _, parent in parents)
    asked = [(member, parent) for member, parent in parents if parent["trajectory_id"] not in unusable]
    admitted = []
    for (member, _), states, logprob, variance in _judged(experiment, asked, longest, grid):
        kept = prefix_length(variance.tolist(), replay)
        if kept > 0:
            admitted.append(Replayed(member, states[: kept + 1], logprob[:kept], variance[:kept]))
    return admitted


def prefix_length(path_variance: Sequence[float], replay: ReplayConfig) -> int:
    """K of an entry, given lambda of all the steps it might keep; 0 when it is not admitted."""
    trusted = longest_prefix(path_variance, replay.ess_floor)
    shortest = replay.prefix_min if replay.truncation == "adaptive" else len(path_variance)
    if trusted < shortest and replay.admission == "ess":
        return 0
    return max(trusted, shortest) if replay.truncation == "adaptive" else shortest


def by_prefix(replayed: Sequence[Replayed], batch_size: int) -> Iterator[tuple[list[Member], Stored, Densities]]:
    """Batches of members that keep equally long prefixes, shortest first."""
    for kept in sorted({len(r.path_variance) for r in replayed}):
        alike = [r for r in replayed if len(r.path_variance) == kept]
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            members = [r.member for r in batch]
            parents = [member.parent or {} for member in members]
            texts = [member.prompt.text for member in members]
            stored = _stored(texts, torch.stack([r.states for r in batch]), parents)
            densities = Densities(torch.stack([r.logprob for r in batch]), torch.stack([r.path_variance for r in batch]))
            yield members, stored, densities


def _stored(texts: Sequence[str], states: Tensor, rows: Sequence[Row]) -> Stored:
    return Stored(texts, states, [row["behaviour_logprob"] for row in rows], [row["noise_seeds"] for row in rows])


def _judged(
    experiment: Experiment, asked: Sequence[tuple[Any, Row]], longest: int, grid: Transitions
) -> Iterator[tuple[tuple[Any, Row], Tensor, Tensor, Tensor]]:
    """The old policy on stored trajectories: (what was asked, states, log-prob, path variance) of each that is whole."""
    whole = _whole(experiment, asked, longest, grid)
    while batch := list(islice(whole, experiment.config.rollout.batch_size)):
        rows = [row for (_, row), _ in batch]
        states = torch.stack([found for _, found in batch]).to(experiment.policy.device)
        texts = [experiment.prompt_of[row["prompt_id"]].text for row in rows]
        densities = evaluate(experiment.policy, _stored(texts, states, rows), grid)
        for index, (it, _) in enumerate(batch):
            yield it, states[index], densities.logprob[index], densities.path_variance[index]


def _whole(
    experiment: Experiment, asked: Sequence[tuple[Any, Row]], longest: int, grid: Transitions
) -> Iterator[tuple[tuple[Any, Row], Tensor]]:
    """What was asked and its states, of each trajectory whose bytes are whole; the others go into quarantine.

    A batch of trajectories is read at once; memory: as many bytes as the largest of these batches has.
    """
    size = experiment.config.rollout.batch_size
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        found = read_prefixes(experiment.store.directory, [row for _, row in batch], longest)
        for it, states in zip(batch, found, strict=True):
            if isinstance(states, CorruptionError):
                experiment.store.quarantine(it[1]["trajectory_id"], states)
                experiment.progress.warn(f"{states}; quarantined and not replayed")
            else:
                _check_fits(experiment, it[1], states, grid)
                yield it, states


def _check_fits(experiment: Experiment, row: Row, states: Tensor, grid: Transitions) -> None:
    shape = experiment.policy.latent_shape
    if tuple(states.shape[1:]) != shape or list(grid.sigmas) != row["sigmas"]:
        raise StoreError(
            f"trajectory {row['trajectory_id']} has latents {tuple(states.shape[1:])} on another sigma grid or of another "
            f"shape than this policy's {shape}: it cannot be replayed"
        )


def judge_reused(experiment: Experiment, iteration: int, grid: Transitions) -> int:
    """Write the old policy's densities of trajectories that join whole, unless they are there; returns how many were judged."""
    path = densities_path(experiment, iteration)
    if not experiment.config.judges_stored or experiment.store.directory.exists(path):
        return 0
    window = experiment.config.train.window or grid.num_steps
    asked = [(None, row) for row in reusable(experiment, iteration)]
    experiment.learner(iteration)  # the old policy of this iteration
    rows = [
        {
            "run_id": experiment.run_id,
            "iteration": iteration,
            "trajectory_id": row["trajectory_id"],
            "old_logprob": logprob.tolist(),
            "path_variance": variance.tolist(),
        }
        for (_, row), _, logprob, variance in _judged(experiment, asked, min(window, grid.num_steps), grid)
    ]
    experiment.store.publish_table(path, table_of(rows, DENSITIES))
    return len(rows)
