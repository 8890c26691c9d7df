"""A directory or bucket prefix: relative paths in, bytes out. Every path of a store is checked here.

Two kinds of write exist. `write_atomic` makes a whole file appear under its name at once (temporary name, fsync, rename,
directory fsync; one PUT on an object store). `publish` does the same but never replaces: whoever comes second learns that
the name is taken. A commit is a `publish`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from opgrpo_data.errors import StoreError
from opgrpo_data.places.files import TEMPORARY_PREFIX, Entry, Files, Range
from opgrpo_data.places.local import LocalFiles
from opgrpo_data.places.remote import RemoteFiles
from opgrpo_data.places.retries import CREDENTIALS
from opgrpo_data.places.s3 import s3_options

WITH_PASSWORD = re.compile(r"://[^/@:]*:[^@]*@")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checked_name(name: str, what: str) -> str:
    """Return `name` if it is safe as one component of a path, else raise ValueError.

    Names that reach paths come from users and from stored data: nothing with a slash, a leading dot or an odd character
    may pass.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} cannot be part of a path: use letters, digits, '.', '_' and '-' (128 at most)")
    return name


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, and the path in it. A URL is printed and stored, so one with a password in it is refused."""
    if not url.strip():
        raise StoreError(f"the place {url!r} is empty: name a directory or a bucket prefix, for example s3://BUCKET/PREFIX")
    if WITH_PASSWORD.search(url):
        shown = WITH_PASSWORD.sub("://...@", url)
        raise StoreError(f"the store's URL {shown} holds a password, and URLs are kept: leave it out; {CREDENTIALS}")
    s3 = url.startswith(("s3://", "s3a://"))
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **(s3_options() if s3 else {}))
    except ImportError as error:
        raise StoreError(f"cannot reach the store {url!r}: {error}" + (': pip install "opgrpo[s3]"' if s3 else "")) from error
    except ValueError as error:
        raise StoreError(f"cannot reach the store {url!r}: {error}") from error
    if s3 and not root.partition("/")[0]:
        raise StoreError(f"the store's URL {url!r} names no bucket: give s3://BUCKET/PREFIX")
    return filesystem, root


class Directory:
    """A place and the files in it. The only class that knows where files lie."""

    def __init__(self, url: str) -> None:
        self._filesystem, self.root = _filesystem(url)
        self.local = isinstance(self._filesystem, LocalFileSystem)
        self.files: Files = LocalFiles() if self.local else RemoteFiles(self._filesystem)
        self.url = self.root if self.local else url

    def contains(self, other: Directory) -> bool:
        """Whether `other` is this place, by another name perhaps, or lies in it."""
        if self.local and other.local:
            return Path(other.root).resolve().is_relative_to(Path(self.root).resolve())
        # Two servers may have equal paths.
        return self._filesystem == other._filesystem and f"{other.root}/".startswith(f"{self.root.rstrip('/')}/")

    def path(self, relative: str) -> str:
        """The full path of `relative`; refuses to leave the directory."""
        if relative.startswith("/") or ".." in relative.split("/"):
            raise StoreError(f"path {relative!r} leads out of {self.url}")
        return f"{self.root}/{relative}"

    def exists(self, relative: str) -> bool:
        """Whether a file of that name has been published."""
        return self.files.exists(self.path(relative))

    def list(self, pattern: str) -> list[str]:
        """Relative paths of the published files that match a glob, sorted."""
        self.path(pattern)
        found = self.files.glob(self.root, pattern)
        return sorted(name for name in found if not name.rpartition("/")[2].startswith(TEMPORARY_PREFIX))

    def entries(self, folder: str = "") -> Sequence[Entry]:
        """Every file below a folder, unfinished ones too, sorted by path."""
        self.path(folder)
        return sorted(self.files.entries(self.root, folder), key=lambda entry: entry.path)

    def read(self, relative: str) -> bytes:
        """The whole file."""
        return self.files.read(self.path(relative))

    def read_range(self, relative: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`: fewer only where the file ends."""
        return self.files.read_range(self.path(relative), offset, length)

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> Sequence[int]:
        """Fill `into` with ranges of files, one behind the other; returns the bytes found of each, 0 where there is no file."""
        full = {file: self.path(file) for file in {wanted.file for wanted in ranges}}
        ranges = [Range(full[file], offset, length) for file, offset, length in ranges]
        return self.files.read_ranges(ranges, into)

    def write_atomic(self, relative: str) -> AbstractContextManager[BinaryIO]:
        """A file to write into that appears under its name, whole and on disk, when the block ends without an error."""
        return self.files.write_atomic(self.path(relative))

    def publish(self, relative: str, data: bytes) -> bool:
        """Create the file with these bytes unless the name is taken. True if we created it."""
        return self.files.publish(self.path(relative), data)

    def remove(self, relative: str) -> None:
        """Remove a file, if it is there."""
        self.files.remove(self.path(relative))

    def remove_tree(self, relative: str) -> None:
        """Remove a directory and all below it, if it is there."""
        self.files.remove_tree(self.path(relative))
