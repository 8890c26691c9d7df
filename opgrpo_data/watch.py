"""Which index files came since one last looked, at the cost of what changed and not of all there is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.store import TABLES, Store

SETTLED_SECONDS = 2.0
"""The coarsest clock of a filesystem: two changes within it may leave a folder with one and the same time."""

RELIST_SECONDS = 60.0
"""Some filesystems do not change a folder's time when a file comes: so often everything is listed all the same."""


@dataclass
class _Folder:
    """A folder as last listed. modified: its time then, first seen at `since`; listed: when (both by our own clock).

    everything: all names in it; names: those that match.
    """

    modified: int
    since: float
    listed: float
    everything: set[str]
    names: set[str]

    def holds(self, modified: int, moment: float) -> bool:
        """Whether the listing is still complete: no file can have come that the folder's time would not tell."""
        settled = self.listed - self.since >= SETTLED_SECONDS
        return settled and modified == self.modified and moment - self.listed < RELIST_SECONDS


class Watch:
    """The index files of one kind that its user has not taken yet. reward: only of this reward.

    On a disk, folders whose time has not changed are not listed again; on an object store everything is listed.
    """

    def __init__(self, store: Store, kind: str, reward: str = "*") -> None:
        self._store = store
        self._kind, self._reward = kind, reward
        self._parts = TABLES[kind].pattern.replace("reward=*", f"reward={reward}").split("/")
        self._folders: dict[str, _Folder] = {}
        self._taken: set[str] = set()
        self._pending: set[str] = set()

    def pending(self) -> list[str]:
        """Files that are there and not taken, sorted."""
        found = self._walk(self._parts[0], self._parts[1:]) if self._store.directory.local else self._listed()
        self._pending |= {path for path in found if path not in self._taken}
        return sorted(self._pending)

    def take(self, paths: Iterable[str]) -> None:
        """These files are dealt with."""
        self._taken.update(paths)
        self._pending.difference_update(self._taken)

    def _listed(self) -> list[str]:
        return self._store.files(self._kind, reward=self._reward)

    def _walk(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Files that were not there at the last look."""
        names, new = self._names(folder, parts[0])
        if len(parts) == 1:
            yield from (f"{folder}/{name}" for name in new)
            return
        for name in names:
            yield from self._walk(f"{folder}/{name}", parts[1:])

    def _names(self, folder: str, pattern: str) -> tuple[set[str], set[str]]:
        """Names in a folder that match, and those of them that were not there at the last look."""
        path, moment = self._store.directory.path(folder), time.monotonic()
        known = self._folders.get(folder, _Folder(0, moment, moment, set(), set()))
        try:
            modified = os.stat(path).st_mtime_ns  # noqa: PTH116 a Path for each of thousands of folders takes longer
            if known.holds(modified, moment):
                return known.names, set()
            everything = set(os.listdir(path))  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return set(), set()
        come = everything - known.everything
        new = {name for name in come if fnmatchcase(name, pattern) and not name.startswith(TEMPORARY_PREFIX)}
        since = known.since if modified == known.modified else moment
        self._folders[folder] = _Folder(modified, since, moment, everything, (known.names & everything) | new)
        return self._folders[folder].names, new
