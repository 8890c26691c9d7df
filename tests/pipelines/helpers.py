"""What the tests of the compute plane share: the embedded policy, loaded once, and experiments in small stores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opgrpo_data.io import Directory
from opgrpo_data.reading import read_media
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from pipelines import media, weights
from pipelines.config import RunConfig, build_config
from pipelines.experiment import Experiment
from pipelines.groups import Entries, Member, shard_tasks
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.rewards.base import Media
from pipelines.sampler import Transitions, transitions
from pipelines.trajectories import Drawn, records

SMALL: Mapping[str, Any] = {
    "name": "small",
    "iterations": 3,
    "policy": {"family": "tests.pipelines.helpers:shared_policy"},
    "prompts": {"limit": 4},
    "rollout": {"prompts_per_iteration": 2, "group_size": 4, "num_steps": 5, "groups_per_shard": 1},
    "replay": {"prefix_steps": 2},
    "reward": {"name": "tests.pipelines.bad_rewards:moody"},
    "train": {"window": 3, "optimizer_steps": 1, "max_grad_norm": 1e6},
    "eval": {"samples": 6, "num_steps": 3, "reward": {"name": "tests.pipelines.bad_rewards:moody"}},
}
"""Two groups of four trajectories of five steps, one shard a group; a clip of the gradient that never bites."""

TRAINED: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"lora": {"rank": 4, "alpha": 7}},
    "whole": {},
    "adapter, bfloat16": {"lora": {"rank": 4, "alpha": 7}, "dtype": "bfloat16"},
    "whole, bfloat16": {"dtype": "bfloat16"},
}
"""Ways of training the embedded model: the options of its policy."""


@cache
def _embedded() -> tuple[PipelinePolicy, dict[str, Tensor]]:
    policy = load("embedded", device="cpu")
    return policy, {name: tensor.detach().clone() for name, tensor in weights.trainable(policy.trainable).items()}


def shared_policy(model: str = "embedded") -> PipelinePolicy:
    """The embedded policy with its shipped weights. Also a `policy.family`: experiments need not load it again."""
    policy, shipped = _embedded()
    weights.copy_into(policy.trainable, shipped)
    policy.trainable.zero_grad()
    policy._recent.clear()
    policy.conditions = None
    return policy


def perturbed(policy: PipelinePolicy, scale: float, seed: int) -> dict[str, Tensor]:
    """The policy's weights with a relative Gaussian error: another policy nearby."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor.detach() * (1 + scale * torch.randn(tensor.shape, generator=generator))
        for name, tensor in weights.trainable(policy.trainable).items()
    }


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `changes` on top of `base`."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, Mapping) else value
    return result


def small(**changes: Any) -> RunConfig:
    """The small configuration with some settings changed."""
    return build_config(merged(SMALL, changes), "test")


def created(folder: Path, config: RunConfig) -> Experiment:
    """A fresh store with one run in it."""
    return Experiment.init(str(folder / "store"), config, Progress(quiet=True))


def forked(store: Path, folder: Path, **changes: Any) -> Experiment:
    """The run of the small configuration in a copy of a store, as another process would open it.

    `changes` are settings for what the test does next. They would name another run, so the run keeps its name.
    """
    shutil.copytree(store, folder / "store")
    experiment = Experiment(Store.open(str(folder / "store")), small(**changes), Progress(quiet=True))
    experiment.run_id = small().run_id
    return experiment


def reopened(experiment: Experiment) -> Experiment:
    """The same run and store without anything in memory."""
    other = Experiment(Store.open(experiment.store.directory.url), experiment.config, Progress(quiet=True))
    other.run_id = experiment.run_id
    return other


def members_of(config: RunConfig, iteration: int = 0, buffer: Entries | None = None) -> list[Member]:
    """All members of an iteration over four prompts of the embedded world's vocabulary."""
    texts = ["a red circle", "two blue squares", "a red circle left of a blue square", "one green diamond"]
    tasks = shard_tasks(config, config.run_id, [Prompt(text, {}) for text in texts], iteration, buffer or {})
    return [member for task in tasks for member in task.members]


def grid_of(policy: PipelinePolicy, config: RunConfig) -> Transitions:
    """The transitions of a configuration's rollout."""
    rollout = config.rollout
    return transitions(rollout.sampler, policy.sigmas(rollout.num_steps), rollout.noise_level)


def stored(
    directory: Directory, shard: str, policy: PipelinePolicy, members: list[Member], drawn: Drawn, config: RunConfig
) -> list[dict[str, Any]]:
    """Write trajectories as a shard of a store and read its index back, in the order of `members`."""
    grid = grid_of(policy, config)
    common = {
        "run_id": config.run_id,
        "sampler": config.rollout.sampler,
        "num_steps": grid.num_steps,
        "noise_level": config.rollout.noise_level,
        "sigmas": grid.sigmas.tolist(),
        "transition_std": grid.std.tolist(),
        "latent_shape": list(policy.latent_shape),
        "latent_dtype": config.rollout.storage_dtype,
        "num_elements": elements(policy),
    }
    assert write_shard(directory, "shards", shard, records(policy, members, drawn, config.rollout, common))
    rows: list[dict[str, Any]] = Store(directory).read_tables("trajectories", [f"shards/{shard}.parquet"]).to_pylist()
    return rows


def elements(policy: PipelinePolicy) -> int:
    """D."""
    return int(torch.Size(policy.latent_shape).numel())


def rows_of(experiment: Experiment, kind: str, iteration: int | None = None) -> list[dict[str, Any]]:
    """All rows of one kind of table in an experiment's store."""
    files = experiment.store.files(kind, iteration=iteration)
    rows: list[dict[str, Any]] = experiment.store.read_tables(kind, files).to_pylist()
    return rows


def pictures_of(experiment: Experiment) -> dict[str, Media]:
    """trajectory_id to its picture, of all trajectories in an experiment's store."""
    rows = rows_of(experiment, "trajectories")
    return {row["trajectory_id"]: media.decode(read_media(experiment.store.directory, row)) for row in rows}


def flipped(path: Path, offset: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def doubled(store: Store) -> None:
    """Let a second index file hold every trajectory and every reward once more."""
    for kind in ("trajectories", "rewards"):
        for path in store.files(kind):
            store.publish_table(path.replace(".parquet", "-again.parquet"), store.read_tables(kind, [path]))


def each(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Two sets of weights, parameter by parameter."""
    assert set(values) == set(others)
    for name in sorted(values):
        yield name, values[name], others[name]
