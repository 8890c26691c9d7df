"""Single flipped bits and cut ends, in every kind of file: `verify` finds each, and no reader hands out changed data."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.content import STEPS, add_everything, damages
from benchmarks.faults.tally import Tally, chances
from opgrpo_data import tensors
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError
from opgrpo_data.locations import Locations, Spans
from opgrpo_data.reading import read_many, read_media
from opgrpo_data.store import MARKER, TABLES, Store, index_of
from opgrpo_data.upkeep.verify import verify

BLOCK = tarfile.BLOCKSIZE
FOUND = "a deep verify names the damaged file, and a reader gets an error or what was written"

Read = Callable[[], Any]
VIEWS = {"buffers": "buffer"}
"""Views whose names are not those of their tables."""


def kind_of(path: str) -> str:
    """What a file is, for counting."""
    if path.endswith(".tar"):
        return f"{path.split('.')[-2]} tar"
    if path.endswith(".parquet"):
        return f"{path.split('/')[0]} index" if path.startswith("trajectories/") else f"{path.split('/')[0]} table"
    return {"json": "JSON document", "safetensors": "tensors"}[path.rpartition(".")[2]]


def readers(store: Store) -> dict[str, list[Read]]:
    """Per file how it is read. Rows of indexes are read now: only one file at a time is damaged."""
    found: dict[str, list[Read]] = {}
    for entry in store.directory.entries():
        path = entry.path
        kind = path.split("/")[0]
        if path.endswith(".tar"):
            table = store.read_tables("trajectories", [index_of(path)])
            found[path] = [partial(_latents if path.endswith(".latents.tar") else _media, store, table)]
        elif path.endswith(".safetensors"):
            found[path] = [partial(_tensors, store, path)]
        elif path == MARKER:
            found[path] = [partial(_marker, store)]
        elif kind in TABLES:
            found[path] = [partial(store.read_tables, kind, [path]), partial(_sql, store, VIEWS.get(kind, kind))]
        else:
            found[path] = [partial(_documents, store, path)]
    return found


def _latents(store: Store, table: Any) -> list[Any]:
    whole = np.full(len(table), STEPS)
    read = read_many(store.directory, Spans.of(Locations.of(table), 0 * whole, whole))
    return [latents if isinstance(latents, CorruptionError) else latents.tobytes() for latents in read]


def _media(store: Store, table: Any) -> list[Any]:
    return [_or_error(partial(read_media, store.directory, row)) for row in table.to_pylist()]


def _or_error(read: Read) -> Any:
    try:
        return read()
    except CorruptionError as error:
        return error


def _tensors(store: Store, path: str) -> Any:
    header = tensors.read_header(store.directory, path)
    tensors.check_bytes(store.directory, path, header)
    return {name: store.directory.read_range(path, it.first, it.last - it.first) for name, it in header.tensors.items()}


def _marker(store: Store) -> str:
    return Store.open(store.directory.url).version


def _documents(store: Store, path: str) -> list[Any]:
    return list(store.documents(path))


def _sql(store: Store, view: str) -> Any:
    return Catalog(store).query(f"SELECT * FROM {view} ORDER BY ALL")  # noqa: S608


@cache
def _patient(folder: Path) -> Patient:
    """One for all trials in this folder: each leaves it as it was."""
    return Patient(folder)


class Patient:
    """A store that has a file of every kind, to be damaged and mended. problems: what of FOUND does not hold."""

    def __init__(self, folder: Path) -> None:
        self.store = add_everything(str(folder))
        self.readers = readers(self.store)
        self.sound = {path: [read() for read in reads] for path, reads in self.readers.items()}
        if found := damages(self.store):
            raise AssertionError(f"damaged before it was damaged: {found[0]}")

    def problems(self, path: str, damaged: bytes) -> list[str]:
        """Put damaged bytes into a file, look, put the right ones back."""
        file = Path(self.store.directory.path(path))
        right = file.read_bytes()
        file.write_bytes(damaged)
        try:
            return [*self._unseen(path), *self._handed_out(path)]
        finally:
            file.write_bytes(right)

    def _unseen(self, path: str) -> Iterator[str]:
        try:
            findings = verify(self.store, deep=True).findings
        except (ValueError, OSError) as error:
            if path not in str(error) and path != MARKER:
                yield f"verify ended with {error}, which does not name {path}"
            return
        if not any(path in (finding.path, finding.problem) or path in finding.problem for finding in findings):
            yield f"verify does not name it; it found {findings}"

    def _handed_out(self, path: str) -> Iterator[str]:
        for reader, sound in zip(self.readers[path], self.sound[path], strict=True):
            try:
                read = reader()
            except (ValueError, OSError):
                continue
            if path.endswith(".tar"):
                read = [was if isinstance(got, CorruptionError) else got for got, was in zip(read, sound, strict=True)]
            if read != sound:
                yield f"a reader got {str(read)[:200]} instead of {str(sound)[:200]}"


def flip_bits(work: Path, count: int, seed: int) -> Tally:
    """Flip `count` single bits, as many in each kind of file."""
    tally = Tally(seed, f"one bit flipped at a random place: {FOUND}")
    patient = _patient(work / "store")
    kinds: dict[str, list[str]] = {}
    for path in sorted(patient.readers):
        kinds.setdefault(kind_of(path), []).append(path)
    rng = chances(seed)
    for number in range(count):
        kind = sorted(kinds)[number % len(kinds)]
        path = rng.choice(kinds[kind])
        data = bytearray(patient.store.directory.read(path))
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        tally.count(kind, patient.problems(path, bytes(data)), f"{path} byte {place} bit {bit}")
    return tally


def truncate(work: Path, count: int, seed: int, kinds: Collection[str] = ()) -> Tally:
    """Cut files at every kind of place, of these kinds of files or of all; and at `count` random places."""
    tally = Tally(seed, f"cut at every kind of place and at random ones: {FOUND}")
    patient = _patient(work / "store")
    rng = chances(seed)
    for kind, path in {kind_of(path): path for path in sorted(patient.readers)}.items():
        if kinds and kind not in kinds:
            continue
        data = patient.store.directory.read(path)
        for place, length in sorted(_places(patient.store, path, data).items()):
            tally.count(place, patient.problems(path, data[:length]), f"{path} at {length}")
    for _ in range(count):
        path = rng.choice(sorted(patient.readers))
        data = patient.store.directory.read(path)
        length = rng.randrange(len(data))
        tally.count("anywhere", patient.problems(path, data[:length]), f"{path} at {length}")
    return tally


def _places(store: Store, path: str, data: bytes) -> dict[str, int]:
    """Names of places to cut a file at, and their bytes."""
    size = len(data)
    places = {"0 bytes": 0, "1 byte": 1, "the last byte": size - 1, "the middle": size // 2}
    if path.endswith(".tar"):
        rows = store.read_tables("trajectories", [index_of(path)]).to_pylist()
        kind = path.split(".")[-2]
        begin, length = rows[1][f"{kind}_offset"], rows[1][f"{kind}_length"]
        padded = -(-(begin + length) // BLOCK) * BLOCK
        last = -(-(rows[-1][f"{kind}_offset"] + rows[-1][f"{kind}_length"]) // BLOCK) * BLOCK
        places |= {"in a header": begin - 100, "after a header": begin, "in a payload": begin + length // 2}
        places |= {
            "after a payload": begin + length,
            "in the padding": min(begin + length + 7, padded),
            "after the padding": padded,
        }
        places |= {"before the end blocks": last, "in the end blocks": last + BLOCK, "after the end blocks": last + 2 * BLOCK}
        if kind == "latents":
            header = rows[1]["latents_header"]
            places |= {"in an npy header": begin + 20, "after an npy header": begin + header}
            places |= {"between two latents": begin + header + (length - header) // (STEPS + 1)}
        return {name: place for name, place in places.items() if place < size}
    if path.endswith(".parquet"):
        footer = struct.unpack("<I", data[-8:-4])[0]
        places |= {"in a page": 50, "before the footer": size - 8 - footer, "in the footer": size - 8 - footer // 2}
        return places | {"before the footer's length": size - 8, "before the last magic": size - 4, "the first magic": 4}
    if path.endswith(".safetensors"):
        header = struct.unpack("<Q", data[:8])[0]
        return places | {
            "in the length": 4,
            "before the header": 8,
            "in the header": 8 + header // 2,
            "before data": 8 + header,
        }
    return places
