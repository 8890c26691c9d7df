"""Scattered reads on local disks: whatever is asked for, the bytes are those that a plain read finds."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.places import scatter
from opgrpo_data.places.files import Range
from opgrpo_data.places.local import LocalFiles

SIZES = {"a": 0, "b": 1, "c": 5_000, "d": 200_000}
"""Files, and their bytes; a file named e does not exist."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of random bytes."""
    made = tmp_path_factory.mktemp("scattered")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        (made / name).write_bytes(rng.bytes(size))
    return made


def plainly(wanted: Range) -> bytes:
    """The bytes of a range that there are."""
    path = Path(wanted.file)
    return path.read_bytes()[wanted.offset : wanted.offset + wanted.length] if path.exists() else b""


def check(ranges: Sequence[Range]) -> None:
    """That they are read as plain reads read them, and that nothing is written behind them."""
    total = sum(wanted.length for wanted in ranges)
    memory = bytearray(b"\xa5" * (total + 64))
    found = LocalFiles().read_ranges(ranges, memoryview(memory)[:total])
    place = 0
    for wanted, count in zip(ranges, found, strict=True):
        expected = plainly(wanted)
        assert count == len(expected)
        assert memory[place : place + count] == expected
        place += wanted.length
    assert memory[total:] == b"\xa5" * 64


Asked = tuple[str, int, int]


@st.composite
def any_ranges(draw: st.DrawFn) -> list[Asked]:
    """(name, offset, length): overlapping, adjacent, a gap apart, twice the same, empty, over the end, of missing files."""
    ranges: list[Asked] = []
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.booleans()) and ranges:
            name, offset, length = draw(st.sampled_from(ranges))
            apart = draw(st.sampled_from([-100, -1, 0, 1, 640, scatter.GAP_BYTES, scatter.GAP_BYTES + 1]))
            ranges.append((name, max(offset + length + apart, 0), draw(st.integers(0, 30_000))))
        else:
            name = draw(st.sampled_from([*SIZES, "e"]))
            ranges.append((name, draw(st.integers(0, SIZES.get(name, 9) + 9)), draw(st.integers(0, 60_000))))
    mixed: list[Asked] = draw(st.permutations(ranges))
    return mixed


@settings(max_examples=150, deadline=None)
@given(ranges=any_ranges(), at_once=st.sampled_from([1, 2, 500]), opened=st.sampled_from([1, 2, 128]), waiting=st.booleans())
def test_any_ranges_are_read_as_plain_reads_read_them(
    folder: Path, ranges: list[Asked], at_once: int, opened: int, waiting: bool
) -> None:
    with (
        patch.object(scatter, "RANGES_A_READ", at_once),
        patch.object(scatter, "OPEN_FILES", opened),
        patch.object(scatter, "NOWAIT", 0 if waiting else scatter.NOWAIT),
    ):
        check([Range(str(folder / name), offset, length) for name, offset, length in ranges])


def test_more_ranges_than_one_read_takes(folder: Path) -> None:
    """Each with a gap behind it: twice as many buffers as ranges."""
    check([Range(str(folder / "d"), 100 * i, 99) for i in range(2_000)])


def test_more_files_than_are_opened_at_a_time(tmp_path: Path) -> None:
    files = [tmp_path / f"{i:03d}" for i in range(scatter.OPEN_FILES * 2 + 1)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i % 256]) * 10)
    held: list[int] = []
    most = 0
    real_open, real_close = os.open, os.close

    def open_(path: str, flags: int) -> int:
        nonlocal most
        held.append(real_open(path, flags))
        most = max(most, len(held))
        return held[-1]

    def close(descriptor: int) -> None:
        held.remove(descriptor)
        real_close(descriptor)

    with patch.object(os, "open", open_), patch.object(os, "close", close):
        check([Range(str(file), 2, 5) for file in files])
    assert held == []
    assert most == scatter.OPEN_FILES


@pytest.mark.parametrize("at_most", [1, 7, 5_000])
def test_short_reads_are_continued(folder: Path, at_most: int) -> None:
    """The kernel may give less than was asked for: for one, never more than 2 GiB at a time."""
    real = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        taken, room = [], at_most
        for buffer in buffers:
            taken.append(buffer[:room])
            room -= len(taken[-1])
        return real(descriptor, taken, offset, flags)

    with patch.object(os, "preadv", short):
        check([Range(str(folder / "d"), offset, 50) for offset in (0, 50, 120, 170, 199_990)])


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_what_is_not_in_memory_is_waited_for(folder: Path, error: int) -> None:
    """As on a cold disk (EAGAIN), and as on a filesystem that always waits (EOPNOTSUPP)."""
    real, hinted = os.preadv, []

    def cold(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if flags:
            raise OSError(error, os.strerror(error))
        return real(descriptor, buffers, offset, flags)

    def hint(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            hinted.append((offset, length))

    ranges = [Range(str(folder / "d"), offset, 40_000) for offset in (0, 120_000)]
    with (
        patch.object(os, "preadv", cold),
        patch.object(os, "posix_fadvise", hint),
        patch.object(scatter, "HINT_BYTES", 30_000),
    ):
        check(ranges)
    assert hinted == [(0, 30_000), (30_000, 10_000), (120_000, 30_000), (150_000, 10_000)]


def test_an_error_of_the_disk_is_no_missing_file(folder: Path) -> None:
    """Nor is a folder under the file's name: such errors are raised, and the files that were open are closed."""
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(IsADirectoryError):
        check([Range(str(folder / "d"), 0, 10), Range(str(folder), 0, 10)])
    assert set(Path("/proc/self/fd").iterdir()) == before
