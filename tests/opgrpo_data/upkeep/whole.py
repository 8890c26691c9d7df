"""A store with something of everything, small enough to be damaged a thousand times."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from opgrpo_data import buffer, ids
from opgrpo_data.schema import UPDATES, table_of
from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import Store, iteration_folder
from tests.opgrpo_data.factories import (
    RUN,
    buffer_rule,
    folder,
    no_buffer,
    plan,
    plan_rule,
    random_latents,
    record,
    reward_row,
    rewards,
)

PROMPT: dict[str, Any] = {"text": "a red square", "metadata": {"count": 1}}
NOTE = {"prompt": PROMPT["text"], "metadata": PROMPT["metadata"]}
MEMBERS = 2


def whole_store(url: str, iterations: int = 2, run: str = RUN) -> Store:
    """A store with one run, as the stages leave it after `iterations` trained iterations: one prompt, a shard each.

    The buffer holds the best trajectory so far, and the first iteration's first is never beaten.
    """
    store = Store.create(url)
    paths = {"train": store.add_prompts([PROMPT], "train")}
    for name, kind in (("base", "base"), ("policy-0", "trained"), ("new", "trained")):
        store.add_policy(name, {"kind": kind, "run_id": run, "iteration": 0}, None)
    document = {"config": {"name": run, "seed": 0}, "command": ["opgrpo"], "software": {}}
    store.add_run(run, document | {"prompts": paths, "base_policy_id": "base"})
    for iteration in range(iterations):
        iterate(store, iteration, run)
    weights: dict[str, NDArray[Any]] = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros((), np.float16)}
    store.add_policy("mean", {"kind": "average", "run_id": run, "iteration": iterations}, with_digest(weights))
    store.directory.publish("conditions/encoder=e/0.safetensors", with_checksums({"k/embeds": np.ones((3, 4), np.float32)}))
    return store


def iterate(store: Store, iteration: int, run: str = RUN, *, trained: bool = True) -> None:
    """One iteration of a run: drawn, scored, selected, and perhaps trained."""
    place = folder(iteration).replace(RUN, run)
    write_shard(store.directory, place, "00000", [member(run, iteration, index) for index in range(MEMBERS)])
    rows = store.read_tables("trajectories", [f"{place}/00000.parquet"])
    scores = {name: float(iteration == 0 and place == 0) for place, name in enumerate(rows["trajectory_id"].to_pylist())}
    told = rewards([reward_row(name, value) for name, value in scores.items()])
    store.publish_table(f"rewards/reward=taste/run={run}/iter={iteration:06d}/00000.v1.000.parquet", told)
    last = store.files("buffers", run=run)[-1:]
    previous = store.read_tables("buffers", last) if last else no_buffer()
    kept = buffer.select(previous, buffer.candidates(rows, told), set(), run_id=run, iteration=iteration, rule=buffer_rule(1.0))
    store.publish_table(f"{iteration_folder('buffers', run, iteration)}.parquet", kept)
    store.publish_table(
        f"{iteration_folder('plans', run, iteration)}.parquet", plan(rows, told, plan_rule(), iteration=iteration)
    )
    if trained:
        train(store, iteration, run)


def train(store: Store, iteration: int, run: str = RUN) -> None:
    """The training state, and the table that says an iteration is trained."""
    state = {"weights/w": np.full(3, iteration, np.float32)}
    store.directory.publish(f"states/run={run}/iter={iteration + 1:06d}/new.safetensors", with_digest(state))
    updates = table_of([{"run_id": run, "iteration": iteration, "new_policy_id": "new"}], UPDATES)
    store.publish_table(f"{iteration_folder('updates', run, iteration)}.parquet", updates)


def member(run: str, iteration: int, index: int) -> Record:
    """A trajectory of a run."""
    prompt = ids.prompt_id(PROMPT["text"], PROMPT["metadata"])
    name = ids.trajectory_id(ids.group_id(run, iteration, prompt), index)
    latents = random_latents(ids.derived_seed(name), 3, (2, 2, 2))
    told: dict[str, Any] = {"prompt_id": prompt, "run_id": run, "iteration": iteration, "member_index": index, "note": NOTE}
    return record(name, latents, **told)


def with_digest(tensors: Mapping[str, NDArray[Any]], path: str = "") -> bytes:
    """As pipelines.weights.to_bytes writes them: a digest over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.blake2b()
    for name in sorted(tensors):
        digest.update(f"{name}:torch.{tensors[name].dtype}:{tensors[name].shape};".encode() + tensors[name].tobytes())
    return bytes(safetensors.numpy.save(dict(tensors), metadata={"digest": f"{digest.hexdigest()} {path}".rstrip()}))


def with_checksums(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """As pipelines.policies.conditions writes them: the crc32 of each tensor by its name."""
    return bytes(safetensors.numpy.save(dict(tensors), metadata={n: str(zlib.crc32(t.tobytes())) for n, t in tensors.items()}))


def files_of(store: Store) -> dict[str, bytes]:
    """Every file of a store on disk, by its path."""
    root = Path(store.directory.root)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
