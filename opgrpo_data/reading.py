"""Reading trajectories: their latents and media, by offset out of the tars of a shard, every byte verified by checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opgrpo_data.checksum import crc32
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import NUMPY_DTYPES, LatentLocation, Locations, Spans

PAGE = 4096

THREADS = 4
PART_BYTES = 8 * 2**20
LARGE_BYTES = 128 * 2**10
"""Where trajectories are of LARGE_BYTES on average, or more, THREADS read and verify parts of PART_BYTES, which the cache of a
processor holds. Smaller ones are read by one thread, and all together: several would fight for the interpreter."""

Read = NDArray[Any] | CorruptionError


def memory(size: int) -> NDArray[np.uint8]:
    """`size` bytes, not set, that begin at a page as pinning needs it. Raises StoreError when there is no such memory."""
    try:
        room = np.empty(size + PAGE, np.uint8)
    except MemoryError as error:
        raise StoreError(f"{size} bytes of latents do not fit into memory: make the batches smaller") from error
    begin = -room.ctypes.data % PAGE
    return room[begin : begin + size]


def read_many(directory: Directory, spans: Spans, into: NDArray[np.uint8] | None = None) -> list[Read]:
    """Per trajectory its latents, (last - first + 1, *latent_shape) in the storage dtype; or how its bytes are damaged.

    Reads and verifies only the bytes asked for: a prefix costs a prefix. The arrays are views of `into`, at least
    `spans.total` bytes, or of one new array where there is none; nothing else grows with the bytes that are read.
    """
    data = memory(spans.total) if into is None else into
    parts = _parts(spans)
    if len(parts) == 1:
        return _read(directory, spans, data)
    with ThreadPoolExecutor(THREADS, "opgrpo-read") as pool:
        read = pool.map(lambda rows: _read(directory, spans[rows], data[spans.begin[rows.start] :]), parts)
        return [it for part in read for it in part]


def _parts(spans: Spans) -> list[slice]:
    """Rows that are read and verified together, one part in each thread."""
    if spans.total < len(spans) * LARGE_BYTES:
        return [slice(0, len(spans))]
    cuts = np.flatnonzero(np.diff(spans.begin // PART_BYTES)) + 1
    edges = [0, *cuts.tolist(), len(spans)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _read(directory: Directory, spans: Spans, into: NDArray[np.uint8]) -> list[Read]:
    data = memoryview(into)[: spans.total]  # type: ignore[arg-type]
    found = directory.read_ranges(spans.ranges(), data)
    at = spans.locations
    kinds = [(NUMPY_DTYPES[dtype], (-1, *shape)) for dtype, shape in at.kinds]
    columns = [column.tolist() for column in (spans.begin, spans.length, at.size, at.checksum_at + spans.first, at.kind)]
    read: list[Read] = []
    for i, (begin, length, size, checksum_at, kind, got) in enumerate(zip(*columns, found, strict=True)):
        expected = at.checksums[checksum_at : checksum_at + length // size].tolist()
        mine = data[begin : begin + length]
        if damage := _damage(mine, size, expected, got):
            read.append(_error(directory, spans, i, expected, *damage, nothing=got == 0))
        else:
            dtype, shape = kinds[kind]
            read.append(np.frombuffer(mine, dtype).reshape(shape))
    return read


def _damage(data: memoryview, size: int, expected: Sequence[int], got: int) -> tuple[int, int | None] | None:
    """The first latent that is not what was written, and its checksum; None in its place where the file ends before."""
    for k, checksum in enumerate(expected):
        end = (k + 1) * size
        if end > got:
            return k, None
        if (found := crc32(data[end - size : end])) != checksum:
            return k, found
    return None


def _error(
    directory: Directory, spans: Spans, row: int, expected: Sequence[int], k: int, found: int | None, *, nothing: bool
) -> CorruptionError:
    at = spans.locations
    file = at.files[at.file[row]]
    member = f"{at.ids[row]}.latents.npy latent {spans.first[row] + k}"
    return CorruptionError(file, member, expected[k], found, missing=nothing and not directory.exists(file))


def read_latents(directory: Directory, location: LatentLocation, first: int, last: int) -> NDArray[Any]:
    """Latents x_first .. x_last (both included) of one trajectory, as `read_many` gives them.

    Raises CorruptionError when they are damaged and IndexError when the trajectory has no such latents.
    """
    [read] = read_many(directory, Spans.of(Locations.single(location), np.array([first]), np.array([last])))
    if isinstance(read, CorruptionError):
        raise read
    return read


def read_media(directory: Directory, row: Mapping[str, Any]) -> bytes:
    """The encoded media of one `trajectories` row. Raises CorruptionError when its bytes are not those written."""
    file, length, expected = row["media_file"], row["media_length"], row["media_crc32"]
    member = f"{row['trajectory_id']}.{row['media_format']}"
    try:
        data = directory.read_range(file, row["media_offset"], length)
    except FileNotFoundError as error:
        raise CorruptionError(file, member, expected, None, missing=True) from error
    if len(data) != length:
        raise CorruptionError(file, member, expected, None)
    if (found := crc32(data)) != expected:
        raise CorruptionError(file, member, expected, found)
    return data
