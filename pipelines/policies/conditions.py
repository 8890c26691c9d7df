"""Encoded prompts in the store, named by their content: encoded once, for every stage, run and experiment.

    conditions/encoder=<id>/<hash>.safetensors     tensors <text key>/<name>; their crc32 in the file's metadata

The id of the encoder names its files and options, so that a condition is found by whoever would compute the same.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from opgrpo_data import ids
from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from pipelines.policies.family import Condition

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
HEADER_BYTES = 16 * 1024 * 1024


def text_key(text: str) -> str:
    """What a prompt's tensors are filed under."""
    return f"{ids.derived_seed('condition', text):016x}"


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies: offset and length in bytes."""

    file: str
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int


class ConditionStore:
    """The conditions that one encoder has made in one store."""

    def __init__(self, directory: Directory, encoder: str) -> None:
        self.directory = directory
        self.folder = f"conditions/encoder={encoder}"
        self._places: dict[str, dict[str, _Place]] = {}
        for file in directory.list(f"{self.folder}/*.safetensors"):
            self._index(file)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those without a condition, each once, in the order given."""
        return [text for text in dict.fromkeys(texts) if text_key(text) not in self._places]

    def add(self, conditions: Mapping[str, Condition]) -> None:
        """File conditions by their prompts' texts, as one file. Raises ValueError for a dtype that is none of DTYPES."""
        tensors = {
            f"{text_key(text)}/{name}": tensor.detach().cpu().contiguous()
            for text, condition in conditions.items()
            for name, tensor in condition.items()
        }
        if odd := {str(tensor.dtype) for tensor in tensors.values()} - set(map(str, DTYPES.values())):
            raise ValueError(f"conditions of {', '.join(sorted(odd))} cannot be stored: give one of {sorted(DTYPES)}")
        checksums = {name: str(zlib.crc32(_bytes(tensor))) for name, tensor in tensors.items()}
        file = f"{self.folder}/{ids.derived_seed(*sorted(conditions)):016x}.safetensors"
        self.directory.publish(file, safetensors.torch.save(tensors, metadata=checksums))
        self._index(file)

    def read(self, text: str) -> Condition:
        """The condition of a prompt that is not missing. Raises StoreError when its bytes are damaged."""
        return {name: self._tensor(place) for name, place in self._places[text_key(text)].items()}

    def _tensor(self, place: _Place) -> Tensor:
        try:
            data = self.directory.read_range(place.file, place.offset, place.length)
        except (OverflowError, MemoryError) as error:  # a header may tell any length
            raise _damaged(place.file, f"{place.length} bytes at {place.offset}") from error
        if zlib.crc32(data) != place.crc32:
            raise _damaged(place.file, f"expected crc32 {place.crc32}, found {zlib.crc32(data)}")
        flat = torch.frombuffer(bytearray(data), dtype=place.dtype) if data else torch.empty(0, dtype=place.dtype)
        return flat.reshape(place.shape)

    def _index(self, file: str) -> None:
        try:
            size = int.from_bytes(self.directory.read_range(file, 0, 8), "little")
            if not 0 < size <= HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header: dict[str, Any] = json.loads(self.directory.read_range(file, 8, size))
            checksums = header.pop("__metadata__")
            for name, told in header.items():
                key, _, part = name.partition("/")
                self._places.setdefault(key, {})[part] = _place(file, 8 + size, told, int(checksums[name]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from error


def _place(file: str, start: int, told: Mapping[str, Any], crc32: int) -> _Place:
    first, last = (int(value) for value in told["data_offsets"])
    dtype, shape = DTYPES[told["dtype"]], tuple(int(side) for side in told["shape"])
    if first < 0 or min(shape, default=1) < 0 or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{told} contradicts itself")
    return _Place(file, start + first, last - first, dtype, shape, crc32)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _damaged(file: str, found: str) -> StoreError:
    return StoreError(f"{file} is damaged ({found}): restore it from a copy, or remove it, and its prompts are encoded again")


def batched(conditions: Sequence[Condition]) -> Condition:
    """B conditions as one: tensors stacked; those of different lengths are padded with zeros at the end of their first
    dimension."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([condition[name] for condition in conditions], batch_first=True)
        for name in conditions[0]
    }
