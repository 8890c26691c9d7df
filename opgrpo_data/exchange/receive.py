"""The receiving side of every import: which trajectories are there already, and where new ones and their rewards go."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opgrpo_data import ids
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import StoreError
from opgrpo_data.io import checked_name
from opgrpo_data.schema import LOCATION, REWARDS, table_of
from opgrpo_data.store import Store, index_of

CONTENT = ("latents_crc32", "latent_shape", "latent_dtype", "media_crc32")
NAMED = 5
"""Ids that an error lists."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Held:
    """A trajectory that is there. index: path of its shard's index. row: its LOCATION columns and the checksum of its media."""

    index: str
    row: Row

    def same_as(self, row: Row) -> bool:
        """Whether a row tells of the same bytes."""
        return all(self.row[name] == row[name] for name in CONTENT)


def held(catalog: Catalog, names: Iterable[str]) -> dict[str, Held]:
    """Those of the trajectories that a store has."""
    columns = ", ".join(("trajectory_id", *LOCATION.names, "media_crc32"))
    return {
        row["trajectory_id"]: Held(index_of(row["latents_file"]), row)
        for row in _where(catalog, "trajectories", columns, names)
    }


def notes(catalog: Catalog, prompt_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What stands beside the media of a prompt's trajectories, by prompt_id."""
    known = _where(catalog, "prompts", "prompt_id, text, metadata", prompt_ids)
    return {row["prompt_id"]: {"prompt": row["text"], "metadata": json.loads(row["metadata"])} for row in known}


def _where(catalog: Catalog, view: str, columns: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a view by its id column, the first of `columns`."""
    wanted = ", ".join(f"'{checked_name(name, 'id')}'" for name in names)
    if not wanted:
        return []
    key = columns.partition(",")[0]
    rows: list[dict[str, Any]] = catalog.query(f"SELECT {columns} FROM {view} WHERE {key} IN ({wanted})").to_pylist()  # noqa: S608 checked
    return rows


def refuse(conflicts: Sequence[str], store: Store, source: str, done: str) -> None:
    """Raise StoreError if there are trajectories of one id with different bytes."""
    if conflicts:
        listed = ", ".join(conflicts[:NAMED]) + (", ..." if len(conflicts) > NAMED else "")
        raise StoreError(
            f"{len(conflicts)} trajectories of {source} are in {store.directory.url} with other bytes: {listed}. {done}: keep "
            f"the two in stores of their own, or give one of the runs another name and draw it again"
        )


def add_prompts(store: Store, catalog: Catalog, prompts: Iterable[Row]) -> int:
    """Add the rows of PROMPTS that the store, as the catalog shows it, lacks; returns how many."""
    given = {(row["prompt_id"], row["split"]): row for row in prompts}
    there = _where(catalog, "prompts", "prompt_id, split", {prompt_id for prompt_id, _ in given})
    known = {(row["prompt_id"], row["split"]) for row in there}
    new = [row for key, row in given.items() if key not in known]
    for split in sorted({row["split"] for row in new}):
        rows = [{"text": row["text"], "metadata": json.loads(row["metadata"])} for row in new if row["split"] == split]
        store.add_prompts(rows, split)
    return len(new)


def add_rewards(store: Store, homes: Mapping[str, str], rewards: Iterable[Row]) -> int:
    """Add the rows of REWARDS that the store lacks beside the shards that hold their trajectories; returns how many.

    homes: trajectory_id to its shard's index; rows of other trajectories are passed over. A value that is there stays; an
    error gives way to a value.
    """
    sorted_out: dict[tuple[str, str, str], list[Row]] = {}
    for row in rewards:
        if row["trajectory_id"] in homes:
            key = (homes[row["trajectory_id"]], row["reward"], row["version"])
            sorted_out.setdefault(key, []).append(row)
    return sum(_add_to_shard(store, *key, rows) for key, rows in sorted_out.items())


def _add_to_shard(store: Store, index: str, reward: str, version: str, rows: Sequence[Row]) -> int:
    shard = index.removeprefix("trajectories/").removesuffix(".parquet")
    stem = f"rewards/reward={checked_name(reward, 'reward')}/{shard}.v{checked_name(version, 'version')}."
    while True:
        there = store.directory.list(f"{stem}*.parquet")
        numbers = [path.removeprefix(stem).removesuffix(".parquet") for path in there]
        mine = [path for path, number in zip(there, numbers, strict=True) if number.isdecimal()]
        known = {(row["trajectory_id"], row["error"] is None) for row in store.read_tables("rewards", mine).to_pylist()}
        judged = {name for name, has_value in known if has_value}
        new = {
            (row["trajectory_id"], row["error"] is None): row
            for row in rows
            if row["trajectory_id"] not in judged and (row["trajectory_id"], row["error"] is None) not in known
        }
        if not new:
            return 0
        attempt = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
        if store.publish_table(f"{stem}{attempt:03d}.parquet", table_of([dict(row) for row in new.values()], REWARDS)):
            return len(new)


def shard_name(names: Sequence[str], prefix: str) -> str:
    """The name of a shard that exactly these trajectories make: done twice, it is done once."""
    return f"{prefix}-{ids.derived_seed(*names):016x}"
