"""What RemoteFiles asks of an object store. `FsspecObjects` is any filesystem of fsspec; `s3` beside it speaks S3 itself."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from fsspec import AbstractFileSystem

from opgrpo_data.places.files import Entry


@dataclass(frozen=True)
class Page:
    """A piece of a listing. files: with full paths. folders: full paths. more: what asks for the next page; None, the last."""

    files: list[Entry]
    folders: list[str]
    more: str | None = None


class Parts(Protocol):
    """An object written in parts. It appears when they are joined."""

    size: int
    """Bytes of every part but the last."""

    def start(self, path: str) -> str:
        """Begin an object; returns what its parts name it by."""
        ...

    def put(self, path: str, upload: str, number: int, data: bytes) -> str:
        """Send part `number`, from 1; returns its tag."""
        ...

    def join(self, path: str, upload: str, tags: Sequence[str]) -> None:
        """Make the object appear, whole. FileNotFoundError where nothing was begun, or it is joined or dropped already."""
        ...

    def drop(self, path: str, upload: str) -> None:
        """Forget what was sent."""
        ...


class Objects(Protocol):
    """One try each; who asks again after a failure is RemoteFiles. Paths are bucket/key."""

    parts: Parts | None
    """None where objects can only be written whole."""

    def url(self, path: str) -> str:
        """How errors name an object."""
        ...

    def get(self, path: str, start: int, stop: int) -> tuple[bytes, int]:
        """Bytes start .. stop - 1, fewer where the object ends, and the object's size. Raises FileNotFoundError."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Write an object whole."""
        ...

    def create(self, path: str, data: bytes, mark: str) -> None:
        """Write an object whole unless the name is taken, which the server decides: then FileExistsError.

        Not where the object that is there bears the same mark: an earlier try made it. A place without marks cannot tell.
        """
        ...

    def size(self, path: str) -> int | None:
        """Bytes of an object; None where there is none."""
        ...

    def page(self, folder: str, *, deep: bool, after: str | None = None) -> Page:
        """What lies in a folder, or with `deep` all files below it; nothing where there is no such folder."""
        ...

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects, 1,000 at most; those that are not there are no error."""
        ...


class FsspecObjects:
    """Objects of an fsspec filesystem. Whether `create` is atomic, is theirs to say: memory:// looks, then writes."""

    parts: Parts | None = None

    def __init__(self, filesystem: AbstractFileSystem) -> None:
        self.filesystem = filesystem

    def url(self, path: str) -> str:
        """See Objects."""
        return str(self.filesystem.unstrip_protocol(path))

    def get(self, path: str, start: int, stop: int) -> tuple[bytes, int]:
        """See Objects."""
        return bytes(self.filesystem.cat_file(path, start=start, end=stop)), int(self.filesystem.size(path))

    def put(self, path: str, data: bytes) -> None:
        """See Objects."""
        self.filesystem.pipe_file(path, data)

    def create(self, path: str, data: bytes, mark: str) -> None:
        """See Objects. A name that is taken may be told as EINVAL, which can also mean something else."""
        try:
            self.filesystem.pipe_file(path, data, mode="create")
        except OSError as error:
            if error.errno == errno.EINVAL and self.size(path) is not None:
                raise FileExistsError(path) from error
            raise

    def size(self, path: str) -> int | None:
        """See Objects."""
        with suppress(FileNotFoundError):
            told = self.filesystem.info(path)
            return int(told["size"]) if told["type"] == "file" else None
        return None

    def page(self, folder: str, *, deep: bool, after: str | None = None) -> Page:
        """See Objects. Everything is one page."""
        found: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            found = (
                list(self.filesystem.find(folder, detail=True).values()) if deep else self.filesystem.ls(folder, detail=True)
            )
        files = [Entry(_path(told), int(told["size"]), _modified(told)) for told in found if told["type"] == "file"]
        return Page(files, [_path(told) for told in found if told["type"] == "directory"])

    def delete(self, paths: Sequence[str]) -> None:
        """See Objects."""
        for path in paths:
            with suppress(FileNotFoundError):
                self.filesystem.rm_file(path)


def _path(told: dict[str, Any]) -> str:
    return str(told["name"]).rstrip("/")


def _modified(told: dict[str, Any]) -> datetime:
    """When a file was written, by whichever name the filesystem tells it."""
    moment = next(told[name] for name in ("LastModified", "last_modified", "mtime", "created") if told.get(name) is not None)
    moment = datetime.fromtimestamp(moment, UTC) if isinstance(moment, int | float) else moment
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
