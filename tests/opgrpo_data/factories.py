"""Rows, records and rules as the stages make them, small enough to reason about. Every default can be overridden."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opgrpo_data.buffer import BufferRule
from opgrpo_data.io import Directory
from opgrpo_data.plan import PlanRule, WeightRule, build_plan
from opgrpo_data.schema import BUFFERS, PLANS, REWARDS, TRAJECTORIES, table_of
from opgrpo_data.shards import Record
from opgrpo_data.store import Store, iteration_folder

RUN = "run-0"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def trajectory_row(trajectory_id: str, *, steps: int = 3, **changes: Any) -> dict[str, Any]:
    """A fresh trajectory of `steps` denoising steps: the columns of TRAJECTORIES that a stage fills in itself."""
    row: dict[str, Any] = {
        "trajectory_id": trajectory_id,
        "group_id": "g0",
        "prompt_id": "p0",
        "run_id": RUN,
        "iteration": 0,
        "member_index": int("".join(filter(str.isdecimal, trajectory_id))[:6] or 0),  # as the name counts them
        "policy_id": "policy-0",
        "base_model": "none",
        "parent_id": None,
        "prefix_steps": 0,
        "sampler": "flow_sde",
        "num_steps": steps,
        "noise_level": 0.7,
        "guidance_scale": 1.0,
        "sigmas": [1 - k / steps for k in range(steps + 1)],
        "seed": 1,
        "noise_seeds": [1] * steps,
        "num_elements": 8,
        "behaviour_logprob": [-1.0] * steps,
        "old_logprob": [-1.0] * steps,
        "transition_std": [0.5] * steps,
        "path_variance": [],
        "latent_shape": [2, 2, 2],
        "latent_dtype": "float32",
        "created_at": NOON,
        "software": "{}",
    }
    unknown = set(changes) - set(TRAJECTORIES.names)
    assert not unknown, unknown
    return row | changes


def located_row(trajectory_id: str, *, steps: int = 3, **changes: Any) -> dict[str, Any]:
    """A whole row of TRAJECTORIES that points at bytes which do not exist: for what works on tables alone."""
    size = 8 * 4  # elements x bytes of the default latents
    place = {
        "latents_file": f"trajectories/{trajectory_id}.latents.tar",
        "latents_offset": 512,
        "latents_length": 128 + (steps + 1) * size,
        "latents_header": 128,
        "latents_crc32": [7] * (steps + 1),
    }
    return trajectory_row(trajectory_id, steps=steps) | place | changes


def random_latents(seed: int, steps: int, shape: Sequence[int], dtype: str = "float32") -> NDArray[Any]:
    """(steps + 1, *shape) of random bits: any pattern of the dtype, NaN and infinity included."""
    kind = np.dtype(NUMPY[dtype])
    count = (steps + 1) * int(np.prod(shape))
    return np.frombuffer(np.random.default_rng(seed).bytes(count * kind.itemsize), kind).reshape(steps + 1, *shape)


def record(trajectory_id: str, latents: NDArray[Any], *, dtype: str = "float32", **changes: Any) -> Record:
    """A record whose row fits its latents. media, media_format and note may be given, else a column of the row."""
    media = changes.pop("media", f"picture of {trajectory_id}".encode())
    media_format = changes.pop("media_format", "png")
    note = changes.pop("note", {"prompt": "a red square"})
    row = trajectory_row(trajectory_id, steps=len(latents) - 1)
    row |= {"latent_shape": list(latents.shape[1:]), "latent_dtype": dtype} | changes
    return Record(row, latents, media, media_format, note)


def records(count: int, *, steps: int = 3, shape: Sequence[int] = (2, 2, 2), **changes: Any) -> list[Record]:
    """Records t0, t1, ... with different latents and media."""
    return [record(f"t{i}", random_latents(i, steps, shape), member_index=i, **changes) for i in range(count)]


def folder(iteration: int = 0) -> str:
    """Where the shards of one iteration of the run lie."""
    return iteration_folder("trajectories", RUN, iteration)


def overwrite(directory: Directory, path: str, content: bytes) -> None:
    """Replace a published file, which nothing of ours ever does: damage."""
    with directory.write_atomic(path) as file:
        file.write(content)


def shard_rows(store: Store) -> list[dict[str, Any]]:
    """All committed trajectory rows, in the order of the index files."""
    rows: list[dict[str, Any]] = store.read_tables("trajectories", store.files("trajectories")).to_pylist()
    return rows


def trajectories(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of the schema TRAJECTORIES."""
    return table_of(rows, TRAJECTORIES)


def reward_row(trajectory_id: str, value: float | None, **changes: Any) -> dict[str, Any]:
    """A row of REWARDS."""
    row = {"trajectory_id": trajectory_id, "reward": "taste", "version": "1", "value": value, "detail": "{}", "error": None}
    return row | changes


def rewards(values: Mapping[str, float | None] | Iterable[dict[str, Any]]) -> pa.Table:
    """A table of the schema REWARDS, from values by trajectory_id or from whole rows."""
    if isinstance(values, Mapping):
        values = [reward_row(name, value) for name, value in values.items()]
    return table_of(list(values), REWARDS)


def no_buffer() -> pa.Table:
    """The buffer before the first iteration."""
    return BUFFERS.empty_table()


def weight_rule(**changes: Any) -> WeightRule:
    """Sequence-level weights of true densities, as they come: no damping, no cut that matters, no normalisation."""
    defaults: dict[str, Any] = {
        "correction": "sequence",
        "reduction": "sum",
        "variance_budget": None,
        "lowest": 0.0,
        "highest": 1e9,
        "normalised": False,
    }
    return WeightRule(**defaults | changes)


WEIGHT_NAMES = {
    "correction": "correction",
    "weight_reduction": "reduction",
    "variance_budget": "variance_budget",
    "weight_min": "lowest",
    "weight_max": "highest",
    "weight_normalised": "normalised",
}
"""Settings of `replay` to fields of WeightRule."""


def plan_rule(**changes: Any) -> PlanRule:
    """Group std, no cut that matters, one epoch of one optimizer step, one microstep.

    `changes` are fields of PlanRule, or settings of its weight under the names they have in a configuration.
    """
    weight = {WEIGHT_NAMES[name]: changes.pop(name) for name in list(changes) if name in WEIGHT_NAMES}
    defaults: dict[str, Any] = {
        "advantage_parts": "sum",
        "advantage_std": "group",
        "advantage_clip": 1e9,
        "weight": weight_rule(**weight),
        "reuse_ess": 0.0,
        "epochs": 1,
        "optimizer_steps": 1,
        "lr_by_signal": False,
        "microbatch": 1000,
        "window": None,
        "step_fraction": 1.0,
        "objective": "clipped",
        "seed": 0,
    }
    return PlanRule(**defaults | changes)


def plan(
    rows: pa.Table,
    scores: pa.Table,
    rule: PlanRule,
    *,
    excluded: Iterable[str] = (),
    reused: pa.Table | None = None,
    iteration: int = 0,
) -> pa.Table:
    """The plan of an iteration, without reused groups unless they are given."""
    others = PLANS.empty_table() if reused is None else reused
    return build_plan(rows, scores, others, set(excluded), iteration=iteration, rule=rule)


def buffer_rule(decay: float = 0.5, **changes: Any) -> BufferRule:
    """Multiplicative decay unless `decay_form` says otherwise."""
    defaults: dict[str, Any] = {"decay": decay, "decay_form": "multiplicative"}
    return BufferRule(**defaults | changes)
