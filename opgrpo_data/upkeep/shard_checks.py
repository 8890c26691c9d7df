"""What `verify` looks at in one shard: the rows of its index, the sizes of its tars, and, deep, every byte of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa

from opgrpo_data import ids
from opgrpo_data.checksum import crc32
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import NUMPY_DTYPES, LatentLocation
from opgrpo_data.schema import LOCATION
from opgrpo_data.seal import check_seal, read_json
from opgrpo_data.store import index_of
from opgrpo_data.upkeep import tars
from opgrpo_data.upkeep.tars import BLOCK, Expected

Row = Mapping[str, Any]
PER_STEP = ("noise_seeds", "behaviour_logprob", "old_logprob", "transition_std")
DENSITIES = ("behaviour_logprob", "old_logprob", "transition_std", "path_variance", "sigmas")
MEDIA_COLUMNS = ("media_file", "media_format", "media_offset", "media_length", "media_crc32")
COLUMNS = ["trajectory_id", "prompt_id", "num_steps", *LOCATION.names, *MEDIA_COLUMNS]
DRAWN_NOTE = {"trajectory_id", "prompt", "metadata"}
IMPORTED_NOTE = {"trajectory_id", "imported_from", "software"}
NPY_MAGIC = b"\x93NUMPY\x01\x00"
UNREADABLE = (FileNotFoundError, IsADirectoryError, PermissionError)
"""A file that is gone, or none: what is wrong with the store, not with the place that it lies in."""


@dataclass(frozen=True)
class Damage:
    """Something wrong in a shard. errors: what it means for the trajectories whose latents or media it destroyed, by id."""

    path: str
    member: str | None
    problem: str
    errors: Mapping[str, CorruptionError] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A shard as its index describes it. sizes: bytes of the files of the store, by path. sealed: whether its index is."""

    directory: Directory
    index: str
    table: pa.Table
    sizes: Mapping[str, int]
    sealed: bool

    @cached_property
    def rows(self) -> list[tuple[Row, str | None]]:
        """What is looked at of each row, and what is wrong with it."""
        rows = self.table.select(COLUMNS).to_pylist()
        problems = _senseless(self.table)
        return [(row, _row_problem(self.index, row) or problem) for row, problem in zip(rows, problems, strict=True)]

    def check_rows(self) -> Iterator[Damage]:
        """Rows that contradict themselves, or their shard."""
        for row, problem in self.rows:
            if problem:
                yield Damage(self.index, str(row["trajectory_id"]), problem)

    def check_sizes(self) -> Iterator[Damage]:
        """Tars that are missing, or too short for their members."""
        for file, members in self._tars().items():
            size = self.sizes.get(file)
            lost = {name: _lost(file, row, kind, size) for name, row, kind in members if size is None or _end(row, kind) > size}
            end = max(-(-_end(row, kind) // BLOCK) * BLOCK for _, row, kind in members) + 2 * BLOCK
            if size is None:
                yield Damage(file, None, f"there is no such file; {len(lost)} trajectories lie in it", lost)
            elif size < end:
                yield Damage(file, None, f"it ends after {size} bytes, at least {end} were written", lost)

    def check_bytes(self) -> Iterator[Damage]:
        """Everything in the tars that is not as it was written; what lies beyond their ends `check_sizes` tells."""
        for file, members in self._tars().items():
            if file not in self.sizes:
                continue
            expected: list[Expected] = []
            owners: dict[str, str] = {}
            for name, row, kind in sorted(members, key=lambda member: int(member[1][f"{member[2]}_offset"])):
                found = _latents_members(row) if kind == "latents" else _media_members(row, self.sealed)
                owners |= {member.name: name for member in found}
                expected += found
            try:
                for fault in tars.faults(tars.Reader(self.directory, file), self.sizes[file], expected):
                    lost = {owners[str(fault.name)]: fault.error} if fault.error else {}
                    yield Damage(file, fault.name, fault.problem, lost)
            except UNREADABLE as error:
                yield Damage(file, None, f"it cannot be read: {error.strerror or error}")

    def files(self) -> list[str]:
        """Its tars."""
        return sorted(self._tars())

    def _tars(self) -> dict[str, list[tuple[str, Row, str]]]:
        """(trajectory_id, row, latents or media) of what lies in each tar, sound rows alone."""
        found: dict[str, list[tuple[str, Row, str]]] = {}
        for row, problem in self.rows:
            if problem is None:
                for kind in ("latents", "media"):
                    found.setdefault(row[f"{kind}_file"], []).append((row["trajectory_id"], row, kind))
        return found


def _row_problem(index: str, row: Row) -> str | None:
    if not row["trajectory_id"]:
        return "a row has no trajectory_id"
    try:
        location = LatentLocation.of(row)
    except StoreError as error:
        return str(error)
    if missing := [name for name in MEDIA_COLUMNS if row[name] is None]:
        return f"the row has no {missing}"
    if min(row["media_offset"], row["media_length"]) < 0 or min(location.shape, default=0) < 0:
        return "the row has negative sizes or offsets"
    if len(location.checksums) != (row["num_steps"] or 0) + 1:
        return f"the row has {len(location.checksums)} latents for {row['num_steps']} steps"
    if odd := [file for file in (location.file, row["media_file"]) if index_of(file) != index]:
        return f"the row's bytes would lie in {odd[0][:200]}, a file of another shard"
    return None


def _senseless(table: pa.Table) -> list[str | None]:
    """Per row what no sampler makes: lists of other lengths than its steps, densities and schedules that are no numbers."""
    steps, frame = pl.col("num_steps"), cast(pl.DataFrame, pl.from_arrow(table))
    rules = {f"{name} for each of its steps": pl.col(name).list.len() == steps for name in PER_STEP} | {
        "a sigma before and after each of its steps": pl.col("sigmas").list.len() == steps + 1,
        "sigmas that go down to 0": (pl.col("sigmas").list.diff().list.max() < 0) & (pl.col("sigmas").list.last() == 0),
        "a path_variance for each step of its prefix": pl.col("path_variance").list.len() == pl.col("prefix_steps"),
        "a prefix that is a part of it": pl.col("prefix_steps").is_between(0, steps),
    }
    rules |= {f"{name} that are numbers": pl.col(name).list.eval(pl.element().is_finite()).list.all() for name in DENSITIES}
    told = [pl.when(~rule).then(pl.lit(f"it does not have {what}")) for what, rule in rules.items()]  # null: not told
    problems: list[str | None] = frame.select(problem=pl.coalesce(told))["problem"].to_list()
    return problems


def _end(row: Row, kind: str) -> int:
    return int(row[f"{kind}_offset"]) + int(row[f"{kind}_length"])


def _lost(file: str, row: Row, kind: str, size: int | None) -> CorruptionError:
    if kind == "latents":
        member, expected = f"{row['trajectory_id']}.latents.npy", row["latents_crc32"][-1]
    else:
        member, expected = f"{row['trajectory_id']}.{row['media_format']}", row["media_crc32"]
    return CorruptionError(file, member, expected, None, missing=size is None)


def _latents_members(row: Row) -> list[Expected]:
    location = LatentLocation.of(row)
    check = partial(_check_latents, location)
    return [Expected(f"{location.trajectory_id}.latents.npy", location.offset, location.length, check)]


def _media_members(row: Row, sealed: bool) -> list[Expected]:
    name = row["trajectory_id"]
    media = f"{name}.{row['media_format']}"
    check = partial(_check_media, row["media_file"], media, row["media_crc32"])
    return [
        Expected(media, row["media_offset"], row["media_length"], check),
        Expected(f"{name}.json", None, None, partial(_check_note, row, sealed)),
    ]


def _check_latents(location: LatentLocation, data: bytes) -> CorruptionError | str | None:
    view, size = memoryview(data)[location.header :], location.latent_bytes
    for k, expected in enumerate(location.checksums):
        if (found := crc32(view[k * size : (k + 1) * size])) != expected:
            return CorruptionError(location.file, f"{location.trajectory_id}.latents.npy latent {k}", expected, found)
    descr = np.dtype(NUMPY_DTYPES[location.dtype]).str
    shape = (len(location.checksums), *location.shape)
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    told = location.header - len(NPY_MAGIC) - 2
    written = NPY_MAGIC + max(told, 0).to_bytes(2, "little") + header.ljust(told - 1) + b"\n"
    return None if data[: location.header] == written else f"its npy header is not that of {location.dtype} {shape}"


def _check_media(file: str, member: str, expected: int, data: bytes) -> CorruptionError | None:
    found = crc32(data)
    return None if found == expected else CorruptionError(file, member, expected, found)


def _check_note(row: Row, sealed: bool, data: bytes) -> str | None:
    """Notes of older shards have no seal: they must be written as those were, and their prompt must lead to the row's id.

    What the note of an imported trajectory says of where it came from is then not checked.
    """
    try:
        note = read_json(data)
    except ValueError as error:
        return f"it {error}"
    if note.get("trajectory_id") != row["trajectory_id"]:
        return f"it is the note of {note.get('trajectory_id')!r}"
    if check_seal(data):
        return None
    if sealed:
        return "it has no seal any more"
    if json.dumps(note, sort_keys=True).encode() != data:
        return "it is not as it was written"
    if note.keys() == IMPORTED_NOTE or (
        note.keys() == DRAWN_NOTE and ids.prompt_id(note["prompt"], note["metadata"]) == row["prompt_id"]
    ):
        return None
    return f"it does not tell the prompt {row['prompt_id']}"
