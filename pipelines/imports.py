"""Import a replay buffer: trajectories of other experiments become usable here (docs/maths.md, section 3).

Same model, sampler, sigma grid and reward; other prompts than ours are left out. How far the importing policy trusts them
is then measured like for any entry, by their path variance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from opgrpo_data import buffer
from opgrpo_data.errors import StoreError
from opgrpo_data.schema import BUFFERS, TRAJECTORIES
from opgrpo_data.shards import LatentLocation, Record, read_latents, read_media, write_shard
from opgrpo_data.store import Store, iteration_folder
from pipelines.config import RunConfig
from pipelines.prompts import Prompt

BEFORE = 0
"""Imported tables lie in iteration 0 of a folder of their own."""


def import_buffer(store: Store, config: RunConfig, prompts: Sequence[Prompt]) -> str:
    """Copy the last buffers of another store's runs that fit `config` into `store`; returns the path of the new buffer.

    Trajectories are copied with their densities, seeds and lineage, each checked against its checksums. Where the other
    store is this one, nothing is copied. Raises StoreError when no entry fits, saying why.
    """
    url = str(config.replay.import_buffer)
    source = Store.open(url)
    folder = f"{config.run_id}-imported"
    path = f"{iteration_folder('buffers', folder, BEFORE)}.parquet"
    if store.directory.exists(path):
        return path
    found = _fitting(source, config, {prompt.prompt_id for prompt in prompts})
    chosen = buffer.select(
        BUFFERS.empty_table(), found, source.quarantined(), run_id=config.run_id, iteration=-1, rule=config.buffer_rule
    )
    if not source.directory.same_as(store.directory):
        chosen = _copied(source, store, chosen, iteration_folder("trajectories", folder, BEFORE))
    store.publish_table(path, chosen)
    return path


def _fitting(source: Store, config: RunConfig, prompt_ids: set[str]) -> pa.Table:
    """Entries of the last buffer of every run that was trained on the same model and reward, by the same sampler.

    Their ages go on: an entry that was 5 iterations old is born at iteration -6 here.
    """
    entries: list[dict[str, Any]] = []
    told = []
    for document in source.documents("runs/*.json"):
        if differences := _differences(document["config"], config):
            told.append(f"{document['run_id']} differs in {', '.join(differences)}")
            continue
        last = source.files("buffers", run=document["run_id"])[-1:]
        rows = [row for row in source.read_tables("buffers", last).to_pylist() if row["prompt_id"] in prompt_ids]
        told.append(f"{document['run_id']} has {len(rows)} entries for this run's prompts")
        entries += [row | {"born_iteration": -1 - row["age"]} for row in rows]
    if not entries:
        reasons = "; ".join(told) or "it has no runs"
        raise StoreError(f"replay.import_buffer: the store {source.directory.url} has no entry for this run: {reasons}")
    newest = {row["trajectory_id"]: row for row in entries}  # a run that imported from another shares entries with it
    return pa.Table.from_pylist(list(newest.values()), schema=BUFFERS)


def _differences(theirs: Mapping[str, Any], ours: RunConfig) -> list[str]:
    """The settings in which a run's trajectories or rewards are not comparable with ours."""
    mine = ours.model_dump(mode="json")
    compared = [("policy", "family"), ("policy", "model"), ("reward", "name"), ("reward", "options")]
    # A prefix rounded to another dtype is no longer the prefix that its densities were evaluated on.
    compared += [("rollout", name) for name in ("sampler", "num_steps", "noise_level", "storage_dtype")]
    found = [f"{section}.{name}" for section, name in compared if theirs[section][name] != mine[section][name]]
    guidance = [run["policy"]["options"].get("guidance_scale") for run in (theirs, mine)]
    return found + (["policy.options.guidance_scale"] if guidance[0] != guidance[1] else [])


def _copied(source: Store, store: Store, chosen: pa.Table, folder: str) -> pa.Table:
    """Copy the chosen trajectories as one shard, and return the entries as they lie here."""
    wanted = chosen["trajectory_id"].to_pylist()
    rows = {
        row["trajectory_id"]: row
        for row in source.read_tables("trajectories", source.files("trajectories")).to_pylist()
        if row["trajectory_id"] in set(wanted)
    }
    write_shard(store.directory, folder, "00000", _records(source, [rows[name] for name in wanted]))
    here = store.read_tables("trajectories", [f"{folder}/00000.parquet"]).to_pylist()
    places = {row["trajectory_id"]: {name: row[name] for name in BUFFERS.names if name in row} for row in here}
    kept = ("run_id", "iteration")
    moved = [row | places[row["trajectory_id"]] | {name: row[name] for name in kept} for row in chosen.to_pylist()]
    return pa.Table.from_pylist(moved, schema=BUFFERS)


def _records(source: Store, rows: Sequence[dict[str, Any]]) -> Iterator[Record]:
    for row in rows:
        location = LatentLocation.of(row)
        latents = read_latents(source.directory, location, 0, len(location.checksums) - 1)
        carried = {name: row[name] for name in TRAJECTORIES.names}
        note = {"imported_from": source.directory.url, "software": json.loads(row["software"])}
        yield Record(carried, latents, read_media(source.directory, row), row["media_format"], note)
