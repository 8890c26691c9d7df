"""One shard: two tars and the Parquet index that commits them. Written once, read by offset, verified by checksum.

    <shard>.<attempt>.latents.tar   <trajectory_id>.latents.npy: all T+1 latents of one trajectory, first step first
    <shard>.<attempt>.media.tar     <trajectory_id>.png | .webp | .mp4 and <trajectory_id>.json: what scorers and people read
    <shard>.parquet                 one row a trajectory: offsets into both tars and checksums. Written LAST: the commit

A shard without an index does not exist for any reader. The index names its tars, and every attempt at a shard writes tars
of its own: two writers of one shard can never mix their bytes, and whose index comes first wins.
"""

from __future__ import annotations

import io
import json
import secrets
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory, checked_name
from opgrpo_data.schema import LOCATION, TRAJECTORIES, table_of, to_parquet

TAR_BLOCK = 512

# NumPy has no bfloat16: its bits travel as uint16, and `latent_dtype` says what they mean.
NUMPY_DTYPES: Mapping[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True)
class Record:
    """One trajectory on its way into a shard.

    row: the columns of TRAJECTORIES that say what it is; the writer adds where it lies.
    latents: (T+1, *latent_shape) in the storage dtype, bfloat16 as its uint16 bits.
    media: the encoded sample, in `media_format` (a file extension without the dot).
    note: JSON kept beside the media, for people and for plain WebDataset readers.
    """

    row: Mapping[str, Any]
    latents: NDArray[Any]
    media: bytes
    media_format: str
    note: Mapping[str, Any]


class _Tar:
    """A WebDataset tar that tells at which byte each member's data begins."""

    def __init__(self, file: BinaryIO) -> None:
        # Imported here because webdataset imports torch, which readers of a store must not pay for.
        from webdataset.writer import TarWriter

        # A fixed mtime makes bytes reproducible; a float one would add a PAX header and move the data.
        self._writer = TarWriter(file, encoder=False, mtime=0)

    def add(self, key: str, extension: str, data: bytes) -> int:
        self._writer.write({"__key__": key, extension: data})
        padded = -(-len(data) // TAR_BLOCK) * TAR_BLOCK
        return int(self._writer.tarstream.offset) - padded

    def close(self) -> None:
        self._writer.close()


def write_shard(directory: Directory, folder: str, shard: str, records: Iterable[Record]) -> bool:
    """Write the tars of a shard, then publish its index. False if another attempt committed this shard first.

    Raises ValueError when a record does not fit the schema, or its latents are not what its row says. Until the index is
    published nothing is visible to readers.
    """
    checked_name(shard, "shard")
    attempt = secrets.token_hex(4)
    latents_file = f"{folder}/{shard}.{attempt}.latents.tar"
    media_file = f"{folder}/{shard}.{attempt}.media.tar"
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        # Each tar is closed before its file is: on an error too, else it would write to a closed file when collected.
        latents_tar = stack.enter_context(closing(_Tar(stack.enter_context(directory.write_atomic(latents_file)))))
        media_tar = stack.enter_context(closing(_Tar(stack.enter_context(directory.write_atomic(media_file)))))
        for record in records:
            key = _checked(record)
            rows.append(
                {**record.row, "shard": shard}
                | {"latents_file": latents_file, **_add_latents(latents_tar, key, record.latents)}
                | {"media_file": media_file, **_add_media(media_tar, key, record)}
            )
        index = table_of(rows, TRAJECTORIES)
    return directory.publish(f"{folder}/{shard}.parquet", to_parquet(index))


def _checked(record: Record) -> str:
    """The record's key in the tars. Raises ValueError where what would be committed could not be read back."""
    key = checked_name(str(record.row["trajectory_id"]), "trajectory_id")
    checked_name(record.media_format, "media_format")
    shape, dtype = tuple(record.row["latent_shape"]), record.row["latent_dtype"]
    found = record.latents
    if dtype not in NUMPY_DTYPES or found.dtype != NUMPY_DTYPES[dtype] or found.shape[1:] != shape:
        raise ValueError(f"trajectory {key}: its row says latents of {dtype} {shape}, it has {found.dtype} {found.shape[1:]}")
    return key


def _add_latents(tar: _Tar, key: str, latents: NDArray[Any]) -> dict[str, Any]:
    member = io.BytesIO()
    np.save(member, np.ascontiguousarray(latents), allow_pickle=False)
    data = member.getvalue()
    return {
        "latents_offset": tar.add(key, "latents.npy", data),
        "latents_length": len(data),
        "latents_header": len(data) - latents.nbytes,
        "latents_crc32": [zlib.crc32(latent.tobytes()) for latent in latents],
    }


def _add_media(tar: _Tar, key: str, record: Record) -> dict[str, Any]:
    offset = tar.add(key, record.media_format, record.media)
    tar.add(key, "json", json.dumps({**record.note, "trajectory_id": key}, sort_keys=True).encode())
    return {
        "media_format": record.media_format,
        "media_offset": offset,
        "media_length": len(record.media),
        "media_crc32": zlib.crc32(record.media),
    }


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
        location = cls(str(row["trajectory_id"]), tuple(shape), dtype, file, offset, length, header, tuple(checksums))
        if dtype not in NUMPY_DTYPES or header + location.latent_bytes * len(checksums) != length or min(offset, header) < 0:
            raise StoreError(
                f"{file}: the index row of {location.trajectory_id} contradicts itself: {len(checksums)} latents of "
                f"{dtype} {shape} and a header of {header} bytes are not {length} bytes at offset {offset}"
            )
        return location

    @property
    def latent_bytes(self) -> int:
        """Bytes of one latent."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


def read_latents(directory: Directory, location: LatentLocation, first: int, last: int) -> NDArray[Any]:
    """Latents x_first .. x_last (both included) as (last - first + 1, *latent_shape), storage dtype.

    Reads and verifies only their bytes, so that a prefix costs a prefix. Raises CorruptionError on a mismatch and
    IndexError when the trajectory has no such latents.
    """
    if not 0 <= first <= last < len(location.checksums):
        raise IndexError(f"latents {first}..{last} of {location.trajectory_id}: it has {len(location.checksums)}")
    size = location.latent_bytes
    start = location.offset + location.header + first * size
    try:
        data = directory.read_range(location.file, start, (last - first + 1) * size)
    except FileNotFoundError as error:
        member = f"{location.trajectory_id}.latents.npy latent {first}"
        raise CorruptionError(location.file, member, location.checksums[first], None, missing=True) from error
    for k in range(first, last + 1):
        piece = data[(k - first) * size : (k - first + 1) * size]
        member = f"{location.trajectory_id}.latents.npy latent {k}"
        _verify(location.file, member, piece, size, location.checksums[k])
    return np.frombuffer(data, NUMPY_DTYPES[location.dtype]).reshape(-1, *location.shape)


def read_media(directory: Directory, row: Mapping[str, Any]) -> bytes:
    """The encoded media of one `trajectories` row. Raises CorruptionError when its bytes are not those written."""
    member = f"{row['trajectory_id']}.{row['media_format']}"
    try:
        data = directory.read_range(row["media_file"], row["media_offset"], row["media_length"])
    except FileNotFoundError as error:
        raise CorruptionError(row["media_file"], member, row["media_crc32"], None, missing=True) from error
    _verify(row["media_file"], member, data, row["media_length"], row["media_crc32"])
    return data


def _verify(file: str, member: str, data: bytes, length: int, expected: int) -> None:
    if len(data) != length:
        raise CorruptionError(file, member, expected, None)
    if (found := zlib.crc32(data)) != expected:
        raise CorruptionError(file, member, expected, found)
