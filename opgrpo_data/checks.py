"""What is checked of data from outside before any of it reaches a store. Everything here raises ValueError, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opgrpo_data import ids
from opgrpo_data.io import Directory, checked_name
from opgrpo_data.locations import NUMPY_DTYPES
from opgrpo_data.seal import read_json

MAX_JSON_BYTES = 16 * 2**20
MAX_STEPS = 10_000
MAX_DIMENSIONS = 8
MAX_TRAJECTORY_BYTES = 2**34
"""Of the latents, and of the media, of one trajectory."""
MEDIA_FORMATS = ("png", "webp", "mp4")

_NAMES = ("trajectory_id", "group_id", "prompt_id", "run_id", "policy_id")
_PER_STEP = ("noise_seeds", "behaviour_logprob", "old_logprob", "transition_std")


def parsed_object(data: bytes, where: str) -> dict[str, Any]:
    """JSON that must be an object of bounded size; if it has a seal, one that holds."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{where} is longer than {MAX_JSON_BYTES} bytes")
    try:
        return read_json(data)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def read_object(directory: Directory, path: str) -> dict[str, Any]:
    """A JSON document of a directory; not more than a bounded part of the file is read."""
    return parsed_object(directory.read_range(path, 0, MAX_JSON_BYTES + 1), path)


def checked_path(path: str) -> str:
    """A path as a store has them: each component a checked name, or a key, `=` and a checked name."""
    for component in path.split("/"):
        key, equals, name = component.rpartition("=")
        checked_name(name, f"in {path!r}")
        if equals:
            checked_name(key, f"in {path!r}")
    return path


def check_row(row: Mapping[str, Any]) -> None:
    """A row of TRAJECTORIES: names that may become paths, counts that agree with one another, sizes that are possible."""
    for name in _NAMES:
        if row[name] is not None or name == "trajectory_id":
            checked_name(str(row[name]), name)
    if row["parent_id"] is not None:
        checked_name(row["parent_id"], "parent_id")
    who = f"trajectory {row['trajectory_id']}"
    if row["run_id"] is None or row["iteration"] is None or row["iteration"] < 0:
        raise ValueError(f"{who} is of no iteration of a run: {row['run_id']!r}, {row['iteration']!r}")
    steps = row["num_steps"]
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"{who} has num_steps {steps!r}; expected 1 to {MAX_STEPS}")
    if not 0 <= (row["prefix_steps"] or 0) <= steps:
        raise ValueError(f"{who} keeps {row['prefix_steps']} of {steps} steps")
    lengths = {**dict.fromkeys(_PER_STEP, steps), "sigmas": steps + 1}
    for name, length in lengths.items():
        if row[name] is not None and len(row[name]) != length:
            raise ValueError(f"{who} has {len(row[name])} {name} for {steps} steps")
    if len(row["path_variance"] or ()) > steps:
        raise ValueError(f"{who} has {len(row['path_variance'])} path_variance for {steps} steps")
    if row["media_format"] not in MEDIA_FORMATS:
        raise ValueError(f"{who} has media_format {row['media_format']!r}; expected one of {', '.join(MEDIA_FORMATS)}")
    _check_latents(row, who, steps)


def _check_latents(row: Mapping[str, Any], who: str, steps: int) -> None:
    shape, dtype, checksums = row["latent_shape"], row["latent_dtype"], row["latents_crc32"]
    if not shape or len(shape) > MAX_DIMENSIONS or any(size is None or size < 1 for size in shape):
        raise ValueError(f"{who} has latents of shape {shape}")
    if dtype not in NUMPY_DTYPES:
        raise ValueError(f"{who} has latents of {dtype!r}; expected one of {', '.join(NUMPY_DTYPES)}")
    if math.prod(shape) * (steps + 1) * 4 > MAX_TRAJECTORY_BYTES:
        raise ValueError(f"{who} has {steps + 1} latents of shape {shape}: more than {MAX_TRAJECTORY_BYTES} bytes")
    if checksums is None or len(checksums) != steps + 1 or None in checksums or row["media_crc32"] is None:
        raise ValueError(f"{who} has no checksum for each of its {steps + 1} latents and its media")


def check_prompts(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Rows of PROMPTS: an id is the hash of what it names."""
    for row in rows:
        if not isinstance(row["text"], str) or not isinstance(row["split"], str) or not isinstance(row["metadata"], str):
            raise ValueError(f"{where}: prompt {row['prompt_id']!r} has no text, metadata and split")
        checked_name(row["split"], "split")
        metadata = parsed_object(row["metadata"].encode(), f"{where}: metadata of prompt {row['prompt_id']!r}")
        if (found := ids.prompt_id(row["text"], metadata)) != row["prompt_id"]:
            raise ValueError(f"{where}: prompt {row['prompt_id']!r} is not what its id says ({found})")


def check_reward(row: Mapping[str, Any]) -> None:
    """A row of REWARDS."""
    for name in ("trajectory_id", "reward", "version"):
        checked_name(str(row[name]), name)
    if row["value"] is None and row["error"] is None:
        raise ValueError(f"reward {row['reward']} says nothing of trajectory {row['trajectory_id']}")
