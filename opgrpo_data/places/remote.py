"""Files on an object store: conditional PUT, ranged GET, many at once, again after failures.

Memory: reading ranges holds READING_BYTES beyond what it fills, whatever is asked for; a file being written holds two parts.
"""

from __future__ import annotations

import errno
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import translate
from functools import partial
from glob import has_magic
from typing import BinaryIO, cast

from fsspec import AbstractFileSystem

from opgrpo_data.places.files import Entry, Range
from opgrpo_data.places.objects import FsspecObjects, Objects, Page
from opgrpo_data.places.retries import Patience, Server
from opgrpo_data.places.upload import Upload

CONCURRENT = 32
PIECE_BYTES = 2 * 1024 * 1024
READING_BYTES = CONCURRENT * PIECE_BYTES
"""Requests under way at once, the most that one of them asks for, and with that the most that is under way."""

GAP_BYTES = 128 * 1024
"""Ranges nearer than this are read as one: these bytes come faster than another answer."""

DELETED_AT_ONCE = 1000


@dataclass
class _Piece:
    """One request: bytes start .. stop - 1 of a file, and the places they go to: (offset in the file, bytes, which range,
    offset in the destination)."""

    file: str
    start: int
    stop: int
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)


class RemoteFiles:
    """`Files` of an fsspec filesystem: s3://, gs://, memory:// and the like."""

    def __init__(self, filesystem: AbstractFileSystem, patience: Patience | None = None) -> None:
        patience = patience or Patience()
        self.objects = _objects(filesystem, patience)
        self.server = Server(patience)

    def exists(self, path: str) -> bool:
        """See Files."""
        url = self.objects.url(path)
        if self.server.ask("look for", url, lambda: self.objects.size(path)) is not None:
            return True
        page = self.server.ask("look for", url, lambda: self.objects.page(path, deep=False))
        return bool(page.files or page.folders)

    def glob(self, root: str, pattern: str) -> list[str]:
        """See Files. As on a disk, a wildcard matches no leading dot.

        One level is listed as such. A pattern over several is matched to all files below: that is one request for a thousand
        files, and not one for each folder.
        """
        parts = pattern.split("/")
        fixed = next((i for i, part in enumerate(parts) if has_magic(part)), None)
        if fixed is None:
            return [pattern] if self.exists(f"{root}/{pattern}") else []
        matchers = [re.compile(translate(part) if part.startswith(".") else f"(?!\\.){translate(part)}") for part in parts]
        found: set[str] = set()
        for page in self._pages("/".join([root, *parts[:fixed]]), deep=len(parts) > fixed + 1):
            for path in [*(entry.path for entry in page.files), *page.folders]:
                names = path[len(root) + 1 :].split("/")[: len(parts)]
                if len(names) == len(parts) and all(map(re.Pattern.match, matchers, names)):
                    found.add("/".join(names))
        return sorted(found)

    def entries(self, root: str, folder: str) -> list[Entry]:
        """See Files."""
        pages = self._pages(f"{root}/{folder}".rstrip("/"), deep=True)
        cut = len(root) + 1
        return [Entry(entry.path[cut:], entry.size, entry.modified) for page in pages for entry in page.files]

    def read(self, path: str) -> bytes:
        """See Files."""
        return self._read(path, 0, None)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See Files."""
        return self._read(path, offset, length)

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> list[int]:
        """See Files. Near ranges are read together, large ones in pieces, CONCURRENT requests at once."""
        found = [0] * len(ranges)
        pieces = _pieces(ranges)

        def fill(piece: _Piece) -> list[tuple[int, int]]:
            try:
                data, _ = self._get(piece.file, piece.start, piece.stop)
            except FileNotFoundError:
                return []
            counts = []
            for offset, length, which, place in piece.targets:
                part = memoryview(data)[offset - piece.start :][:length]
                into[place : place + len(part)] = part
                counts.append((which, len(part)))
            return counts

        if len(pieces) == 1:
            answers = map(fill, pieces)
            return _counted(found, answers)
        with ThreadPoolExecutor(max(1, min(CONCURRENT, len(pieces))), "opgrpo-read") as pool:
            return _counted(found, pool.map(fill, pieces))

    @contextmanager
    def write_atomic(self, path: str) -> Iterator[BinaryIO]:
        """See Files. One PUT when the block ends, or parts that are joined then."""
        upload = Upload(self.server, self.objects, path)
        try:
            yield cast(BinaryIO, upload)
            upload.finish()
        except BaseException:
            upload.discard()
            raise

    def publish(self, path: str, data: bytes) -> bool:
        """See Files. A conditional PUT, and exactly one of many callers is told True, even where they bring equal bytes.

        A try whose answer is lost may have written the file, and then the next one finds the name taken: by us, which the
        mark tells.
        """
        mark = secrets.token_hex(16)
        try:
            self.server.ask("publish", self.objects.url(path), lambda: self.objects.create(path, data, mark))
        except FileExistsError:
            return False
        return True

    def remove(self, path: str) -> None:
        """See Files."""
        self.server.ask("remove", self.objects.url(path), lambda: self.objects.delete([path]))

    def remove_tree(self, path: str) -> None:
        """See Files."""
        # All names first: a listing goes on where it was, and some servers lose that place when files before it vanish.
        names = [entry.path for page in self._pages(path.rstrip("/"), deep=True) for entry in page.files]
        for start in range(0, len(names), DELETED_AT_ONCE):
            batch = names[start : start + DELETED_AT_ONCE]
            self.server.ask("remove", self.objects.url(path), partial(self.objects.delete, batch))

    def _pages(self, folder: str, *, deep: bool) -> Iterator[Page]:
        url, after = self.objects.url(folder), None
        while True:
            page = self.server.ask("list", url, partial(self.objects.page, folder, deep=deep, after=after))
            yield page
            if (after := page.more) is None:
                return

    def _get(self, path: str, start: int, stop: int) -> tuple[bytes, int]:
        return self.server.ask("read", self.objects.url(path), lambda: self.objects.get(path, start, stop))

    def _read(self, path: str, offset: int, length: int | None) -> bytes:
        """Bytes from `offset`, all of them where `length` is None. The first answer tells how many there are."""
        if length == 0:
            offset, length = 0, 1  # no range is empty; but a file that is not there must be told of
            return self._read(path, offset, length)[:0]
        first, size = self._get(path, offset, offset + min(PIECE_BYTES, PIECE_BYTES if length is None else length))
        wanted = max(0, size - offset if length is None else min(length, size - offset))
        if len(first) >= wanted:
            return first
        data = bytearray(wanted)
        data[: len(first)] = first
        rest = memoryview(data)[len(first) :]
        if self.read_ranges([Range(path, offset + len(first), len(rest))], rest) != [len(rest)]:
            raise FileNotFoundError(errno.ENOENT, "the file was removed while it was read", self.objects.url(path))
        return bytes(data)


def _objects(filesystem: AbstractFileSystem, patience: Patience) -> Objects:
    if "s3" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        from opgrpo_data.places.s3 import S3Objects

        return S3Objects(filesystem, patience)
    return FsspecObjects(filesystem)


def _pieces(ranges: Sequence[Range]) -> list[_Piece]:
    """The requests for some ranges: near ones together, none longer than PIECE_BYTES."""
    parts: list[tuple[str, int, int, int, int]] = []  # file, offset, length, which range, offset in the destination
    place = 0
    for which, wanted in enumerate(ranges):
        for start in range(0, wanted.length, PIECE_BYTES):
            length = min(PIECE_BYTES, wanted.length - start)
            parts.append((wanted.file, wanted.offset + start, length, which, place + start))
        place += wanted.length
    pieces: list[_Piece] = []
    for file, offset, length, which, target in sorted(parts):
        last = pieces[-1] if pieces else None
        stop = offset + length
        if last is None or last.file != file or offset > last.stop + GAP_BYTES or stop > last.start + PIECE_BYTES:
            last = _Piece(file, offset, stop)
            pieces.append(last)
        last.stop = max(last.stop, stop)
        last.targets.append((offset, length, which, target))
    return pieces


def _counted(found: list[int], answers: Iterator[list[tuple[int, int]]]) -> list[int]:
    for counts in answers:
        for which, count in counts:
            found[which] += count
    return found
