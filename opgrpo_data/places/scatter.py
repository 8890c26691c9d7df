"""Many ranges of many local files: what the page cache has is copied, and the disk is asked for all the rest at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice

from opgrpo_data.places.files import Range

OPEN_FILES = 128
"""Files that one call holds open at a time."""

GAP_BYTES = 64 * 2**10
"""Ranges of one file that are no further apart are one read, and what lies between them is read and thrown away."""

RANGES_A_READ = 500
"""The kernel takes 1,024 buffers (IOV_MAX): one a range and one a gap."""

HINT_BYTES = 2**20
"""The kernel cuts a longer hint to what the disk's queue takes."""

NOWAIT = getattr(os, "RWF_NOWAIT", 0)


@dataclass
class Run:
    """One read of an open file: ranges that lie close together. ranges: which of those asked for. got: bytes read so far."""

    descriptor: int
    offset: int
    end: int
    ranges: list[int] = field(default_factory=list)
    got: int = 0

    def buffers(self, ranges: Sequence[Range], places: Sequence[int], into: memoryview, gap: memoryview) -> list[memoryview]:
        """Where the bytes of the run go: each range to its place, what lies between them to `gap`."""
        buffers, end = [], self.offset
        for i in self.ranges:
            if ranges[i].offset > end:
                buffers.append(gap[: ranges[i].offset - end])
            buffers.append(into[places[i] : places[i + 1]])
            end = ranges[i].offset + ranges[i].length
        return buffers

    def fill(self, buffers: list[memoryview], flags: int) -> None:
        """Read on to the end of the run, or of the file, or of what is in memory if the flags say so; uses up the buffers."""
        while buffers:
            try:
                count = os.preadv(self.descriptor, buffers, self.offset + self.got, flags)
            except OSError as error:
                if flags and error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    return
                raise
            if not count:
                return
            self.got += count
            full = 0
            while full < len(buffers) and count >= len(buffers[full]):
                count -= len(buffers[full])
                full += 1
            del buffers[:full]
            if count:
                buffers[0] = buffers[0][count:]

    def hint(self) -> None:
        """Have the disk read what is missing."""
        for offset in range(self.offset + self.got, self.end, HINT_BYTES):
            _advise(self.descriptor, offset, min(HINT_BYTES, self.end - offset), "POSIX_FADV_WILLNEED")


def read_scattered(ranges: Sequence[Range], into: memoryview) -> list[int]:
    """Files.read_ranges on local disks. Besides `into` it needs GAP_BYTES of memory."""
    places = list(accumulate((wanted.length for wanted in ranges), initial=0))
    gap = memoryview(bytearray(GAP_BYTES))
    found = [0] * len(ranges)
    for runs in _opened(ranges):
        late = []
        for run in runs:
            buffers = run.buffers(ranges, places, into, gap)
            run.fill(buffers, NOWAIT)
            if buffers:
                run.hint()
                late.append((run, buffers))
        for run, buffers in late:
            run.fill(buffers, 0)
        for run in runs:
            for i in run.ranges:
                found[i] = min(max(run.offset + run.got - ranges[i].offset, 0), ranges[i].length)
    return found


def _opened(ranges: Sequence[Range]) -> Iterator[list[Run]]:
    """All runs of the files that there are, OPEN_FILES at a time; each file is open until the next are asked for."""
    order = sorted(range(len(ranges)), key=lambda i: (ranges[i].file, ranges[i].offset))
    files = ((file, list(members)) for file, members in groupby(order, key=lambda i: ranges[i].file))
    while some := list(islice(files, OPEN_FILES)):
        opened: list[int] = []
        runs: list[Run] = []
        try:
            for file, members in some:
                try:
                    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # not to wait at a pipe
                except (FileNotFoundError, NotADirectoryError):
                    continue
                opened.append(descriptor)
                _advise(descriptor, 0, 0, "POSIX_FADV_RANDOM")  # else the kernel reads on behind each range
                runs += _runs(descriptor, members, ranges)
            yield runs
        finally:
            for descriptor in opened:
                os.close(descriptor)


def _runs(descriptor: int, members: Sequence[int], ranges: Sequence[Range]) -> list[Run]:
    """members: ranges of one file, by offset."""
    runs: list[Run] = []
    for i in members:
        wanted = ranges[i]
        last = runs[-1] if runs else None
        if last is None or not 0 <= wanted.offset - last.end <= GAP_BYTES or len(last.ranges) == RANGES_A_READ:
            last = Run(descriptor, wanted.offset, wanted.offset)
            runs.append(last)
        last.ranges.append(i)
        last.end = wanted.offset + wanted.length
    return runs


def _advise(descriptor: int, offset: int, length: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(descriptor, offset, length, getattr(os, advice))
