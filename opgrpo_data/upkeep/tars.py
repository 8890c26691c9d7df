"""Every byte of a shard's tars, one after the other: headers, data, padding, the end. What differs from what was written.

Where a member must lie, and what it must hold, its shard's index says; so damage in one place hides none in another.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from opgrpo_data.errors import CorruptionError
from opgrpo_data.io import Directory

CHUNK_BYTES = 8 * 1024 * 1024
BLOCK = tarfile.BLOCKSIZE
NOTE_BYTES = 16 * 1024 * 1024
"""A member whose length no index tells (a note) is not larger: its header may claim anything."""


@dataclass(frozen=True)
class Expected:
    """A member as the index describes it. offset, length: of its data in bytes; None where only the tar itself tells.

    check: what is wrong with the data, None if nothing is; a CorruptionError where the trajectory is lost with it.
    """

    name: str
    offset: int | None
    length: int | None
    check: Callable[[bytes], CorruptionError | str | None]


@dataclass(frozen=True)
class Fault:
    """What is wrong. name: of the member; None: with the tar as a whole. error: where the trajectory is lost with it."""

    name: str | None
    problem: str
    error: CorruptionError | None = None


class Reader:
    """A file read forwards, in large pieces. read: as Directory.read_range."""

    def __init__(self, directory: Directory, path: str) -> None:
        self.directory = directory
        self.path = path
        self.total = 0
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`: fewer only where the file ends."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            self._start, at = offset, 0
            self._data = self.directory.read_range(self.path, offset, max(length, CHUNK_BYTES))
            self.total += len(self._data)
        return self._data[at : at + length]


def faults(reader: Reader, size: int, members: Sequence[Expected]) -> Iterator[Fault]:
    """What is wrong with a tar of `size` bytes, whose members must be these, in this order.

    Not told: members that the index itself places beyond the end.
    """
    position: int | None = 0  # None: unknown, until the next member whose place the index tells
    for member in members:
        header = len(tarfile.TarInfo(member.name).tobuf())
        if member.offset is not None:
            if position is not None and position != member.offset - header:
                yield Fault(member.name, f"its data should begin at byte {member.offset}, in the tar it is {position + header}")
            position = member.offset - header
        elif position is None:
            yield Fault(member.name, "it cannot be found: the header before it is damaged")
            continue
        if position < 0 or position + header + (member.length or 0) > size:
            if member.offset is None:
                yield Fault(member.name, "the file ends before it")
            position = None
            continue
        found, problem = _header(reader.read(position, header), member)
        if problem:
            yield Fault(member.name, problem)
        length = found if member.length is None else member.length
        if length is None or position + header + length > size:
            position = None
            continue
        start = position + header
        if wrong := member.check(reader.read(start, length)):
            yield Fault(member.name, str(wrong), wrong if isinstance(wrong, CorruptionError) else None)
        position = start + -(-length // BLOCK) * BLOCK
        if any(reader.read(start + length, position - start - length)):
            yield Fault(member.name, "the bytes behind it, up to the next block, are not zero")
    if position is not None:
        yield from _end(reader, size, position)


def _header(data: bytes, member: Expected) -> tuple[int | None, str | None]:
    """The length that a member's header tells, and what is wrong with the header: any byte that a writer would not write."""
    try:
        told = tarfile.TarInfo.frombuf(data[-BLOCK:], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return None, f"its tar header is damaged ({error})"
    rebuilt = tarfile.TarInfo(member.name)
    for field in ("size", "mode", "uid", "gid", "mtime", "uname", "gname", "devmajor", "devminor", "linkname", "type"):
        setattr(rebuilt, field, getattr(told, field))
    if rebuilt.tobuf() != data:
        return None, "its tar header is damaged (it is of another member, or not as it was written)"
    if member.length is None and not 0 <= told.size <= NOTE_BYTES:
        return None, f"its tar header tells {told.size} bytes"
    if member.length is not None and told.size != member.length:
        return None, f"its tar header tells {told.size} bytes, the index {member.length}"
    return told.size, None


def _end(reader: Reader, size: int, position: int) -> Iterator[Fault]:
    """Two empty blocks, and more up to a whole record."""
    whole = -(-(position + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if size != whole:
        yield Fault(None, f"the tar has {size} bytes, {whole} were written")
    for start in range(position, min(size, whole), CHUNK_BYTES):
        if any(reader.read(start, min(CHUNK_BYTES, min(size, whole) - start))):
            yield Fault(None, "there is something behind the last member")
            return
