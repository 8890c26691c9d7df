"""kill -9 at any instant, then the same command again: what is there in the end is what is there where nothing was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opgrpo_data.exchange import export_dataset, import_dataset
from opgrpo_data.exchange.target import MANIFEST, UNFINISHED
from opgrpo_data.io import Directory
from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.seal import read_json
from opgrpo_data.store import Store
from opgrpo_data.upkeep.verify import verify
from tests.opgrpo_data.exchange.made import filled, quarantined, rows_of, same

INSTANTS = 3
"""At which each kind of command is killed, evenly from its first operation on files on."""
VIEWS = ("prompts", "trajectories", "rewards", "reward_errors", "quarantine")

Run = Callable[[list[str], int | None], int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a command in a process of its own, killed at an operation of this number, or never; returns its wait status."""
    words = [sys.executable, "-m", "tests.opgrpo_data.exchange.killed"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, heard = process.stdin, process.stdout

        def call(command: list[str], die_at: int | None = None) -> int:
            told.write(json.dumps({"call": command, "die_at": die_at}) + "\n")
            told.flush()
            return int(heard.readline())

        yield call
        told.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A filled store, one of whose trajectories is in quarantine. Do not change it."""
    store = filled(str(tmp_path_factory.mktemp("source") / "store"), iterations=1)
    quarantined(store, "run-0-i0g1m0")
    return store


def instants(run: Run, command: list[str]) -> Iterator[list[str]]:
    """The command again and again, with a place of its own in place of `{}`, killed each time at another instant."""
    operations = 64
    while run([word.format(f"counted-{operations}") for word in command], operations) == signal.SIGKILL:
        operations *= 2
    for number in range(INSTANTS):
        at = operations * number // INSTANTS
        again = [word.format(f"killed-{at}") for word in command]
        assert run(again, at) == signal.SIGKILL or 2 * at > operations
        yield again


def left(place: Directory) -> dict[str, bytes]:
    """All files but the manifest, unfinished ones too."""
    return {entry.path: place.read(entry.path) for entry in place.entries() if entry.path != MANIFEST}


@pytest.mark.parametrize("form", ["webdataset", "preferences"])
def test_an_export(form: str, run: Run, source: Store, tmp_path: Path) -> None:
    export_dataset(source, str(tmp_path / "whole"), form)
    expected = left(Directory(str(tmp_path / "whole")))
    command = ["export", source.directory.url, f"{tmp_path}/{{}}", form]
    for again in instants(run, command):
        place = Directory(again[2])
        if not place.exists(MANIFEST) or UNFINISHED in read_json(place.read(MANIFEST)):
            assert run(again, None) == 0
        assert left(place) == expected
        assert read_json(place.read(MANIFEST))["trajectories"] == 6


def committed(store: Store) -> set[str]:
    """All published files that something refers to, each tar by its shard: of a killed attempt the tars have no index."""
    found = {path for path in (entry.path for entry in store.directory.entries()) if TEMPORARY_PREFIX not in path}
    tars = {row[part] for row in rows_of(store, "trajectories") for part in ("latents_file", "media_file")}
    return {path for path in found if not path.endswith(".tar")} | {path.rsplit(".", 3)[0] for path in tars}


@pytest.mark.parametrize("form", ["store", "webdataset"])
def test_an_import(form: str, run: Run, source: Store, tmp_path: Path) -> None:
    origin = source.directory.url
    if form == "webdataset":
        origin = str(tmp_path / "tars")
        export_dataset(source, origin, form)
    import_dataset(origin, str(tmp_path / "whole"))
    expected = Store.open(str(tmp_path / "whole"))
    command = ["import", origin, f"{tmp_path}/{{}}"]
    for again in instants(run, command):
        assert run(again, None) == 0
        store = Store.open(again[2])
        assert committed(store) == committed(expected)
        same(store, expected, {view: {"latents_file", "media_file"} for view in VIEWS})
        assert verify(store, deep=True).findings == []
