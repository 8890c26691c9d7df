"""A large object written in parts: bounded memory, and nothing to see of it before it is whole."""

from __future__ import annotations

import io
from contextlib import suppress

from opgrpo_data.places.objects import Objects
from opgrpo_data.places.retries import Server


class Upload(io.RawIOBase):
    """A file to write into. Holds less than two parts in memory. Appears by `finish`; `discard` leaves nothing.

    What fits into one part is one PUT; the rest goes in parts if the place knows such.
    """

    def __init__(self, server: Server, objects: Objects, path: str) -> None:
        super().__init__()
        self._server = server
        self._objects = objects
        self._path = path
        self._url = objects.url(path)
        self._held = bytearray()
        self._upload: str | None = None
        self._tags: list[str] = []
        self._sent = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes written."""
        return self._sent + len(self._held)

    def write(self, data: object) -> int:
        """Take bytes, and send parts as they fill up."""
        with memoryview(data).cast("B") as view:  # type: ignore[arg-type] # any buffer
            parts = self._objects.parts
            if parts is None:
                self._held += view
                return len(view)
            for start in range(0, len(view), parts.size):
                self._held += view[start : start + parts.size]
                if len(self._held) > parts.size:  # more is to come, so that this part is not the last
                    self._send(bytes(self._held[: parts.size]))
                    del self._held[: parts.size]
            return len(view)

    def finish(self) -> None:
        """Make the file appear under its name."""
        rest = bytes(self._held)
        self._held.clear()
        if self._upload is None:
            self._server.ask("write", self._url, lambda: self._objects.put(self._path, rest))
        else:
            self._send(rest)
            self._join(self._upload)

    def discard(self) -> None:
        """Forget what was sent. Where that fails too, the server keeps parts that no one can see."""
        self._held.clear()
        if self._upload is not None and self._objects.parts is not None:
            parts, upload = self._objects.parts, self._upload
            with suppress(OSError):
                self._server.ask("drop the parts of", self._url, lambda: parts.drop(self._path, upload))

    def _send(self, data: bytes) -> None:
        parts = self._objects.parts
        assert parts is not None
        if self._upload is None:
            self._upload = self._server.ask("write", self._url, lambda: parts.start(self._path))
        upload, number = self._upload, len(self._tags) + 1
        self._tags.append(self._server.ask("write", self._url, lambda: parts.put(self._path, upload, number, data)))
        self._sent += len(data)

    def _join(self, upload: str) -> None:
        parts, tries = self._objects.parts, 0
        assert parts is not None

        def join() -> None:
            nonlocal tries
            tries += 1
            parts.join(self._path, upload, self._tags)

        try:
            self._server.ask("write", self._url, join)
        except FileNotFoundError:
            # Joined already, if the answer to an earlier try was lost; and then the object is there and as long as ours.
            if tries == 1 or self._server.ask("write", self._url, lambda: self._objects.size(self._path)) != self._sent:
                raise
