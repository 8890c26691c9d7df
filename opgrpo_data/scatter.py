"""Many ranges of many local files: what the page cache has is copied, and the disk is asked for all the rest at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice

from opgrpo_data.files import Range

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
    """One read: ranges of a file that lie close together.

    ranges: which of those asked for. buffers: where their bytes go, and those of the gaps between them; used up from the front.
    """

    descriptor: int
    offset: int
    end: int
    ranges: list[int] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)

    def fill(self, flags: int) -> None:
        """Read on to the end of the run, or of the file, or of what is in memory if the flags say so."""
        while self.buffers:
            try:
                count = os.preadv(self.descriptor, self.buffers, self.offset, flags)
            except OSError as error:
                if flags and error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    return
                raise
            if not count:
                return
            self._advance(count)

    def _advance(self, count: int) -> None:
        """So many bytes were read into the buffers."""
        self.offset += count
        full = 0
        while full < len(self.buffers) and count >= len(self.buffers[full]):
            count -= len(self.buffers[full])
            full += 1
        del self.buffers[:full]
        if count:
            self.buffers[0] = self.buffers[0][count:]

    def hint(self) -> None:
        """Have the disk read what is missing."""
        for offset in range(self.offset, self.end, HINT_BYTES):
            _advise(self.descriptor, offset, min(HINT_BYTES, self.end - offset), "POSIX_FADV_WILLNEED")


def read_scattered(ranges: Sequence[Range], into: memoryview) -> list[int]:
    """Files.read_ranges on local disks. Besides `into` it needs GAP_BYTES of memory."""
    places = list(accumulate((wanted.length for wanted in ranges), initial=0))
    order = sorted(range(len(ranges)), key=lambda i: (ranges[i].file, ranges[i].offset))
    files = ((file, list(members)) for file, members in groupby(order, key=lambda i: ranges[i].file))
    found = [0] * len(ranges)
    gap = memoryview(bytearray(GAP_BYTES))
    while some := list(islice(files, OPEN_FILES)):
        opened: list[int] = []
        runs: list[Run] = []
        try:
            for file, members in some:
                try:
                    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # nobody writes to a pipe in a store
                except (FileNotFoundError, NotADirectoryError):
                    continue
                opened.append(descriptor)
                _advise(descriptor, 0, 0, "POSIX_FADV_RANDOM")  # else the kernel reads on behind each range
                runs += _runs(descriptor, members, ranges, places, into, gap)
            _read(runs)
        finally:
            for descriptor in opened:
                os.close(descriptor)
        for run in runs:
            for i in run.ranges:
                found[i] = min(max(run.offset - ranges[i].offset, 0), ranges[i].length)
    return found


def _advise(descriptor: int, offset: int, length: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(descriptor, offset, length, getattr(os, advice))


def _read(runs: Sequence[Run]) -> None:
    for run in runs:
        run.fill(NOWAIT)
        if run.buffers:
            run.hint()
    for run in runs:
        run.fill(0)


def _runs(
    descriptor: int,
    members: Sequence[int],
    ranges: Sequence[Range],
    places: Sequence[int],
    into: memoryview,
    gap: memoryview,
) -> Iterator[Run]:
    """members: ranges of one file, by offset."""
    run: Run | None = None
    for i in members:
        wanted = ranges[i]
        apart = wanted.offset - run.end if run else 0
        if run is None or not 0 <= apart <= GAP_BYTES or len(run.ranges) == RANGES_A_READ:
            if run:
                yield run
            run = Run(descriptor, wanted.offset, wanted.offset)
        elif apart:
            run.buffers.append(gap[:apart])
        run.ranges.append(i)
        run.buffers.append(into[places[i] : places[i + 1]])
        run.end = wanted.offset + wanted.length
    if run:
        yield run
