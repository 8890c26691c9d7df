"""What a store asks of the place it lies in; `local` and `remote` beside it are the two that answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, NamedTuple, Protocol

TEMPORARY_PREFIX = ".tmp-"
"""How the names of unfinished files begin: no published file's name does."""


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it. path: relative to the directory. size: bytes. modified: by the clock of the place."""

    path: str
    size: int
    modified: datetime


class Range(NamedTuple):
    """`length` bytes of a file from `offset` on."""

    file: str
    offset: int
    length: int


class Files(Protocol):
    """Files by their full paths, as Directory has checked them."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        ...

    def glob(self, root: str, pattern: str) -> list[str]:
        """Paths relative to `root` that match a glob; wildcards do not match a `/`."""
        ...

    def entries(self, root: str, folder: str) -> list[Entry]:
        """Every file below `root/folder`, unfinished ones too; none where there is no such folder."""
        ...

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        ...

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`: fewer only where the file ends. Raises FileNotFoundError."""
        ...

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> list[int]:
        """Fill `into` with the ranges, one behind the other; returns the bytes found of each, 0 where there is no file.

        Where fewer are found than asked for, the rest of its place in `into` is undefined.
        """
        ...

    def write_atomic(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A file that appears under its name, whole and kept, when the block ends without an error."""
        ...

    def publish(self, path: str, data: bytes) -> bool:
        """Create the file unless the name is taken. True if this call created it."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        ...

    def remove_tree(self, path: str) -> None:
        """Remove a folder and all below it, if it is there."""
        ...
