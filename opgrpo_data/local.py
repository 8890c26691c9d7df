"""Files on a local disk: temporary names, fsync, hard links, scattered reads."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from opgrpo_data.files import TEMPORARY_PREFIX, Entry, Range

BUFFER_BYTES = 256 * 1024


class LocalFiles:
    """`Files` of this machine."""

    def exists(self, path: str) -> bool:
        """See Files."""
        return Path(path).exists()

    def glob(self, root: str, pattern: str) -> list[str]:
        """See Files."""
        return glob.glob(pattern, root_dir=root)  # noqa: PTH207 names relative to the root

    def entries(self, root: str, folder: str) -> list[Entry]:
        """See Files. A file that vanishes meanwhile is left out."""
        found = []
        for directory, _, names in os.walk(Path(root, folder)):
            for name in names:
                path = Path(directory, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    modified = datetime.fromtimestamp(status.st_mtime, UTC)
                    found.append(Entry(path.relative_to(root).as_posix(), status.st_size, modified))
        return found

    def read(self, path: str) -> bytes:
        """See Files."""
        return Path(path).read_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See Files."""
        with Path(path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> list[int]:
        """See Files."""
        found, start = [], 0
        for wanted in ranges:
            count = 0
            with suppress(FileNotFoundError), Path(wanted.file).open("rb", buffering=0) as file:
                count = os.preadv(file.fileno(), [into[start : start + wanted.length]], wanted.offset)
            found.append(count)
            start += wanted.length
        return found

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
def _temporary(path: str) -> Iterator[tuple[BinaryIO, Path, Path]]:
    target = Path(path)
    _make_directory(target.parent)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb", buffering=BUFFER_BYTES) as file:
            yield file, temporary, target
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


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
