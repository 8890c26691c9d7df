"""Reading trajectories: their latents and media, by offset out of the tars of a shard, every byte verified by checksum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opgrpo_data.checksum import crc32, joined_crc32
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import NUMPY_DTYPES, LatentLocation, Locations, Spans, check_file

PAGE = 4096

THREADS = 2
PART_BYTES = 2**20
LARGE_BYTES = 128 * 2**10
"""Where trajectories are of LARGE_BYTES on average, or more, THREADS read and verify parts of PART_BYTES, which the cache of a
processor holds. Smaller ones are read by one thread, and all together: several would fight for the interpreter."""

MANY = 8
"""Trajectories that are read together, from so many on, are judged together, and one by one only where that finds damage."""

LARGEST_MEDIA = 2**34
"""Bytes. An index that claims more was damaged."""

Read = NDArray[Any] | CorruptionError


def memory(size: int) -> NDArray[np.uint8]:
    """`size` bytes, not set, that begin at a page as pinning needs it. Raises StoreError when there is no such memory."""
    try:
        room = np.empty(size + PAGE, np.uint8)
    except MemoryError as error:
        raise StoreError(f"{size} bytes of latents do not fit into memory: make the batches smaller") from error
    begin = -room.ctypes.data % PAGE
    return room[begin : begin + size]


def read_many(directory: Directory, spans: Spans, into: NDArray[np.uint8] | None = None, threads: int = THREADS) -> list[Read]:
    """Per trajectory its latents, (last - first + 1, *latent_shape) in the storage dtype; or how its bytes are damaged.

    Reads and verifies only the bytes asked for: a prefix costs a prefix. The arrays are views of `into`, at least
    `spans.total` bytes, or of one new array where there is none; nothing else grows with the bytes that are read.
    """
    data = memoryview(memory(spans.total) if into is None else into)  # type: ignore[arg-type]
    at, ranges = spans.locations, spans.ranges()
    kinds = [(NUMPY_DTYPES[dtype], (-1, *shape)) for dtype, shape in at.kinds]
    columns = (spans.begin, spans.length, at.size, at.checksum_at + spans.first)
    rows = list(zip(*(column.tolist() for column in columns), map(kinds.__getitem__, at.kind.tolist()), strict=True))

    def read(part: range) -> list[Read]:
        begin, end = rows[part.start][0], rows[part.stop - 1][0] + rows[part.stop - 1][1]
        found = directory.read_ranges(ranges[part.start : part.stop], data[begin:end])
        whole = len(part) >= MANY and _whole(spans[part.start : part.stop], data[begin:end], found)
        judged: list[Read] = []
        for i, got in zip(part, found, strict=True):
            place, length, size, checksum_at, (dtype, shape) = rows[i]
            mine = data[place : place + length]
            expected = [] if whole else at.checksums[checksum_at : checksum_at + length // size].tolist()
            if expected and (damage := _damage(mine, size, expected, got)):
                judged.append(_error(directory, spans, i, expected, *damage, nothing=got == 0))
            else:
                judged.append(np.frombuffer(mine, dtype).reshape(shape))
        return judged

    parts = _parts(spans) if directory.local else [range(len(spans))]  # elsewhere the requests of one call run side by side
    parts = parts if rows else []
    found: list[list[Read]] = [[] for _ in parts]
    waiting = iter(enumerate(parts))

    def work() -> None:
        for number, part in waiting:
            found[number] = read(part)

    with ThreadPoolExecutor(threads, "opgrpo-read") as pool:
        others = [pool.submit(work) for _ in parts[1:threads]]
        work()
        for other in others:
            other.result()
    return [it for judged in found for it in judged]


def _parts(spans: Spans) -> list[range]:
    """Rows that are read and verified together, one part in each thread."""
    if spans.total < len(spans) * LARGE_BYTES:
        return [range(len(spans))]
    cuts = np.flatnonzero(np.diff(spans.begin // PART_BYTES)) + 1
    return [range(begin, end) for begin, end in pairwise([0, *cuts.tolist(), len(spans)])]


def _whole(spans: Spans, data: memoryview, found: Sequence[int]) -> bool:
    """Whether all bytes are those that were written: one checksum of them, against the one that those of the latents add up to.

    One by one, small latents would take longer to judge than to read. False where it cannot say: latents differ in size.
    """
    size = int(spans.locations.size[0])
    if (spans.locations.size != size).any() or list(found) != spans.length.tolist():
        return False
    return bool(crc32(data) == joined_crc32(spans.checksums(), size))


def _damage(data: memoryview, size: int, expected: list[int], got: int) -> tuple[int, int | None] | None:
    """The first latent that is not what was written, and its checksum; None in its place where the file ends before."""
    found: list[int | None] = [crc32(data[end - size : end]) for end in range(size, min(got, len(data)) + 1, size)]
    if found == expected:
        return None
    found += [None] * (len(expected) - len(found))
    return next((k, it) for k, it in enumerate(found) if it != expected[k])


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
    """The encoded media of one `trajectories` row.

    Raises CorruptionError when its bytes are not those written, and StoreError when the row contradicts itself.
    """
    file, offset, length, expected = (row[f"media_{name}"] for name in ("file", "offset", "length", "crc32"))
    if None in (file, offset, length, expected) or not (0 <= length <= LARGEST_MEDIA and 0 <= offset <= 2**62):
        raise StoreError(
            f"{file}: the index row of {row['trajectory_id']} contradicts itself: its media would be {length} bytes at offset "
            f"{offset}, with crc32 {expected}"
        )
    check_file(file)
    member = f"{row['trajectory_id']}.{row['media_format']}"
    try:
        data = directory.read_range(file, offset, length)
    except FileNotFoundError as error:
        raise CorruptionError(file, member, expected, None, missing=True) from error
    if len(data) != length:
        raise CorruptionError(file, member, expected, None)
    if (found := crc32(data)) != expected:
        raise CorruptionError(file, member, expected, found)
    return data
