"""Trajectories as plain WebDataset tars, and back, without loss.

    <trajectory_id>.latents.npy             (T+1, *latent_shape), x_0 (noise) first; bfloat16 as its uint16 bits
    <trajectory_id>.png | .webp | .mp4      the sample, lossless
    <trajectory_id>.json                    prompt, metadata, rewards, and the columns of `trajectories` that say what it is

The JSON is sealed and has the checksums of the others, since a flipped byte in a tar is silent. Floats that JSON lacks stand
as "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opgrpo_data.checks import MEDIA_FORMATS, check_prompts, check_reward, check_row, parsed_object
from opgrpo_data.checksum import crc32
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.plain import plain, typed_row
from opgrpo_data.exchange.selection import Selection
from opgrpo_data.exchange.target import Target
from opgrpo_data.ids import canonical_json
from opgrpo_data.io import Directory
from opgrpo_data.locations import NUMPY_DTYPES
from opgrpo_data.schema import REWARDS, TRAJECTORIES
from opgrpo_data.seal import check_seal, sealed_json
from opgrpo_data.shards import Record

TAR_BYTES = 256 * 2**20
READ_BYTES = 4 * 2**20
NPY = b"\x93NUMPY\x01\x00"
"""How a .npy of format 1.0 begins."""
MEMBER = re.compile(rf"([A-Za-z0-9][A-Za-z0-9_%-]*)\.(latents\.npy|{'|'.join(MEDIA_FORMATS)}|json)")

_PLACES = {"latents_file", "latents_offset", "latents_length", "latents_header",
           "media_file", "media_offset", "media_length", "shard"}  # fmt: skip
COLUMNS = pa.schema([field for field in TRAJECTORIES if field.name not in _PLACES])
"""The columns of `trajectories` that do not tell where the bytes lie."""


@dataclass(frozen=True)
class Sample:
    """One trajectory of a tar. prompt: its row of PROMPTS, if it is known. rewards: rows of REWARDS."""

    record: Record
    prompt: dict[str, Any] | None
    rewards: list[dict[str, Any]]


def write(selection: Selection, target: Target, left_out: LeftOut) -> list[dict[str, Any]]:
    """Write the selected trajectories as tars of about TAR_BYTES."""
    # Imported here because webdataset imports torch, which nobody else who exports must pay for.
    from webdataset.writer import TarWriter

    files: list[dict[str, Any]] = []
    samples = _samples(selection, left_out)
    sample = next(samples, None)
    while sample is not None:
        path, rows, size = f"trajectories-{len(files):05d}.tar", 0, 0
        # mtime: equal trajectories make equal tars. Bytes as they are: no encoder.
        with target.write_atomic(path) as file, closing(TarWriter(file, encoder=False, mtime=0)) as tar:
            while sample is not None and size < TAR_BYTES:
                key, *members = sample
                for extension, data in members:
                    tar.write({"__key__": key, extension: data})
                    size += len(data)
                rows += 1
                sample = next(samples, None)
        files.append({"path": path, "rows": rows})
    return files


def _samples(selection: Selection, left_out: LeftOut) -> Iterator[tuple[str, *tuple[tuple[str, bytes], ...]]]:
    """Of one trajectory after the other: its key, and its members as (extension, data)."""
    for page in selection.pages:
        rewards = selection.rewards(page)
        for row in selection.present(selection.rows(page), left_out):
            if (latents := selection.latents(row, left_out)) is None or (media := selection.media(row, left_out)) is None:
                continue
            key, member = _key(row["trajectory_id"]), io.BytesIO()
            np.save(member, latents, allow_pickle=False)
            told = sealed_json(_document(row, rewards.get(row["trajectory_id"], [])))
            yield key, ("latents.npy", member.getvalue()), (row["media_format"], media), ("json", told)


def _key(trajectory_id: str) -> str:
    """The id as a WebDataset key, which ends at the first dot. No id has a percent sign."""
    return trajectory_id.replace(".", "%2E")


def _document(row: Mapping[str, Any], rewards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "trajectory_id": row["trajectory_id"],
        "prompt": row["text"],
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
        "split": row["split"],
        "rewards": [{name: plain(told[name]) for name in REWARDS.names if name != "trajectory_id"} for told in rewards],
        "trajectory": {name: plain(row[name]) for name in COLUMNS.names},
    }


# -- reading --------------------------------------------------------------------------------------------------------------


class _Ranges(io.RawIOBase):
    """A file of a directory, read from the beginning to the end."""

    def __init__(self, directory: Directory, path: str) -> None:
        self._directory, self._path, self._position = directory, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._directory.read_range(self._path, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read(directory: Directory, path: str, size: int, rows: int, left_out: LeftOut) -> Iterator[Sample]:
    """The trajectories of a tar of `size` bytes, checked; what is damaged, or missing of `rows`, is counted."""
    seen = 0
    try:
        file: Any = io.BufferedReader(_Ranges(directory, path), READ_BYTES)
        with tarfile.open(fileobj=file, mode="r|", bufsize=READ_BYTES) as tar:
            for key, parts in _together(_members(tar, size)):
                seen += 1
                try:
                    yield _sample(key, parts)
                except (ValueError, TypeError, LookupError, OverflowError, pa.ArrowException) as error:
                    left_out.add("damaged", f"{path}: {key}: {' '.join(str(error).split())}")
    except (tarfile.TarError, FileNotFoundError, ValueError, EOFError, OverflowError, RecursionError) as error:
        left_out.messages.append(f"{path}: {error}")
    if seen < rows:
        left_out.add("damaged", f"{path} ends after {seen} of {rows} trajectories", rows - seen)


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tuple[str, str, bytes]]:
    """(key, kind, bytes). Names are compared with what they may be, never used as paths."""
    for member in tar:
        name = MEMBER.fullmatch(member.name)
        if name is None or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
            raise ValueError(f"{member.name[:80]!r} is no member of an export")
        if not 0 <= member.size <= size:
            raise ValueError(f"{member.name[:80]!r} says it has {member.size} bytes, the tar has {size}")
        content: BinaryIO | Any = tar.extractfile(member)
        yield name[1], name[2], content.read()


def _together(members: Iterator[tuple[str, str, bytes]]) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Members of one key: three, or fewer where another key comes before."""
    key = ""
    parts: list[tuple[str, bytes]] = []
    for name, kind, data in members:
        if parts and name != key:
            yield key, parts
            parts = []
        key = name
        parts.append((kind, data))
        if len(parts) == 3:
            yield key, parts
            parts = []
    if parts:
        yield key, parts


def _sample(key: str, parts: list[tuple[str, bytes]]) -> Sample:
    kinds = dict(parts)
    if len(kinds) != len(parts) or len(parts) != 3 or not {"json", "latents.npy"} <= set(kinds):
        raise ValueError(f"expected latents, media and JSON, found {[kind for kind, _ in parts]}")
    document = parsed_object(kinds["json"], "its JSON")
    if not check_seal(kinds["json"]):
        raise ValueError("its JSON has lost its seal")
    row = typed_row(document["trajectory"], COLUMNS)
    check_row(row)
    if key != _key(row["trajectory_id"]):
        raise ValueError(f"it names itself {row['trajectory_id']!r}")
    media = kinds[row["media_format"]]
    if crc32(media) != row["media_crc32"]:
        raise ValueError(f"its media do not have the checksum {row['media_crc32']:08x}")
    rewards = [typed_row({**told, "trajectory_id": row["trajectory_id"]}, REWARDS) for told in document["rewards"]]
    for told in rewards:
        check_reward(told)
    prompt, note = _prompt(document, row)
    return Sample(Record(row, _latents(kinds["latents.npy"], row), media, row["media_format"], note), prompt, rewards)


def _prompt(document: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The row of PROMPTS and the note beside the media; None where the store that was exported did not know the prompt."""
    if document["prompt"] is None:
        return None, {}
    metadata = canonical_json(document["metadata"])
    prompt = {"prompt_id": row["prompt_id"], "text": document["prompt"], "metadata": metadata, "split": document["split"]}
    check_prompts([prompt], "its JSON")
    return prompt, {"prompt": document["prompt"], "metadata": document["metadata"]}


def _latents(member: bytes, row: Mapping[str, Any]) -> NDArray[Any]:
    """The array of a .npy member. Its header is compared with what must stand there, never parsed."""
    shape, dtype = (row["num_steps"] + 1, *row["latent_shape"]), np.dtype(NUMPY_DTYPES[row["latent_dtype"]])
    expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    begin = len(NPY) + 2 + int.from_bytes(member[len(NPY) : len(NPY) + 2], "little")
    header, data = member[len(NPY) + 2 : begin], member[begin:]
    if not member.startswith(NPY) or header.rstrip() != expected or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its latents are not the .npy of {dtype} {shape} that its row tells of")
    latents = np.frombuffer(data, dtype).reshape(shape)
    for k, (latent, checksum) in enumerate(zip(latents, row["latents_crc32"], strict=True)):
        if crc32(latent) != checksum:
            raise ValueError(f"latent {k} does not have the checksum {checksum:08x}")
    return latents
