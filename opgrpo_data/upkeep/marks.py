"""Which trajectories are needed: by the runs as they go on, by the last iterations, by pins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opgrpo_data.store import Store

PLACE = re.compile(r"(?P<kind>[a-z]+)/run=(?P<run>[^/]+)/iter=(?P<iteration>\d+)[./]")
IMPORTED = "-imported"
"""The buffer that a run imported lies under its name with this behind it."""


@dataclass(frozen=True)
class Marks:
    """trajectories: ids that some buffer or plan needs. shards: index files of shards that are needed whole."""

    trajectories: set[str]
    shards: set[str]


@dataclass(frozen=True)
class _File:
    path: str
    run: str
    iteration: int


def mark(store: Store, keep_iterations: int) -> Marks:
    """What must stay.

    Of every run: its last buffer, and the buffers of its last `keep_iterations` iterations; the plans of these and all that
    are not trained yet; the shards of these. A run that reuses groups needs as many iterations as it looks back. Of a pinned
    run all shards, buffers and plans.
    """
    files = {kind: _files(store, kind) for kind in ("trajectories", "buffers", "plans", "updates")}
    newest: dict[str, int] = {}
    for file in (file for found in files.values() for file in found):
        newest[file.run] = max(newest.get(file.run, 0), file.iteration)
    keep = {run: max(keep_iterations, asked) for run, asked in _looking_back(store).items()}
    pins = store.pins()
    pinned = pins | {f"{run}{IMPORTED}" for run in pins}

    def recent(file: _File) -> bool:
        return file.run in pinned or file.iteration > newest[file.run] - keep.get(file.run, keep_iterations)

    trained = {(file.run, file.iteration) for file in files["updates"]}
    last = {file.run: file for file in files["buffers"]}  # sorted: the last of each run stays
    buffers = [file.path for file in files["buffers"] if recent(file) or file is last[file.run]]
    plans = [file.path for file in files["plans"] if recent(file) or (file.run, file.iteration) not in trained]
    needed = {*_ids(store, "buffers", buffers), *_ids(store, "plans", plans)}
    return Marks(needed, {file.path for file in files["trajectories"] if recent(file)})


def _files(store: Store, kind: str) -> list[_File]:
    matches = [(path, PLACE.match(path)) for path in store.files(kind)]
    return [_File(path, match["run"], int(match["iteration"])) for path, match in matches if match]


def _looking_back(store: Store) -> dict[str, int]:
    """Per run the iterations that group reuse brings back, the present one among them."""
    replay: dict[str, dict[str, Any]] = {d["run_id"]: d["config"].get("replay", {}) for d in store.documents("runs/*.json")}
    return {run: int(settings.get("reuse_iterations") or 0) + 1 for run, settings in replay.items()}


def _ids(store: Store, kind: str, paths: Iterable[str]) -> Iterable[str]:
    for path in paths:
        yield from store.read_tables(kind, [path])["trajectory_id"].unique().to_pylist()
