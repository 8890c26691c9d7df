"""`verify` beside a run that lets old states go, and beside the collector and the compactor: what goes meanwhile may go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest

from opgrpo_data.store import Store
from opgrpo_data.upkeep import compaction
from opgrpo_data.upkeep.garbage import collect
from opgrpo_data.upkeep.verify import Bar, verify
from tests.opgrpo_data.upkeep.whole import iterate, whole_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four iterations, the first two merged and then all."""
    made = whole_store(str(tmp_path / "store"))
    with patch.object(compaction, "MANY_FILES", 1):
        compaction.compact(made)
        for iteration in (2, 3):
            iterate(made, iteration)
        compaction.compact(made)
    return made


def once(action: Callable[[], object]) -> Bar:
    """A progress bar that does something when the files have been listed and none was looked at."""
    actions = [action]

    def bar(tasks: Sequence[str], _: str) -> Iterator[str]:
        while actions:
            actions.pop()()
        yield from tasks

    return bar


@pytest.mark.parametrize("deep", [False, True])
def test_what_may_go_is_not_missed(deep: bool, store: Store) -> None:
    before = {entry.path for entry in store.directory.entries()}

    def go() -> None:
        store.directory.remove_tree(store.directory.list("states/*/*/*.safetensors")[0].rpartition("/")[0])
        collect(store, delete=True, grace=timedelta(0), keep_iterations=1)

    assert verify(store, deep=deep, bar=once(go)).findings == []
    gone = before - {entry.path for entry in store.directory.entries()}
    assert {path.partition("/")[0] for path in gone} == {"states", "trajectories", "catalog"}
    assert verify(store, deep=True).findings == []


def test_what_may_not_go_is(store: Store) -> None:
    tars = [path for path in store.directory.list("trajectories/*/*/*.tar") if "iter=000003" in path]

    def go() -> None:
        for path in tars:
            store.directory.remove(path)

    report = verify(store, deep=True, bar=once(go))
    assert {finding.path for finding in report.findings} == set(tars)
    assert all(finding.problem == "it cannot be read: No such file or directory" for finding in report.findings)
