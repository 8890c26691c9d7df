"""Where latents lie in the tars of a store: one trajectory as an object, many as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from opgrpo_data.errors import StoreError
from opgrpo_data.places.files import Range
from opgrpo_data.schema import LOCATION

# NumPy has no bfloat16: its bits travel as uint16, and `latent_dtype` says what they mean.
NUMPY_DTYPES: Mapping[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}

PLACED = pa.unify_schemas([pa.schema([("trajectory_id", pa.string())]), LOCATION])
"""What a table must have so that its trajectories can be read."""

LARGEST_LATENT = 2**40
"""Bytes. An index that claims more was damaged; below, 64-bit sums of places do not overflow."""

LONGEST_PATH = 1000
"""Characters of a file's path in a store."""

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class LatentLocation:
    """Where the latents of one trajectory lie, and what their bytes must add up to: the LOCATION columns of a row."""

    trajectory_id: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int
    length: int
    header: int
    checksums: tuple[int, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> LatentLocation:
        """From a row that has trajectory_id and the LOCATION columns. Raises StoreError when they contradict."""
        if missing := [name for name in LOCATION.names if row[name] is None]:
            raise StoreError(f"{row['latents_file']}: the index row of {row['trajectory_id']} has no {missing}")
        shape, dtype, file, offset, length, header, checksums = (row[name] for name in LOCATION.names)
        check_file(file)
        size = latent_bytes(dtype, shape)
        if not size or header + size * len(checksums) != length or min(offset, header) < 0 or offset > 2**62 - length:
            raise StoreError(
                f"{file}: the index row of {row['trajectory_id']} contradicts itself: {len(checksums)} latents of "
                f"{dtype} {shape} and a header of {header} bytes are not {length} bytes at offset {offset}"
            )
        return cls(str(row["trajectory_id"]), tuple(shape), dtype, file, offset, length, header, tuple(checksums))

    @property
    def latent_bytes(self) -> int:
        """Bytes of one latent."""
        return latent_bytes(self.dtype, self.shape)


def check_file(file: str) -> None:
    """Raise StoreError where an index row names what can be no file. What leads out of the store, Directory refuses."""
    if len(file) > LONGEST_PATH or "\0" in file or {"", "."} & set(file.removeprefix("/").split("/")):
        raise StoreError(f"an index row names the file {file[:200]!r}, which no shard can have: run `opgrpo verify`")


def latent_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of one latent; 0 where there can be no such latent."""
    if dtype not in NUMPY_DTYPES or min(shape, default=1) < 1:
        return 0
    size = math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
    return size if size <= LARGEST_LATENT else 0


@dataclass(frozen=True)
class Locations:
    """Where the latents of N trajectories lie: as LatentLocation says, but in arrays, so that no object is made of each.

    ids: (N,) strings. files, kinds: the distinct files and (dtype, shape); file, kind: (N,), which of them a row has.
    start: (N,), the byte of its file where x_0 begins. size: (N,), bytes of one latent. checksums: uint32, of all latents of
    all rows; those of row i begin at checksum_at[i], (N,), and are count[i] many, (N,).
    """

    ids: pa.Array
    files: list[str]
    file: Int64s
    kinds: list[tuple[str, tuple[int, ...]]]
    kind: Int64s
    start: Int64s
    size: Int64s
    checksums: NDArray[np.uint32]
    checksum_at: Int64s
    count: Int64s

    @classmethod
    def of(cls, table: pa.Table) -> Locations:
        """From a table that has trajectory_id and the LOCATION columns. Raises StoreError when those of a row contradict."""
        table = table.select(PLACED.names)
        for name in LOCATION.names:
            if table[name].null_count:
                _refuse(table, pc.is_null(table[name]).to_numpy())
        columns = {name: _array(table[name]) for name in table.column_names}
        shapes = pc.binary_join(columns["latent_shape"].cast(pa.list_(pa.string())), "x")
        kinds, kind = _distinct(pc.binary_join_element_wise(columns["latent_dtype"], shapes, ":"))
        files, file = _distinct(columns["latents_file"])
        for name in files:
            check_file(name)
        offset, length, header = (columns[f"latents_{name}"].to_numpy() for name in ("offset", "length", "header"))
        count = pc.list_value_length(columns["latents_crc32"]).to_numpy().astype(np.int64)
        parsed = [_kind(text) for text in kinds]
        size = np.array([latent_bytes(*it) for it in parsed], np.int64)[kind]
        wrong = (size == 0) | (header + size * count != length) | (np.minimum(offset, header) < 0) | (offset > 2**62 - length)
        if wrong.any():
            _refuse(table, wrong)
        return cls(
            ids=columns["trajectory_id"],
            files=files,
            file=file,
            kinds=parsed,
            kind=kind,
            start=offset + header,
            size=size,
            checksums=columns["latents_crc32"].flatten().to_numpy(),
            checksum_at=np.cumsum(count) - count,
            count=count,
        )

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Locations:
        """From rows that have trajectory_id and the LOCATION columns. Raises StoreError when those of a row contradict."""
        return cls.of(pa.Table.from_pylist(rows, schema=PLACED))

    @classmethod
    def single(cls, at: LatentLocation) -> Locations:
        """Of one trajectory."""
        zero = np.zeros(1, np.int64)
        return cls(
            ids=pa.array([at.trajectory_id]),
            files=[at.file],
            file=zero,
            kinds=[(at.dtype, at.shape)],
            kind=zero,
            start=zero + at.offset + at.header,
            size=zero + at.latent_bytes,
            checksums=np.array(at.checksums, np.uint32),
            checksum_at=zero,
            count=zero + len(at.checksums),
        )

    def __getitem__(self, rows: slice) -> Locations:
        """Some consecutive rows."""
        cut = {name: getattr(self, name)[rows] for name in ("ids", "file", "kind", "start", "size", "checksum_at", "count")}
        return Locations(files=self.files, kinds=self.kinds, checksums=self.checksums, **cut)


@dataclass(frozen=True)
class Spans:
    """Latents first .. last, both included, (N,), of N trajectories: what to read.

    length: (N,), bytes of each. begin: (N,), the place of each when they lie one behind the other.
    """

    locations: Locations
    first: Int64s
    last: Int64s
    length: Int64s
    begin: Int64s

    @classmethod
    def of(cls, locations: Locations, first: Int64s, last: Int64s) -> Spans:
        """first, last: (N,). Raises IndexError when a trajectory has no such latents."""
        wrong = (first < 0) | (first > last) | (last >= locations.count)
        if wrong.any():
            i = int(wrong.argmax())
            raise IndexError(f"latents {first[i]}..{last[i]} of {locations.ids[i]}: it has {locations.count[i]}")
        length = (last - first + 1) * locations.size
        return cls(locations, first, last, length, np.cumsum(length) - length)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: slice) -> Spans:
        """Some consecutive rows, as if there were no others."""
        return Spans.of(self.locations[rows], self.first[rows], self.last[rows])

    @property
    def total(self) -> int:
        """Bytes of all."""
        return int(self.length.sum())

    def checksums(self) -> NDArray[np.uint32]:
        """crc32 of each latent, one trajectory behind the other."""
        count = self.last - self.first + 1
        ends = np.cumsum(count)
        begins = self.locations.checksum_at + self.first - (ends - count)
        wanted: NDArray[np.uint32] = self.locations.checksums[np.repeat(begins, count) + np.arange(count.sum())]
        return wanted

    def ranges(self) -> list[Range]:
        """Where they lie, in order."""
        at = self.locations
        files = [at.files[which] for which in at.file.tolist()]
        starts = (at.start + self.first * at.size).tolist()
        return [Range(*it) for it in zip(files, starts, self.length.tolist(), strict=True)]


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _distinct(column: pa.Array) -> tuple[list[str], Int64s]:
    encoded = column.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _kind(text: str) -> tuple[str, tuple[int, ...]]:
    dtype, _, shape = text.rpartition(":")
    return dtype, tuple(int(size) for size in shape.split("x") if size)


def _refuse(table: pa.Table, wrong: NDArray[np.bool_]) -> NoReturn:
    """Raise what LatentLocation says of the first wrong row."""
    LatentLocation.of(table.slice(int(wrong.argmax()), 1).to_pylist()[0])
    raise AssertionError("Locations and LatentLocation judge a row differently")
