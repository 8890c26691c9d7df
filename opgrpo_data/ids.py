"""Deterministic ids and seeds: the same inputs name the same thing on every machine, so work done twice is done once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ID_BYTES = 12
SEED_BITS = 63  # an Arrow int64 and a torch generator both hold it


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digest(kind: str, parts: tuple[Any, ...], size: int = ID_BYTES) -> bytes:
    # `person` keeps ids of different kinds apart even when their parts are equal.
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=size, person=kind.encode()).digest()


def prompt_id(text: str, metadata: Mapping[str, Any]) -> str:
    """Id of a prompt: its text and what is known about it (a reward judges by both)."""
    return _digest("prompt", (text, dict(metadata))).hex()


def run_id(name: str, identity: Mapping[str, Any]) -> str:
    """`<name>-<hash>` where the hash covers every setting that changes what the run computes."""
    return f"{name}-{_digest('run', (name, dict(identity)), 4).hex()}"


def group_id(run: str, iteration: int, prompt: str) -> str:
    """Id of the group of one prompt in one iteration of one run."""
    return _digest("group", (run, iteration, prompt)).hex()


def trajectory_id(group: str, member_index: int) -> str:
    """Id of member 0..G-1 of a group."""
    return _digest("trajectory", (group, member_index)).hex()


def weights_id(digest: bytes) -> str:
    """policy_id: the hash of a policy's weights (see pipelines.weights, which feeds the bytes)."""
    return hashlib.blake2b(digest, digest_size=ID_BYTES, person=b"policy").hexdigest()


def derived_seed(*parts: int | str) -> int:
    """A seed in 0..2^63-1 that depends on all parts and on nothing else."""
    return int.from_bytes(_digest("seed", parts, 8), "big") >> (64 - SEED_BITS)
