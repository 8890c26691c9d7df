"""The limits that reading is measured against: what the disk and the memory of this machine give to plain reads."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opgrpo_data.places.files import Range

BLOCK = 2**20
QUEUE = 16
PAGE = 4096


def ordinary(size: int) -> NDArray[np.uint8]:
    """Touched memory in pages of 4 KiB, as the page cache is: into huge pages, which `memory` has, disks may read faster."""
    made = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    made[:] = 0
    return made


def drop(paths: Sequence[Path]) -> None:
    """Take files that were synced out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sequential(paths: Sequence[Path], into: NDArray[np.uint8]) -> float:
    """Bytes a second of whole files, one after another, in reads of BLOCK.

    They go through all of `into`, as a reader's data must lie somewhere: into one block of it, which stays in the cache of
    the processor, warm reads are twice as fast.
    """
    view = memoryview(into)  # type: ignore[arg-type]
    blocks = len(into) // BLOCK
    began, total = time.perf_counter(), 0
    for path in paths:
        descriptor, offset = os.open(path, os.O_RDONLY), 0
        while count := os.preadv(descriptor, [view[(total // BLOCK) % blocks * BLOCK :][:BLOCK]], offset):
            offset += count
            total += count
        os.close(descriptor)
    return total / (time.perf_counter() - began)


def scattered(ranges: Sequence[Range], into: NDArray[np.uint8], *, direct: bool) -> float:
    """Seconds to read ranges into a place each, QUEUE at a time; direct: past the page cache, from the disk.

    The files are open when the clock starts. Direct reads are widened to whole pages.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    opened = {file: os.open(file, flags) for file in {wanted.file for wanted in ranges}}
    view = memoryview(into)  # type: ignore[arg-type]
    room = len(into) // len(ranges) // PAGE * PAGE
    waiting = iter(enumerate(ranges))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number, wanted = next(waiting, (0, None))
            if wanted is None:
                return
            begin, end = wanted.offset, wanted.offset + wanted.length
            if direct:
                begin, end = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
            os.preadv(opened[wanted.file], [view[number * room :][: end - begin]], begin)

    threads = [threading.Thread(target=work) for _ in range(QUEUE)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for descriptor in opened.values():
        os.close(descriptor)
    return seconds
