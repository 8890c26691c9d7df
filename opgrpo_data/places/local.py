"""Files on a local disk: temporary names, fsync, hard links, scattered reads.

Memory: a file being written holds BUFFER_BYTES.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from opgrpo_data.places.files import TEMPORARY_PREFIX, Entry, Range
from opgrpo_data.places.scatter import read_scattered

BUFFER_BYTES = 256 * 1024
DRAIN_BYTES = 8 * 1024 * 1024
NO_FILE = "not a regular file"

# Only Linux has it. Alone of its flags, WRITE leaves an error of the disk for fsync to report.
SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
SYNC_FILE_RANGE_WRITE = 2


class LocalFiles:
    """`Files` of this machine."""

    def exists(self, path: str) -> bool:
        """See Files."""
        return Path(path).exists()

    def glob(self, root: str, pattern: str) -> list[str]:
        """See Files."""
        return glob.glob(pattern, root_dir=root)  # noqa: PTH207 names relative to the root

    def entries(self, root: str, folder: str) -> list[Entry]:
        """See Files. What vanishes meanwhile, and a link to nowhere, is left out. Folders may be links to other disks, each is
        walked once."""
        found, walked = [], set()
        for directory, folders, names in os.walk(Path(root, folder), followlinks=True):
            walked.add(Path(directory).resolve())
            folders[:] = [name for name in folders if Path(directory, name).resolve() not in walked]
            for name in names:
                path = Path(directory, name)
                with suppress(FileNotFoundError), _no_file(path):
                    status = path.stat()
                    modified = datetime.fromtimestamp(status.st_mtime, UTC)
                    found.append(Entry(path.relative_to(root).as_posix(), status.st_size, modified))
        return found

    def read(self, path: str) -> bytes:
        """See Files."""
        with _opened(path) as (descriptor, size):
            return _read(descriptor, 0, size)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See Files."""
        with _opened(path) as (descriptor, size):
            return _read(descriptor, offset, min(length, max(0, size - offset)))

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> list[int]:
        """See Files."""
        return read_scattered(ranges, into)

    @contextmanager
    def write_atomic(self, path: str) -> Iterator[BinaryIO]:
        """See Files."""
        with _temporary(path) as (file, temporary, target):
            yield file
            _sync(file)
            temporary.replace(target)
            _sync_directory(target.parent)

    def publish(self, path: str, data: bytes) -> bool:
        """See Files. A hard link of a finished temporary file: atomic, and it fails when the name exists."""
        with _temporary(path) as (file, temporary, target):
            file.write(data)
            _sync(file)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_directory(target.parent)
            return True

    def remove(self, path: str) -> None:
        """See Files."""
        Path(path).unlink(missing_ok=True)

    def remove_tree(self, path: str) -> None:
        """See Files."""
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


@contextmanager
def _no_file(path: str | Path) -> Iterator[None]:
    """Where there is something, but no file, it is as if there were nothing: a link to itself, a socket."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise FileNotFoundError(errno.ENOENT, NO_FILE, str(path)) from error


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """A file to read, and its bytes. A folder is none, nor a pipe or a device, for which one would wait."""
    with _no_file(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, NO_FILE, path)
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _read(descriptor: int, offset: int, length: int) -> bytes:
    """One call reads 2 GiB at most."""
    data = os.pread(descriptor, length, offset)
    parts = [data]
    while data and (length := length - len(data)):
        offset += len(data)
        parts.append(data := os.pread(descriptor, length, offset))
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _temporary(path: str) -> Iterator[tuple[BinaryIO, Path, Path]]:
    target = Path(path)
    _make_directory(target.parent)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        with io.BufferedWriter(_Draining(temporary, "xb"), BUFFER_BYTES) as file:
            yield file, temporary, target
    finally:
        temporary.unlink(missing_ok=True)


class _Draining(io.FileIO):
    """A new file whose bytes are sent to the disk as they come, DRAIN_BYTES at a time: the fsync at the end finds few left."""

    _size = 0
    _sent = 0

    def write(self, data: Any) -> int:
        """As any file; then has the system begin to write to the disk, which it does in the background."""
        with _named(self.name):
            written = super().write(data)
        self._size += written
        if SYNC_FILE_RANGE is not None and self._size - self._sent >= DRAIN_BYTES:
            offset, length = ctypes.c_int64(self._sent), ctypes.c_int64(self._size - self._sent)
            SYNC_FILE_RANGE(self.fileno(), offset, length, SYNC_FILE_RANGE_WRITE)
            self._sent = self._size
        return written


def _sync(file: BinaryIO) -> None:
    file.flush()
    with _named(file.name):
        os.fsync(file.fileno())


@contextmanager
def _named(path: Any) -> Iterator[None]:
    """An error of the disk, such as a full one, does not say by itself which file it met."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _make_directory(path: Path) -> None:
    """mkdir -p that survives a power cut: every directory it makes is synced into its parent."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
