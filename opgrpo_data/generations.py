"""Generations: merged copies of index files, so that a store of thousands of shards is read as one Parquet file.

    catalog/<kind>/gen-<n>.<attempt>.parquet   the rows of many index files of one kind, file behind file
    catalog/<kind>/gen-<n>.json                names it, its checksums, and each index file with its count of rows: the commit

A generation is a copy for speed alone. It is in force when it is whole and all index files that it holds are still there;
where it is not, readers say so and read an older one, or the index files. Whole means: its JSON is as it was sealed, and the
Parquet file has the size and the footer that the JSON tells. That costs one small read. Pages have checksums of their own,
which are verified when they are read; `faults(deep=True)` reads everything.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from opgrpo_data.checksum import crc32
from opgrpo_data.io import Directory
from opgrpo_data.seal import read_json
from opgrpo_data.store import Store

COMPACTED = ("trajectories", "rewards", "buffers", "plans", "densities", "updates", "evals")
"""Kinds that have generations. Not quarantine and dropped: their files may be taken back. Not prompts: they are few."""

PARQUET = re.compile(r"gen-(\d{6})\.[0-9a-f]{8}\.parquet")
DOCUMENT = re.compile(r"gen-(\d{6})\.json")
TAIL_BYTES = 8  # length of the footer, and the magic
FOOTER_BYTES = 256 * 1024 * 1024
"""The longest footer that is read: what an index says of itself is not trusted with the machine's memory."""

CHUNK_BYTES = 8 * 1024 * 1024
FIELDS = ("parquet", "rows", "bytes", "crc32", "footer_bytes", "footer_crc32", "files")
"""Keys of the JSON."""


@dataclass(frozen=True)
class Generation:
    """What the JSON of a generation says. files: index file to count of rows, in the order of the rows."""

    path: str
    parquet: str
    rows: int
    bytes: int
    crc32: str
    footer_bytes: int
    footer_crc32: str
    files: Mapping[str, int]

    @property
    def number(self) -> int:
        """n, from 1."""
        return number_of(self.path)


def number_of(path: str) -> int:
    """n of a file of a generation, 0 of any other."""
    name = path.rpartition("/")[2]
    match = DOCUMENT.fullmatch(name) or PARQUET.fullmatch(name)
    return int(match[1]) if match else 0


def documents(store: Store, kind: str) -> list[str]:
    """The JSON files of a kind's generations, oldest first."""
    return [path for path in store.directory.list(f"catalog/{kind}/gen-*.json") if number_of(path)]


def in_force(store: Store, kind: str) -> tuple[Generation | None, list[str]]:
    """The newest generation that holds, if there is one, and the kind's index files, all of them, sorted.

    Warns of every newer generation that does not hold.
    """
    paths = documents(store, kind) if kind in COMPACTED else []
    files = store.files(kind)  # after the generations: what they hold was committed before them
    present = set(files)
    for path in reversed(paths):
        try:
            generation = read_generation(store.directory, path)
            check_footer(store.directory, generation)
            if gone := [file for file in generation.files if file not in present]:
                kept = "unless they were meant to go, restore them from a copy"
                raise ValueError(f"it holds {len(gone)} index files that are gone, for example {gone[0]}: {kept}")
        except (ValueError, FileNotFoundError) as error:
            warn(path, error)
            continue
        return generation, files
    return None, files


def warn(path: str, error: Exception) -> None:
    """Tell that a generation is passed over."""
    instead = "what it holds is read from the index files; `opgrpo compact` makes another"
    warnings.warn(f"{path} is passed over ({error}): {instead}", stacklevel=3)


def faults(store: Store, *, deep: bool) -> Iterator[tuple[str, str]]:
    """(path, problem) of every generation that is damaged and that a reader could take: none older than a sound one in force.

    deep: reads all their bytes.
    """
    for kind in COMPACTED:
        paths = documents(store, kind)
        present = set(store.files(kind)) if paths else set()
        for path in reversed(paths):
            try:
                generation = read_generation(store.directory, path)
                check_footer(store.directory, generation)
                if deep:
                    check_bytes(store.directory, generation)
            except (ValueError, FileNotFoundError) as error:
                yield path, str(error)
                continue
            if generation.files.keys() <= present:
                break


def read_footer(directory: Directory, path: str, size: int) -> bytes:
    """The footer of a Parquet file of `size` bytes: its metadata, their length and the magic."""
    tail = directory.read_range(path, size - TAIL_BYTES, TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little") + TAIL_BYTES
    return directory.read_range(path, size - length, length)


def read_generation(directory: Directory, path: str) -> Generation:
    """A generation from its JSON. Raises ValueError when that is damaged, or FileNotFoundError."""
    document = read_json(directory.read(path))
    try:
        generation = Generation(path, **{name: document[name] for name in FIELDS})
        counts = (generation.rows, generation.bytes, generation.footer_bytes, *generation.files.values())
        sound = (
            generation.parquet.rpartition("/")[0] == path.rpartition("/")[0]
            and number_of(generation.parquet) == generation.number
            and all(type(count) is int and count >= 0 for count in counts)
            and sum(generation.files.values()) == generation.rows
            and TAIL_BYTES < generation.footer_bytes <= min(generation.bytes, FOOTER_BYTES)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it describes no generation ({error!r})") from error
    if not sound:
        raise ValueError("it contradicts itself")
    return generation


def check_footer(directory: Directory, generation: Generation) -> None:
    """Raise ValueError when the Parquet file has not the size and the footer that the JSON tells, or FileNotFoundError."""
    start = generation.bytes - generation.footer_bytes
    footer = directory.read_range(generation.parquet, start, generation.footer_bytes + 1)  # one more: it must end there
    if len(footer) != generation.footer_bytes or f"{crc32(footer):08x}" != generation.footer_crc32:
        raise ValueError(f"{generation.parquet} has another size or footer than it was written with")


def check_bytes(directory: Directory, generation: Generation) -> None:
    """Read the whole Parquet file; raise ValueError when its checksum is not the one that the JSON tells."""
    crc = 0
    for start in range(0, generation.bytes, CHUNK_BYTES):
        length = min(CHUNK_BYTES, generation.bytes - start)
        crc = crc32(directory.read_range(generation.parquet, start, length), crc)
    if (found := f"{crc:08x}") != generation.crc32:
        raise ValueError(f"{generation.parquet}: expected crc32 {generation.crc32}, found {found}")
