"""Safetensors files without torch: what their headers promise, and whether the bytes are those that were written.

The format has no checksum of its own. Ours lie in its metadata: `digest`, over names, dtypes, shapes and bytes of all
tensors, with the path that the file is for (policies, training states; see pipelines.weights), or the crc32 of each tensor
by its name (conditions).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opgrpo_data.checksum import crc32
from opgrpo_data.io import Directory

# Name of a dtype in a header: what torch calls it, as the digest says it, and its bytes.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
    "I16": ("torch.int16", 2),
    "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1),
    "BOOL": ("torch.bool", 1),
}
LENGTH_BYTES = 8
HEADER_BYTES = 100 * 1024 * 1024
CHUNK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file: bytes first .. last - 1. dtype: a key of DTYPES."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself. size: of the whole file, in bytes."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    size: int

    @property
    def path(self) -> str:
        """The path in the store that the file was written for; empty where it does not tell."""
        return self.metadata.get("digest", "").partition(" ")[2]


def read_header(directory: Directory, path: str) -> Header:
    """The header of a safetensors file. Raises ValueError where it cannot be one."""
    size = int.from_bytes(directory.read_range(path, 0, LENGTH_BYTES), "little")
    if not 0 < size <= HEADER_BYTES:
        raise ValueError(f"its header would have {size} bytes")
    data = directory.read_range(path, LENGTH_BYTES, size)
    start = LENGTH_BYTES + size
    try:
        told: dict[str, Any] = json.loads(data)
        metadata = {name: str(value) for name, value in told.pop("__metadata__", {}).items()}
        tensors = {name: _tensor(start, entry) for name, entry in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.first, tensor.last)):
        if tensor.first != end:
            raise ValueError(f"its header leaves a gap or an overlap at byte {end}")
        end = tensor.last
    return Header(tensors, metadata, end)


def _tensor(start: int, entry: Mapping[str, Any]) -> Tensor:
    first, last = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = entry["dtype"], tuple(int(side) for side in entry["shape"])
    if first < 0 or min(shape, default=0) < 0 or last - first != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError(f"{entry} contradicts itself")
    return Tensor(dtype, shape, start + first, start + last)


def check_bytes(directory: Directory, path: str, header: Header) -> None:
    """Read all tensors. Raises ValueError when they are not what the metadata's digest, or checksums, say."""
    if "digest" in header.metadata:
        expected = header.metadata["digest"].partition(" ")[0]
        if (found := _digest(directory, path, header)) != expected:
            raise ValueError(f"expected digest {expected}, found {found}")
        return
    for name, tensor in header.tensors.items():
        crc = 0
        for piece in _pieces(directory, path, tensor):
            crc = crc32(piece, crc)
        if str(crc) != header.metadata.get(name):
            raise ValueError(f"tensor {name}: expected crc32 {header.metadata.get(name)}, found {crc}")


def _digest(directory: Directory, path: str, header: Header) -> str:
    digest = hashlib.blake2b()
    for name, tensor in sorted(header.tensors.items()):
        digest.update(f"{name}:{DTYPES[tensor.dtype][0]}:{tensor.shape};".encode())
        for piece in _pieces(directory, path, tensor):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(directory: Directory, path: str, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor, a bounded number at a time; fewer where the file ends."""
    for start in range(tensor.first, tensor.last, CHUNK_BYTES):
        yield directory.read_range(path, start, min(CHUNK_BYTES, tensor.last - start))
