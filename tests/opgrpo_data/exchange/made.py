"""A small store with everything in it that an export or import can meet, and what two stores have in common."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from opgrpo_data import buffer, ids
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.schema import DENSITIES, EVALS, LOCATION, UPDATES, table_of
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder
from tests.opgrpo_data.factories import (
    buffer_rule,
    no_buffer,
    plan,
    plan_rule,
    random_latents,
    record,
    reward_row,
    rewards,
    trajectories,
)

TEXTS: dict[str, dict[str, Any]] = {
    "a red square": {"kind": "single"},
    "two blue circles, | `quoted`\nand σ": {"kind": "count", "n": 2},
}
PROMPT_IDS = {text: ids.prompt_id(text, metadata) for text, metadata in TEXTS.items()}
PLACES = {*LOCATION.names, "media_file", "media_offset", "media_length", "shard"} - {
    "latent_shape",
    "latent_dtype",
    "latents_crc32",
}
TRAJECTORY = "i{iteration}g{group}m{member}"
GROUP = 3


def picture(seed: int) -> bytes:
    """A PNG of 4 x 4 random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def drawn(store: Store, run: str, iteration: int, shard: str, group: int, *, salt: int = 0, **changes: Any) -> list[str]:
    """Write one group of GROUP trajectories as a shard; returns their ids."""
    text = list(TEXTS)[group % len(TEXTS)]
    names = [f"{run}-{TRAJECTORY.format(iteration=iteration, group=group, member=member)}" for member in range(GROUP)]
    records = [
        record(
            name,
            random_latents(ids.derived_seed(name, salt) % 2**32, 3, (2, 2)),
            run_id=run,
            iteration=iteration,
            group_id=f"{run}-{iteration}-{group}",
            prompt_id=PROMPT_IDS[text],
            member_index=member,
            media=picture(ids.derived_seed(name, salt) % 2**32),
            note={"prompt": text, "metadata": TEXTS[text]},
            **changes,
        )
        for member, name in enumerate(names)
    ]
    assert write_shard(store.directory, iteration_folder("trajectories", run, iteration), shard, records)
    return names


def weights() -> bytes:
    """A policy's weights as the store keeps them: with a digest of names, dtypes, shapes and bytes."""
    tensor = np.arange(3, dtype=np.float32)
    digest = hashlib.blake2b(b"w:torch.float32:(3,);" + tensor.tobytes()).hexdigest()
    return bytes(save({"w": tensor}, {"digest": digest}))


def filled(url: str, run: str = "run-0", iterations: int = 2, *, salt: int = 0) -> Store:
    """A store with a run of two groups an iteration and all kinds of tables and documents.

    Values are member / 4 + iteration; in group 1 member 2 could not be judged.
    """
    store = Store.create(url)
    prompts = [{"text": text, "metadata": metadata} for text, metadata in TEXTS.items()]
    store.add_prompts(prompts[:1], "train")
    store.add_prompts(prompts[1:], "held_out")
    for policy in ("policy-0", f"{run}-mean"):
        document = {"family": "sd3", "kind": "base", "run_id": run, "iteration": 0, "parameters": 10, "base_model": "none"}
        store.add_policy(policy, document, weights() if policy.endswith("mean") else None)
    snapshot = no_buffer()
    for iteration in range(iterations):
        for group in range(2):
            scored(store, run, iteration, group, drawn(store, run, iteration, f"{group:05d}", group, salt=salt))
        snapshot = planned(store, run, iteration, snapshot)
    with store.directory.write_atomic(f"runs/{run}/before_after.png") as file:
        file.write(picture(0))
    config = {"name": "run", "seed": 7, "reward": {"name": "taste"}}
    store.add_run(
        run, {"config": config, "command": ["opgrpo", "run"], "software": {"torch": "2"}, "base_policy_id": "policy-0"}
    )
    store.pin(run)
    return store


def scored(store: Store, run: str, iteration: int, group: int, names: list[str]) -> None:
    """Rewards of one group."""
    rows = [reward_row(name, member / 4 + iteration, detail='{"soft":0.1}') for member, name in enumerate(names)]
    if group == 1:
        rows[2] = reward_row(names[2], None, detail=None, error="ValueError: no picture")
    path = f"rewards/reward=taste/run={run}/iter={iteration:06d}/{group:05d}.v1.000.parquet"
    assert store.publish_table(path, rewards(rows))


def planned(store: Store, run: str, iteration: int, snapshot: Any) -> Any:
    """Buffer, plan, densities, updates and evals of one iteration; returns the buffer."""
    found = store.read_tables("trajectories", store.files("trajectories", run=run, iteration=iteration)).to_pylist()
    values = store.read_tables("rewards", store.files("rewards", run=run, iteration=iteration))
    good = values.filter(values["error"].is_null())
    candidates = buffer.candidates(trajectories(found), good)
    snapshot = buffer.select(snapshot, candidates, set(), run_id=run, iteration=iteration, rule=buffer_rule(0.5))
    update = {
        "run_id": run,
        "iteration": iteration,
        "trajectory_id": found[0]["trajectory_id"],
        "role": "fresh",
        "optimizer_step": 0,
    }
    judged = {"run_id": run, "iteration": iteration, "trajectory_id": found[0]["trajectory_id"], "old_logprob": [-1.0]}
    evaluated = {"run_id": run, "iteration": iteration, "reward": "taste", "version": "1", "value": 0.5}
    tables = {
        "buffers": snapshot,
        "plans": plan(trajectories(found), good, plan_rule(), iteration=iteration),
        "densities": table_of([judged], DENSITIES),
        "updates": table_of([update | {"advantage": 0.5, "loss": -0.25, "importance_weight": 1.0, "age": 0}], UPDATES),
    }
    for kind, table in tables.items():
        assert store.publish_table(f"{iteration_folder(kind, run, iteration)}.parquet", table)
    store.publish_table(f"{iteration_folder('evals', run, iteration)}/taste.v1.parquet", table_of([evaluated], EVALS))
    return snapshot


def rows_of(store: Store | Catalog, view: str, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """All rows of a view, sorted, NaN as text so that it equals itself."""
    catalog = Catalog(store) if isinstance(store, Store) else store
    rows = catalog.query(f"FROM {view}").to_pylist()
    found = [{key: plain(value) for key, value in row.items() if key not in without} for row in rows]
    return sorted(found, key=lambda row: json.dumps(row, sort_keys=True, default=str))


def plain(value: Any) -> Any:
    """NaN as text."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return "NaN" if isinstance(value, float) and value != value else value


def contents(store: Store) -> dict[str, tuple[bytes, bytes]]:
    """trajectory_id to the bytes of its latents and of its media, verified, found by where its index row says."""
    told = {}
    for row in Catalog(store).query("FROM trajectories").to_pylist():
        location = LatentLocation.of(row)
        latents = read_latents(store.directory, location, 0, len(location.checksums) - 1)
        told[row["trajectory_id"]] = (latents.tobytes(), read_media(store.directory, row))
    return told


def same(ours: Store, theirs: Store, views: Mapping[str, Collection[str]]) -> None:
    """Assert that views hold the same rows, some columns aside."""
    mine, other = Catalog(ours), Catalog(theirs)
    for view, without in views.items():
        assert rows_of(mine, view, without) == rows_of(other, view, without), view


def damage(store: Store, name: str, part: str = "latents") -> None:
    """Flip a byte of the latents or media of a trajectory."""
    [row] = Catalog(store).query(f"FROM trajectories WHERE trajectory_id = '{name}'").to_pylist()
    path = Path(store.directory.root, row[f"{part}_file"])
    data = bytearray(path.read_bytes())
    data[row[f"{part}_offset"] + row[f"{part}_length"] - 1] ^= 0xFF
    path.write_bytes(data)


def quarantined(store: Store, name: str) -> None:
    """Put a trajectory in quarantine."""
    store.quarantine(name, CorruptionError("x.tar", f"{name}.latents.npy latent 0", 5, None))
