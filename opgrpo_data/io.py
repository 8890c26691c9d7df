"""All path handling and every byte written: atomic files, put-if-absent, ranged reads. Paths go through fsspec.

Two kinds of write exist. `write_atomic` makes a whole file appear under its name at once (temporary name, fsync, rename,
directory fsync; one PUT on an object store). `publish` does the same but never replaces: whoever comes second learns that
the name is taken. A commit is a `publish`.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from opgrpo_data.errors import StoreError

BUFFER_BYTES = 256 * 1024
TEMPORARY_PREFIX = ".tmp-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checked_name(name: str, what: str) -> str:
    """Return `name` if it is safe as one component of a path, else raise ValueError.

    Names that reach paths come from users and from stored data: nothing with a slash, a leading dot or an odd character
    may pass.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} cannot be part of a path: use letters, digits, '.', '_' and '-' (128 at most)")
    return name


class Directory:
    """A directory or bucket prefix: relative paths in, bytes out. The only class that knows where files lie."""

    def __init__(self, url: str) -> None:
        try:
            self.filesystem, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"cannot reach the store {url!r}: {error}") from error
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self.url = self.root if self.local else url

    def same_as(self, other: Directory) -> bool:
        """Whether both are one place, by another name perhaps."""
        if self.local and other.local:
            return Path(self.root).resolve() == Path(other.root).resolve()
        return self.local == other.local and self.root == other.root and self.url.rstrip("/") == other.url.rstrip("/")

    def path(self, relative: str) -> str:
        """The filesystem's own path of `relative`; refuses to leave the directory."""
        if relative.startswith("/") or ".." in relative.split("/"):
            raise StoreError(f"path {relative!r} leads out of {self.url}")
        return f"{self.root}/{relative}"

    def exists(self, relative: str) -> bool:
        """Whether a file of that name has been published."""
        return bool(self.filesystem.exists(self.path(relative)))

    def list(self, pattern: str) -> list[str]:
        """Relative paths of the published files that match a glob, sorted."""
        prefix = f"{self.root}/"
        # Only the pattern may hold wildcards: a store can lie in a folder named `runs[1]`.
        wanted = glob.escape(self.root) + self.path(pattern).removeprefix(self.root)
        found = [str(path) for path in self.filesystem.glob(wanted)]
        names = [path.removeprefix(prefix) for path in found]
        return sorted(name for name in names if not name.rpartition("/")[2].startswith(TEMPORARY_PREFIX))

    def read(self, relative: str) -> bytes:
        """The whole file."""
        return bytes(self.filesystem.cat_file(self.path(relative)))

    def read_range(self, relative: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`: fewer only where the file ends."""
        if self.local:
            with Path(self.path(relative)).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        return bytes(self.filesystem.cat_file(self.path(relative), start=offset, end=offset + length))

    @contextmanager
    def write_atomic(self, relative: str) -> Iterator[BinaryIO]:
        """A file to write into that appears under its name, whole and on disk, when the block ends without an error."""
        if not self.local:
            path, buffer = self.path(relative), io.BytesIO()
            yield buffer
            self.filesystem.pipe_file(path, buffer.getvalue())
            return
        with self._temporary(relative) as (file, temporary, target):
            yield file
            _sync(file)
            temporary.replace(target)
            _sync_directory(target.parent)

    def publish(self, relative: str, data: bytes) -> bool:
        """Create the file with these bytes unless the name is taken. True if we created it.

        Locally a hard link of a finished temporary file: atomic, and it fails when the name exists. Remotely a
        conditional PUT, which servers refuse as FileExistsError or as EINVAL; EINVAL can also mean something else, and
        then the error is raised.
        """
        if not self.local:
            try:
                self.filesystem.pipe_file(self.path(relative), data, mode="create")
            except OSError as error:
                if isinstance(error, FileExistsError) or (error.errno == errno.EINVAL and self.exists(relative)):
                    return False
                raise
            return True
        with self._temporary(relative) as (file, temporary, target):
            file.write(data)
            _sync(file)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_directory(target.parent)
            return True

    def remove_tree(self, relative: str) -> None:
        """Remove a directory and all below it, if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.rm(self.path(relative), recursive=True)

    @contextmanager
    def _temporary(self, relative: str) -> Iterator[tuple[BinaryIO, Path, Path]]:
        target = Path(self.path(relative))
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
