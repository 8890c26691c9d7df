"""What the benchmark writes and reads: trajectories of two sizes, as many as wanted, of a few random latents and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from opgrpo_data.shards import Record

STEPS = 10
VARIANTS = 8
"""Different contents; all others repeat them. Checksums and disks do not care."""


@dataclass(frozen=True)
class Size:
    """A size of trajectory. latent_shape: of one of the STEPS + 1 float16 latents. media_bytes: of the encoded picture."""

    name: str
    latent_shape: tuple[int, ...]
    media_bytes: int

    @property
    def latent_bytes(self) -> int:
        """Bytes of all latents of one trajectory."""
        return (STEPS + 1) * math.prod(self.latent_shape) * 2


SD3 = Size("sd3", (16, 64, 64), 100_000)
"""An SD3 picture of 512 x 512: 1.44 MB of latents, and a WebP picture."""

SMALL = Size("small", (16, 8, 8), 2_000)
"""22 KB of latents, and the PNG of a small picture."""


def records(size: Size, count: int, *, iteration: int = 0, shard: int = 0) -> Iterator[Record]:
    """Trajectories as a rollout hands them to the writer. Their ids say iteration, shard and place."""
    rng = np.random.default_rng(0)
    shape = (STEPS + 1, *size.latent_shape)
    latents = [np.frombuffer(rng.bytes(size.latent_bytes), np.float16).reshape(shape) for _ in range(VARIANTS)]
    media = [rng.bytes(size.media_bytes) for _ in range(VARIANTS)]
    common = _common(size, iteration)
    for index in range(count):
        name, group = f"t{iteration:06d}-{shard:05d}-{index:05d}", index // 24
        row = common | {
            "trajectory_id": name,
            "group_id": f"g{iteration:06d}-{shard:05d}-{group:05d}",
            "prompt_id": f"p{group:05d}",
            "member_index": index % 24,
            "seed": index,
            "noise_seeds": list(range(index, index + STEPS)),
            "behaviour_logprob": [-0.1 * index] * STEPS,
            "old_logprob": [-0.1 * index] * STEPS,
        }
        yield Record(
            row, latents[index % VARIANTS], media[index % VARIANTS], "webp", {"prompt": "a red square on a blue field"}
        )


def _common(size: Size, iteration: int) -> dict[str, Any]:
    return {
        "run_id": "benchmark",
        "iteration": iteration,
        "policy_id": "0" * 24,
        "base_model": "none",
        "parent_id": None,
        "prefix_steps": 0,
        "sampler": "flow_sde",
        "num_steps": STEPS,
        "noise_level": 0.7,
        "guidance_scale": 4.5,
        "sigmas": np.linspace(1, 0, STEPS + 1).tolist(),
        "num_elements": math.prod(size.latent_shape),
        "transition_std": [0.1] * STEPS,
        "path_variance": [],
        "latent_shape": list(size.latent_shape),
        "latent_dtype": "float16",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "software": "{}",
    }
