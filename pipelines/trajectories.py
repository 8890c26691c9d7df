"""From members to trajectories: fresh ones from noise, continuations from a replayed prefix. Tensors in, store rows out.

Shapes: B members, T steps, K prefix steps, latents (*latent_shape).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opgrpo_data.errors import CorruptionError
from opgrpo_data.io import Directory
from opgrpo_data.locations import Locations, Spans
from opgrpo_data.reading import read_many
from opgrpo_data.shards import Record
from pipelines import media, sampler
from pipelines.groups import Member
from pipelines.policies.base import Policy
from pipelines.sampler import Transitions
from pipelines.settings import RolloutConfig


@dataclass(frozen=True)
class Drawn:
    """B trajectories as they came from the sampler.

    prefix_steps: K, 0 for fresh ones. latents: (B, T+1, *latent_shape) float32, on the storage grid. Log-probs: (B, T)
    float64. path_variance: (B, K) float64. noise_seeds: B x T, the seed of the noise that drew each transition.
    """

    prefix_steps: int

    latents: Tensor
    behaviour_logprob: Tensor
    old_logprob: Tensor
    path_variance: Tensor
    noise_seeds: list[list[int]]


def draw_fresh(policy: Policy, members: Sequence[Member], grid: Transitions, dtype: str) -> Drawn:
    """Trajectories from their initial noise, by the policy as it is: behaviour and old policy are the same."""
    condition = policy.encode([member.prompt.text for member in members])
    shape = policy.latent_shape
    start = torch.stack([sampler.noise(member.initial_seed, -1, shape) for member in members]).to(policy.device)
    path = sampler.draw(
        lambda x, sigma: policy.velocity(x, sigma, condition),
        sampler.store_round(start, dtype),
        grid,
        [member.seed for member in members],
        dtype,
    )
    seeds = [[member.seed] * grid.num_steps for member in members]
    return Drawn(0, path.latents, path.logprob, path.logprob, path.logprob[:, :0], seeds)


@dataclass(frozen=True)
class Stored:
    """B stored trajectories to be judged by the policy as it is, or continued.

    states: (B, K+1, *latent_shape) float32, x_0..x_K. behaviour_logprob, noise_seeds: B x at least K, as stored.
    """

    texts: Sequence[str]
    states: Tensor
    behaviour_logprob: Sequence[Sequence[float]]
    noise_seeds: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Densities:
    """What the policy as it is thinks of K transitions of B stored trajectories; 0 where a step has no density.

    logprob: (B, K) float64, summed over elements. path_variance: (B, K) float64, lambda_k.
    """

    logprob: Tensor
    path_variance: Tensor


def draw_continuations(
    policy: Policy, members: Sequence[Member], stored: Stored, densities: Densities, grid: Transitions, dtype: str
) -> Drawn:
    """Continuations of replayed prefixes x_0..x_K: the old policy samples the tail from x_K (none is left when K = T).

    The prefix keeps the densities of whoever drew it, also when the parent was a continuation itself.
    """
    prefix = stored.states
    kept = prefix.shape[1] - 1
    condition = policy.encode(stored.texts)
    tail = sampler.draw(
        lambda x, sigma: policy.velocity(x, sigma, condition),
        prefix[:, -1],
        grid,
        [member.seed for member in members],
        dtype,
        first_step=kept,
    )
    behaviour = torch.tensor([row[:kept] for row in stored.behaviour_logprob], dtype=torch.float64, device=prefix.device)
    return Drawn(
        prefix_steps=kept,
        latents=torch.cat([prefix, tail.latents[:, 1:]], 1),
        behaviour_logprob=torch.cat([behaviour, tail.logprob], 1),
        old_logprob=torch.cat([densities.logprob, tail.logprob], 1),
        path_variance=densities.path_variance,
        noise_seeds=[
            [*seeds[:kept], *[member.seed] * (grid.num_steps - kept)]
            for member, seeds in zip(members, stored.noise_seeds, strict=True)
        ],
    )


@torch.no_grad()
def evaluate(policy: Policy, stored: Stored, grid: Transitions) -> Densities:
    """Log-prob and path variance of B K stored transitions under the policy as it is.

    That needs no sequential sampling: all states are known, so the transitions are one batch.
    """
    states = stored.states
    count, kept = states.shape[0], states.shape[1] - 1
    density = [k for k in range(kept) if grid.std[k] > 0]
    pairs = [(row, k) for row in range(count) for k in density]
    logprob = torch.zeros(count, kept, dtype=torch.float64, device=states.device)
    variance = torch.zeros_like(logprob)
    rows = torch.tensor([row for row, _ in pairs], device=states.device, dtype=torch.int64)
    steps = torch.tensor([k for _, k in pairs], device=states.device, dtype=torch.int64)
    latents, following = states[rows, steps], states[rows, steps + 1]
    sigmas = torch.as_tensor(grid.sigmas, device=states.device)[steps]
    velocity = policy.velocity(latents, sigmas, policy.encode([stored.texts[row] for row, _ in pairs]))
    drawn = torch.stack([sampler.noise(stored.noise_seeds[row][k], k, states.shape[2:]) for row, k in pairs])
    logprob[rows, steps] = sampler.log_density(grid, steps, latents, following, velocity)
    variance[rows, steps] = sampler.path_variance(grid, steps, latents, following, velocity, drawn.to(states.device))
    return Densities(logprob, variance)


def read_prefixes(directory: Directory, rows: Sequence[Mapping[str, Any]], prefix_steps: int) -> list[Tensor | CorruptionError]:
    """Latents x_0..x_K of each buffer entry or plan row, (K+1, *latent_shape) float32; or how its bytes are damaged."""
    last = np.full(len(rows), prefix_steps)
    read = read_many(directory, Spans.of(Locations.of_rows(rows), np.zeros_like(last), last))
    return [
        it if isinstance(it, CorruptionError) else to_tensor(it, row["latent_dtype"])
        for it, row in zip(read, rows, strict=True)
    ]


def read_prefix(directory: Directory, row: Mapping[str, Any], prefix_steps: int) -> Tensor:
    """As read_prefixes, of one row. Raises CorruptionError."""
    [states] = read_prefixes(directory, [row], prefix_steps)
    if isinstance(states, CorruptionError):
        raise states
    return states


def to_tensor(latents: NDArray[Any], dtype: str) -> Tensor:
    """Stored latents to float32: bfloat16 lies in the store as its uint16 bits."""
    if dtype == "bfloat16":
        return torch.from_numpy(latents.view(np.int16).copy()).view(torch.bfloat16).to(torch.float32)
    return torch.from_numpy(latents.astype(np.float32))


def to_stored(latents: Tensor, dtype: str) -> NDArray[Any]:
    """The inverse of `to_tensor`, exact for latents that were rounded to the storage dtype."""
    rounded = latents.detach().cpu().to(sampler.STORAGE_DTYPES[dtype])
    if dtype == "bfloat16":
        return np.asarray(rounded.view(torch.int16).numpy().view(np.uint16))
    return np.asarray(rounded.numpy())


def records(
    policy: Policy,
    members: Sequence[Member],
    drawn: Drawn,
    config: RolloutConfig,
    common: Mapping[str, Any],
) -> Iterator[Record]:
    """What the store keeps of B drawn trajectories. common: the columns that all trajectories of the shard share."""
    samples = policy.decode(drawn.latents[:, -1])
    for i, member in enumerate(members):
        row = {
            **common,
            "trajectory_id": member.trajectory_id,
            "group_id": member.group_id,
            "prompt_id": member.prompt.prompt_id,
            "member_index": member.member_index,
            "parent_id": member.parent["trajectory_id"] if member.parent and drawn.prefix_steps else None,
            "prefix_steps": drawn.prefix_steps,
            "seed": member.seed,
            "noise_seeds": drawn.noise_seeds[i],
            "behaviour_logprob": drawn.behaviour_logprob[i].tolist(),
            "old_logprob": drawn.old_logprob[i].tolist(),
            "path_variance": drawn.path_variance[i].tolist(),
        }
        media_format = media.format_of(samples[i], config.media_format)
        yield Record(
            row,
            to_stored(drawn.latents[i], config.storage_dtype),
            media.encode(samples[i], media_format),
            media_format,
            {"prompt": member.prompt.text, "metadata": dict(member.prompt.metadata)},
        )
