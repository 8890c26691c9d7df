"""One shard: two tars and the Parquet index that commits them. Written once, read by offset, verified by checksum.

    <shard>.<attempt>.latents.tar   <trajectory_id>.latents.npy: all T+1 latents of one trajectory, first step first
    <shard>.<attempt>.media.tar     <trajectory_id>.png | .webp | .mp4 and <trajectory_id>.json: what scorers and people read
    <shard>.parquet                 one row a trajectory: offsets into both tars and checksums. Written LAST: the commit

A shard without an index does not exist for any reader. The index names its tars, and every attempt at a shard writes tars
of its own: two writers of one shard can never mix their bytes, and whose index comes first wins.
"""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from opgrpo_data.checksum import crc32
from opgrpo_data.io import Directory, checked_name
from opgrpo_data.locations import NUMPY_DTYPES
from opgrpo_data.schema import TRAJECTORIES, table_of, to_parquet
from opgrpo_data.seal import sealed_json

INDEX_BYTES = 16 * 1024
"""Memory that the index row of a trajectory takes while its shard is being written, at 50 steps or fewer."""


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
    """A tar as WebDataset writes and reads it, that tells at which byte each member's data begins.

    Written by hand, header by header: tarfile and webdataset copy the data several times on its way.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0

    def add(self, name: str, *parts: bytes | memoryview) -> int:
        """Append a member made of parts, which count as bytes; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = sum(map(len, parts))
        # Whatever could differ from one writing to the next is fixed, as TarInfo fixes the time: equal bytes for equal data.
        info.mode, info.uname, info.gname = 0o444, "bigdata", "bigdata"
        header = info.tobuf()  # longer than a block where the name is
        offset = self._size + len(header)
        for part in (header, *parts, bytes(-info.size % tarfile.BLOCKSIZE)):
            self._file.write(part)
        self._size = offset + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return offset

    def end(self) -> None:
        """Append what marks the end of a tar: two empty blocks, and more up to a whole record."""
        size = self._size + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -size % tarfile.RECORDSIZE))


def write_shard(directory: Directory, folder: str, shard: str, records: Iterable[Record]) -> bool:
    """Write the tars of a shard, then publish its index. False if another attempt committed this shard first.

    Raises ValueError when a record does not fit the schema, or its latents are not what its row says. Until the index is
    published nothing is visible to readers.

    Memory: the record in hand, what the directory keeps of two files under way (opgrpo_data.places), and at most INDEX_BYTES
    a trajectory until the index is published.
    """
    checked_name(shard, "shard")
    attempt = secrets.token_hex(4)
    latents_file = f"{folder}/{shard}.{attempt}.latents.tar"
    media_file = f"{folder}/{shard}.{attempt}.media.tar"
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        latents_tar = _Tar(stack.enter_context(directory.write_atomic(latents_file)))
        media_tar = _Tar(stack.enter_context(directory.write_atomic(media_file)))
        for record in records:
            key = _checked(record)
            rows.append(
                {**record.row, "shard": shard}
                | {"latents_file": latents_file, **_add_latents(latents_tar, key, record.latents)}
                | {"media_file": media_file, **_add_media(media_tar, key, record)}
            )
        index = table_of(rows, TRAJECTORIES)
        latents_tar.end()
        media_tar.end()
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
    latents = np.ascontiguousarray(latents)
    header = io.BytesIO()
    # What np.save writes before the data; with it, the data would be copied twice.
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(latents))
    return {
        "latents_offset": tar.add(f"{key}.latents.npy", header.getvalue(), latents.reshape(-1).view(np.uint8).data),
        "latents_length": header.tell() + latents.nbytes,
        "latents_header": header.tell(),
        "latents_crc32": [crc32(latent) for latent in latents],
    }


def _add_media(tar: _Tar, key: str, record: Record) -> dict[str, Any]:
    offset = tar.add(f"{key}.{record.media_format}", record.media)
    tar.add(f"{key}.json", sealed_json({**record.note, "trajectory_id": key}, sort_keys=True))
    return {
        "media_format": record.media_format,
        "media_offset": offset,
        "media_length": len(record.media),
        "media_crc32": crc32(record.media),
    }
