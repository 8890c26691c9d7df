"""Reads past the page cache: from a cold disk three times as fast, where they are long (docs/results.md says how measured).

The page cache takes a file in by pages of 4 KiB that lie anywhere in memory; the disk writes a direct read into one huge page.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

SHORTEST = 512 * 2**10
"""Bytes. Shorter reads are faster through the page cache, many of them at once."""

BOUNCE_BYTES = 2 * 2**20
"""A huge page: what is read at a time. Each thread that reads at the same time has one."""

PAGE = 4096
"""What places, lengths and memory of direct reads are multiples of."""

CACHESTAT = 451
"""Number of the system call cachestat(2), Linux 6.5 and later, on every architecture but alpha."""

_SYSCALL = getattr(ctypes.CDLL(None), "syscall", None)
_spare: list[memoryview] = []


def mostly_cold(descriptor: int, offset: int, length: int) -> bool:
    """Whether less than half of a range of an open file is in the page cache. False where the system does not tell."""
    if _SYSCALL is None or not hasattr(os, "O_DIRECT"):
        return False
    asked = (ctypes.c_uint64 * 2)(offset, length)
    told = (ctypes.c_uint64 * 5)()  # cached, dirty, under writeback, evicted, evicted lately: pages
    if _SYSCALL(CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(told), 0) != 0:
        return False
    return told[0] * PAGE * 2 < length


@contextmanager
def bounce() -> Iterator[memoryview]:
    """BOUNCE_BYTES of memory in one huge page, if there is one."""
    try:
        memory = _spare.pop()
    except IndexError:
        made = mmap.mmap(-1, BOUNCE_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            made.madvise(mmap.MADV_HUGEPAGE)
        memory = memoryview(made)
    try:
        yield memory
    finally:
        _spare.append(memory)


def chunks(file: str, offset: int, end: int) -> Iterator[memoryview]:
    """The bytes of a file from `offset` to `end`, or to where it ends; each chunk is valid until the next is asked for.

    Raises OSError with EINVAL where the filesystem has no direct reads.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with bounce() as memory:
            while offset < end:
                begin = offset // PAGE * PAGE
                length = min(BOUNCE_BYTES, -(-end // PAGE) * PAGE - begin)
                got = min(begin + os.preadv(descriptor, [memory[:length]], begin), end)
                if got <= offset:
                    return
                yield memory[offset - begin : got - begin]
                offset = got
    finally:
        os.close(descriptor)
