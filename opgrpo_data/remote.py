"""Files on an object store, through fsspec: conditional PUT, ranged GET."""

from __future__ import annotations

import errno
import glob
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

from opgrpo_data.files import Entry, Range


class RemoteFiles:
    """`Files` of an fsspec filesystem: s3://, gs://, memory:// and the like."""

    def __init__(self, filesystem: AbstractFileSystem) -> None:
        self.filesystem = filesystem

    def exists(self, path: str) -> bool:
        """See Files."""
        return bool(self.filesystem.exists(path))

    def glob(self, root: str, pattern: str) -> list[str]:
        """See Files."""
        # Only the pattern may hold wildcards: a store can lie in a folder named `runs[1]`.
        found = self.filesystem.glob(f"{glob.escape(root)}/{pattern}")
        return [str(path).removeprefix(f"{root}/") for path in found]

    def entries(self, root: str, folder: str) -> list[Entry]:
        """See Files."""
        found = self.filesystem.find(f"{root}/{folder}".rstrip("/"), detail=True)
        return [Entry(str(path).removeprefix(f"{root}/"), int(told["size"]), _modified(told)) for path, told in found.items()]

    def read(self, path: str) -> bytes:
        """See Files."""
        return bytes(self.filesystem.cat_file(path))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See Files."""
        return bytes(self.filesystem.cat_file(path, start=offset, end=offset + length))

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> list[int]:
        """See Files."""
        found, start = [], 0
        for wanted in ranges:
            data = b""
            with suppress(FileNotFoundError):
                data = self.read_range(wanted.file, wanted.offset, wanted.length)
            into[start : start + len(data)] = data
            found.append(len(data))
            start += wanted.length
        return found

    @contextmanager
    def write_atomic(self, path: str) -> Iterator[BinaryIO]:
        """See Files. One PUT when the block ends."""
        buffer = io.BytesIO()
        yield buffer
        self.filesystem.pipe_file(path, buffer.getvalue())

    def publish(self, path: str, data: bytes) -> bool:
        """See Files. A conditional PUT, which servers refuse as FileExistsError or as EINVAL; EINVAL can also mean something
        else, and then the error is raised."""
        try:
            self.filesystem.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or (error.errno == errno.EINVAL and self.exists(path)):
                return False
            raise
        return True

    def remove(self, path: str) -> None:
        """See Files."""
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(path)

    def remove_tree(self, path: str) -> None:
        """See Files."""
        with suppress(FileNotFoundError):
            self.filesystem.rm(path, recursive=True)


def _modified(told: dict[str, Any]) -> datetime:
    """When a file was written, by whichever name the filesystem tells it."""
    moment = next(told[name] for name in ("LastModified", "last_modified", "mtime", "created") if told.get(name) is not None)
    moment = datetime.fromtimestamp(moment, UTC) if isinstance(moment, int | float) else moment
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
