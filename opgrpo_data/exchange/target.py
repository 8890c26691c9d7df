"""The place that an export is written to: claimed first, filled file by file, and finished by its manifest.

    opgrpo-export.json      at first a claim: an export is under way here, or was cut short; at the end the manifest

An export that was cut short is begun anew in its place. Of two at once the later has the place, and the earlier stops.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from opgrpo_data.checks import read_object
from opgrpo_data.errors import StoreError
from opgrpo_data.exchange.card import is_card
from opgrpo_data.io import Directory
from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.seal import sealed_json

MANIFEST = "opgrpo-export.json"
FORMAT = "opgrpo-export"
VERSION = "1.0"
UNFINISHED = "unfinished"
"""A key that only a claim has: what tells it from others."""
CARD = "README.md"
_WRITTEN = re.compile(
    rf"{re.escape(CARD)}|trajectories-\d{{5,}}\.tar|data/train-\d{{5,}}-of-\d{{5,}}\.parquet|(data/)?{re.escape(TEMPORARY_PREFIX)}[0-9a-f]+"
)
"""All that an export writes besides its manifest."""


class Target:
    """A place to write a dataset to. Raises StoreError where it is not empty and holds no export that was cut short."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._check_free()
        self._claim = sealed_json({"format": FORMAT, "version": VERSION, UNFINISHED: secrets.token_hex(16)})

    def claim(self) -> None:
        """Begin: from now on the place is this export's. What an earlier one left is removed, and nothing else.

        Raises StoreError as the constructor does.
        """
        if not self.directory.publish(MANIFEST, self._claim):
            self._check_free()
            with self.directory.write_atomic(MANIFEST) as file:
                file.write(self._claim)
        self._clear()

    @contextmanager
    def write_atomic(self, path: str) -> Iterator[BinaryIO]:
        """A file that appears under its name when the block ends without an error. Raises StoreError when another export has
        begun here meanwhile."""
        with self.directory.write_atomic(path) as file:
            yield file
            self._check_claim()

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest in place of the claim. Raises StoreError as `write_atomic` does."""
        with self.write_atomic(MANIFEST) as file:
            file.write(sealed_json(manifest, indent=1))

    def abandon(self) -> None:
        """Leave the place empty. Raises StoreError as `write_atomic` does."""
        self._check_claim()
        self._clear()
        self.directory.remove(MANIFEST)

    def _check_free(self) -> None:
        """Raise StoreError unless there is nothing, or what an export that was cut short left."""
        place, url = self.directory, self.directory.url
        if place.exists(MANIFEST):
            if UNFINISHED not in read_object(place, MANIFEST):
                raise StoreError(f"{url} holds an export already: choose another folder")
            if place.exists(CARD) and not is_card(place.read(CARD)):
                raise StoreError(f"{url} holds an unfinished export and a {CARD} that is not its own: move that away first")
        elif any(not entry.path.rpartition("/")[2].startswith(TEMPORARY_PREFIX) for entry in place.entries()):
            raise StoreError(f"{url} is not empty, and holds no unfinished export: choose another folder")

    def _check_claim(self) -> None:
        if not self.directory.exists(MANIFEST) or self.directory.read(MANIFEST) != self._claim:
            raise StoreError(f"another export to {self.directory.url} began meanwhile and has the place: leave it to finish")

    def _clear(self) -> None:
        """Remove the files of an unfinished export, by the names that only an export gives."""
        for entry in self.directory.entries():
            if _WRITTEN.fullmatch(entry.path):
                self.directory.remove(entry.path)
