"""Import a replay buffer: trajectories of other experiments become usable here (docs/maths.md, section 3).

Same model, sampler, noise and reward; other prompts than ours are left out. How far the importing policy trusts them is then
measured like for any entry, by their path variance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from opgrpo_data import buffer, ids
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.schema import BUFFERS, REWARDS, TRAJECTORIES, table_of
from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import Store, iteration_folder
from pipelines.config import RunConfig
from pipelines.progress import Progress
from pipelines.prompts import Prompt
from pipelines.rewards.base import Reward

Rows = list[dict[str, Any]]
BEFORE = 0
"""Imported tables lie in iteration 0 of a folder of their own."""


def open_source(config: RunConfig) -> Store | None:
    """The store that `replay.import_buffer` names; None where nothing is imported. Raises StoreError when it is not there."""
    url = config.replay.import_buffer
    if url is None:
        return None
    try:
        return Store.open(url)
    except StoreError as error:
        raise StoreError(f"replay.import_buffer: there is no store to import from ({error})") from error


def import_buffer(
    source: Store, store: Store, config: RunConfig, base_id: str, reward: Reward, prompts: Sequence[Prompt], progress: Progress
) -> str:
    """Take over the last buffers of the source's runs that fit; returns the path of the new buffer in `store`.

    Trajectories that `store` lacks are copied with their densities, seeds, lineage and rewards, each checked against its
    checksums; a damaged one is left out with a warning. Raises StoreError when no entry fits, saying why.
    """
    path = f"{iteration_folder('buffers', f'{config.run_id}-imported', BEFORE)}.parquet"
    if store.directory.exists(path):
        return path
    fitting = _fitting(source, config, base_id, reward, {prompt.prompt_id for prompt in prompts})
    found = pa.Table.from_pylist(fitting, schema=BUFFERS)
    rule = config.buffer_rule
    chosen = buffer.select(
        BUFFERS.empty_table(), found, source.unusable(fitting), run_id=config.run_id, iteration=-1, rule=rule
    ).to_pylist()
    held = _held(store)
    if missing := [row["trajectory_id"] for row in chosen if row["trajectory_id"] not in held]:
        _copy(source, store, missing, reward, progress)
        held = _held(store)
    entries = [_at_home(row, held[row["trajectory_id"]]) for row in chosen if row["trajectory_id"] in held]
    if not entries:
        raise StoreError(f"replay.import_buffer: every entry of {source.directory.url} is damaged: see the warnings above")
    store.publish_table(path, pa.Table.from_pylist(entries, schema=BUFFERS))
    return path


def _fitting(source: Store, config: RunConfig, base_id: str, reward: Reward, prompt_ids: set[str]) -> Rows:
    """Entries of the last buffer of every run that began with the same model, by the same sampler, for the same reward.

    Their ages go on: an entry that was 5 iterations old is born at iteration -6 here.
    """
    entries: dict[str, dict[str, Any]] = {}  # a run that imported from another shares entries with it
    told = []
    for document in source.documents("runs/*.json"):
        if differences := _differences(document, config, base_id):
            told.append(f"{document['run_id']} differs in {', '.join(differences)}")
            continue
        last = source.files("buffers", run=document["run_id"])[-1:]
        scored = _scored(source, reward)
        rows = [row for row in source.read_tables("buffers", last).to_pylist() if row["prompt_id"] in prompt_ids]
        kept = [row for row in rows if row["trajectory_id"] in scored]
        told.append(f"{document['run_id']} has {len(rows)} entries for this run's prompts, {len(kept)} of them scored")
        entries |= {row["trajectory_id"]: row | {"born_iteration": -1 - row["age"]} for row in kept}
    if not entries:
        reasons = "; ".join(told) or "it has no runs"
        raise StoreError(f"replay.import_buffer: the store {source.directory.url} has no entry for this run: {reasons}")
    return list(entries.values())


def _differences(theirs: Mapping[str, Any], ours: RunConfig, base_id: str) -> list[str]:
    """The settings in which a run's trajectories or rewards are not comparable with ours."""
    config, mine = theirs["config"], ours.model_dump(mode="json")
    compared = [("reward", "name"), ("reward", "options")]
    # A prefix rounded to another dtype is no longer the prefix that its densities were evaluated on.
    compared += [("rollout", name) for name in ("sampler", "num_steps", "noise_level", "storage_dtype")]
    found = [f"{section}.{name}" for section, name in compared if config[section][name] != mine[section][name]]
    guidance = [run["policy"]["options"].get("guidance_scale") for run in (config, mine)]
    found += ["policy.options.guidance_scale"] if guidance[0] != guidance[1] else []
    return found + (["the model it began with"] if theirs["base_policy_id"] != base_id else [])


def _scored(source: Store, reward: Reward) -> dict[str, dict[str, Any]]:
    """Reward rows of the present version of a reward, by trajectory_id."""
    table = source.read_tables("rewards", source.files("rewards", reward=reward.name))
    return {row["trajectory_id"]: row for row in table.to_pylist() if row["version"] == reward.version and row["error"] is None}


def _held(store: Store) -> dict[str, dict[str, Any]]:
    """Index rows of every trajectory in a store."""
    return {row["trajectory_id"]: row for row in store.read_tables("trajectories", store.files("trajectories")).to_pylist()}


def _copy(source: Store, store: Store, wanted: Sequence[str], reward: Reward, progress: Progress) -> None:
    """Copy trajectories as one shard named by what it holds, and their rewards: done twice, it is done once."""
    shard = f"{ids.derived_seed(*wanted):016x}"
    rows, scored = _held(source), _scored(source, reward)
    folder = iteration_folder("trajectories", "imported", BEFORE)
    write_shard(store.directory, folder, shard, _records(source, [rows[name] for name in wanted], progress))
    path = f"rewards/reward={reward.name}/run=imported/iter={BEFORE:06d}/{shard}.v{reward.version}.000.parquet"
    store.publish_table(path, table_of([scored[name] for name in wanted], REWARDS))


def _records(source: Store, rows: Sequence[dict[str, Any]], progress: Progress) -> Iterator[Record]:
    for row in rows:
        location = LatentLocation.of(row)
        try:
            latents = read_latents(source.directory, location, 0, len(location.checksums) - 1)
            media = read_media(source.directory, row)
        except CorruptionError as error:
            progress.warn(f"{error}; not imported")
            continue
        carried = {name: row[name] for name in TRAJECTORIES.names}
        note = {"imported_from": source.directory.url, "software": json.loads(row["software"])}
        yield Record(carried, latents, media, row["media_format"], note)


def _at_home(entry: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """A buffer entry as the trajectory lies in this store: location and densities of its index row, the rest its own."""
    own = ("run_id", "iteration", "born_iteration", "reward", "decayed_reward", "age", "fresh_mean", "fresh_std")
    return {**{name: here[name] for name in BUFFERS.names if name in here}, **{name: entry[name] for name in own}}
