"""What the trials write: trajectories and tables whose bytes follow from their names, and a store with a file of every kind."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy

from opgrpo_data import schema
from opgrpo_data.errors import CorruptionError
from opgrpo_data.locations import Locations, Spans
from opgrpo_data.reading import read_many, read_media
from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import TABLES, Store, iteration_folder
from opgrpo_data.upkeep.garbage import collect
from opgrpo_data.upkeep.verify import verify

RUN = "faults"
STEPS = 4
SHAPE = (4, 16, 16)
MEMBERS = 3
MEDIA_BYTES = 3000
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def trajectory_id(iteration: int, shard: int, member: int) -> str:
    """Says which one it is."""
    return f"t-{iteration}-{shard}-{member}"


def record(name: str, *, writer: int = 0, shape: Sequence[int] = SHAPE) -> Record:
    """The trajectory of that name. writer: another one, other bytes."""
    iteration, shard, member = (int(part) for part in name.split("-")[1:])
    rng = np.random.default_rng([iteration, shard, member, writer])
    size = (STEPS + 1) * int(np.prod(shape)) * 2
    latents = np.frombuffer(rng.bytes(size), np.float16).reshape(STEPS + 1, *shape)
    row: dict[str, Any] = {
        "trajectory_id": name,
        "group_id": f"g-{iteration}-{shard}",
        "prompt_id": f"p{member}",
        "run_id": RUN,
        "iteration": iteration,
        "member_index": member,
        "policy_id": "base",
        "base_model": "none",
        "prefix_steps": 0,
        "sampler": "flow_sde",
        "num_steps": STEPS,
        "noise_level": 0.7,
        "guidance_scale": 1.0,
        "sigmas": np.linspace(1, 0, STEPS + 1).tolist(),
        "seed": writer,
        "noise_seeds": list(range(STEPS)),
        "num_elements": int(np.prod(shape)),
        "behaviour_logprob": [-1.0] * STEPS,
        "old_logprob": [-1.0] * STEPS,
        "transition_std": [0.5] * STEPS,
        "path_variance": [],
        "latent_shape": list(shape),
        "latent_dtype": "float16",
        "created_at": NOON,
        "software": "{}",
    }
    return Record(row, latents, rng.bytes(MEDIA_BYTES), "webp", {"prompt": "a red square", "metadata": {}})


def shard_index(iteration: int, shard: int) -> str:
    """Path of a shard's index."""
    return f"{iteration_folder('trajectories', RUN, iteration)}/{shard:05d}.parquet"


def add_shard(store: Store, iteration: int, shard: int, *, writer: int = 0, shape: Sequence[int] = SHAPE) -> bool:
    """Write a shard. False if another writer committed it."""
    names = [trajectory_id(iteration, shard, member) for member in range(MEMBERS)]
    made = (record(name, writer=writer, shape=shape) for name in names)
    return write_shard(store.directory, iteration_folder("trajectories", RUN, iteration), f"{shard:05d}", made)


def wrong_bytes(store: Store, indexes: Sequence[str], *, shape: Sequence[int] = SHAPE) -> Iterator[str]:
    """What readers get of these shards that is not what their writer wrote (the row's seed says which writer it was)."""
    for index in indexes:
        table = store.read_tables("trajectories", [index])
        rows = table.to_pylist()
        if len(rows) != MEMBERS:
            yield f"{index} has {len(rows)} rows, {MEMBERS} were written"
        whole = np.full(len(rows), STEPS)
        read = read_many(store.directory, Spans.of(Locations.of(table), 0 * whole, whole))
        for row, latents in zip(rows, read, strict=True):
            written = record(row["trajectory_id"], writer=row["seed"], shape=shape)
            if isinstance(latents, CorruptionError):
                yield str(latents)
            elif latents.tobytes() != written.latents.tobytes():
                yield f"latents of {row['trajectory_id']} are not those written"
            if changed := [name for name, value in written.row.items() if row[name] != value]:
                yield f"{index}: {changed} of {row['trajectory_id']} are not those written"
            try:
                if read_media(store.directory, row) != written.media:
                    yield f"media of {row['trajectory_id']} are not those written"
            except CorruptionError as error:
                yield str(error)


def damages(store: Store) -> list[str]:
    """What a deep verify finds damaged. That tables disagree is the nature of what is written here: they name what is not
    there, and say more than any run would."""
    findings = verify(store, deep=True).findings
    return [f"{finding.path}: {finding.problem}" for finding in findings if finding.kind == "damage"]


def table(kind: str, iteration: int, trajectories: Sequence[str] = (), located: pa.Table | None = None) -> pa.Table:
    """A table of one kind with a row for each trajectory; `located`: index rows, whose places buffers and plans repeat."""
    wanted = TABLES[kind].schema
    places = {row["trajectory_id"]: row for row in located.to_pylist()} if located is not None else {}
    rows = []
    for number, name in enumerate(trajectories):
        row = {column: value for column, value in places.get(name, {}).items() if column in wanted.names}
        fixed = {"trajectory_id": name, "run_id": RUN, "iteration": iteration, "prompt_id": f"p{number}", "reward": 0.5}
        if kind == "rewards":
            fixed |= {"reward": "taste", "version": "1", "value": number / 7, "detail": "{}"}
        if kind == "evals":
            fixed |= {"reward": "taste", "version": "1", "value": 0.25, "detail": "{}", "policy_id": "average"}
        rows.append(row | {column: value for column, value in fixed.items() if column in wanted.names})
    return schema.table_of(rows, wanted)


def weights(seed: int) -> bytes:
    """A safetensors file of one tensor, with its checksum as encoded prompts have it."""
    tensor = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
    return bytes(safetensors.numpy.save({"w": tensor}, metadata={"w": str(zlib.crc32(tensor.tobytes()))}))


def add_documents(store: Store) -> None:
    """A run, its prompts, its base policy, and an average with weights."""
    prompts = store.add_prompts([{"text": f"a square, number {n}", "metadata": {}} for n in range(MEMBERS)], "train")
    store.add_policy("base", {"kind": "base", "parent_id": None, "run_id": RUN, "iteration": 0}, None)
    average = {"kind": "average", "parent_id": "base", "run_id": RUN, "iteration": 1, "parameters": 2000}
    store.add_policy("average", average, weights(0))
    run = {"config": {"name": RUN, "seed": 0}, "command": ["opgrpo", "run"], "software": {"opgrpo": "0"}}
    store.add_run(RUN, run | {"base_policy_id": "base", "prompts": {"train": prompts}})


def add_iteration(store: Store, iteration: int, shards: int, keep: Sequence[str] = ()) -> None:
    """What an iteration leaves: shards, rewards, a buffer of `keep`, a plan of what is fresh, and that it was trained."""
    fresh = []
    for shard in range(shards):
        add_shard(store, iteration, shard)
        names = [trajectory_id(iteration, shard, member) for member in range(MEMBERS)]
        fresh += names
        folder = iteration_folder("rewards/reward=taste", RUN, iteration)
        store.publish_table(f"{folder}/{shard:05d}.v1.000.parquet", table("rewards", iteration, names))
    located = store.read_tables("trajectories", store.files("trajectories"))
    contents: dict[str, Sequence[str]] = {"buffers": keep, "plans": fresh, "densities": fresh, "updates": fresh}
    for kind, held in contents.items():
        store.publish_table(f"{iteration_folder(kind, RUN, iteration)}.parquet", table(kind, iteration, held, located))


def add_everything(url: str) -> Store:
    """A store that has a file of every kind: three iterations, a dropped shard, one in quarantine, a pin."""
    store = Store.create(url)
    add_documents(store)
    for iteration in range(3):
        add_iteration(store, iteration, 2, [trajectory_id(0, 1, 0), trajectory_id(max(iteration - 1, 0), 0, 1)])
    evaluations = f"{iteration_folder('evals', RUN, 1)}/taste.v1.plain.parquet"
    store.publish_table(evaluations, table("evals", 1, ["x"]))
    store.directory.publish(f"conditions/encoder=none/{0:016x}.safetensors", weights(1))
    store.directory.publish(f"states/run={RUN}/iter=000002/average.safetensors", weights(2))
    lost = CorruptionError("nothing", f"{trajectory_id(0, 0, 0)}.latents.npy", 1, 2)
    store.quarantine(trajectory_id(0, 0, 0), lost)
    collect(store, delete=True, grace=timedelta(hours=1), keep_iterations=1)
    store.pin(RUN)
    return store
