"""`gc`: leftovers by their age, trajectories by their marks; nothing that is needed goes, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from opgrpo_data import generations
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.exchange.importing import import_dataset
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, index_of, iteration_folder
from opgrpo_data.upkeep import compaction
from opgrpo_data.upkeep.garbage import Garbage, collect
from opgrpo_data.upkeep.marks import Marks, mark
from opgrpo_data.upkeep.verify import verify
from tests.opgrpo_data.crashing_writer import die_at
from tests.opgrpo_data.factories import RUN, folder, overwrite, plan, plan_rule, records, rewards, shard_rows
from tests.opgrpo_data.upkeep.whole import files_of, iterate, train, whole_store

DAY = timedelta(days=1)
NONE = timedelta(0)


def index(iteration: int, run: str = RUN) -> str:
    """The index of an iteration's only shard."""
    return f"{folder(iteration).replace(RUN, run)}/00000.parquet"


def dropped(found: Garbage) -> list[str]:
    """Indexes of the shards that were, or would be, dropped."""
    return [item.path for item in found.shards]


def drop(store: Store, keep: int) -> list[str]:
    """Collect for real; returns the indexes of what was dropped."""
    return dropped(collect(store, delete=True, grace=DAY, keep_iterations=keep))


def readable(store: Store) -> set[str]:
    """Indexes of the shards whose trajectories read back."""
    found = set()
    for row in shard_rows(store):
        try:
            location = LatentLocation.of(row)
            read_latents(store.directory, location, 0, len(location.checksums) - 1)
            read_media(store.directory, row)
        except CorruptionError as error:
            assert error.reason == "missing"  # noqa: PT017  the others are what is asked for
        else:
            found.add(index_of(row["latents_file"]))
    return found


def age(store: Store, path: str, hours: float) -> None:
    """Set a file's time back."""
    then = time.time() - hours * 3600
    os.utime(store.directory.path(path), (then, then))


# -- leftovers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations of a run, all of them trained. Do not change it."""
    place = tmp_path_factory.mktemp("four") / "store"
    whole_store(str(place), iterations=4)
    return place


@pytest.fixture
def store(four: Path, tmp_path: Path) -> Store:
    """A store of one's own, with these four iterations."""
    return copied(four, tmp_path / "store")


def copied(source: Path, place: Path) -> Store:
    """A copy of a store."""
    shutil.copytree(source, place)
    return Store.open(str(place))


LEFTOVERS = {
    "trajectories/.tmp-0123456789abcdef": "unfinished file",
    f"{folder()}/00000.0badc0de.latents.tar": "tar that no index names",
    f"{folder()}/00007.0badc0de.media.tar": "tar that no index names",
    "policies/lost/weights.safetensors": "weights of a policy that was never registered",
}


def test_leftovers_go_when_they_are_old(store: Store) -> None:
    before = files_of(store)
    assert collect(store, delete=True, grace=DAY).files == []
    for path in LEFTOVERS:
        overwrite(store.directory, path, b"leftover")
    assert collect(store, delete=True, grace=DAY).files == []  # it may be under way
    for path in LEFTOVERS:
        age(store, path, 25)
    for delete in (False, True):
        found = collect(store, delete=delete, grace=DAY)
        assert {item.path: (item.bytes, item.reason) for item in found.files} == {
            path: (len(b"leftover"), reason) for path, reason in LEFTOVERS.items()
        }
        assert (found.bytes, found.deleted, found.shards) == (4 * len(b"leftover"), delete, [])
    assert files_of(store) == before


def test_what_is_published_stays_however_old(store: Store) -> None:
    before = files_of(store)
    for path in before:
        age(store, path, 10_000)
    assert collect(store, delete=True, grace=NONE).files == []
    assert files_of(store) == before


def test_a_dry_run_changes_nothing(store: Store) -> None:
    overwrite(store.directory, "policies/lost/weights.safetensors", b"")
    before = files_of(store)
    found = collect(store, delete=False, grace=NONE, keep_iterations=1)
    assert [item.path for item in found.files] == ["policies/lost/weights.safetensors"]
    assert dropped(found) == [index(1), index(2)]
    assert files_of(store) == before


@pytest.mark.parametrize("days", [-4000, 4000])
def test_ages_are_told_by_the_clock_of_the_place(days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's clock that is years off makes nothing old, and nothing young for ever."""
    shift = timedelta(days=days)

    class ServerTime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> ServerTime:
            return cls.fromtimestamp((datetime.now(tz) + shift).timestamp(), tz)

    monkeypatch.setattr("fsspec.implementations.memory.datetime", ServerTime)
    store = whole_store(f"memory://{tmp_path}/store")
    overwrite(store.directory, f"{folder()}/00000.0badc0de.latents.tar", b"being written")
    [entry] = [entry for entry in store.directory.entries() if "0badc0de" in entry.path]
    assert abs(entry.modified - datetime.now(UTC)) > timedelta(days=3999)
    assert collect(store, delete=True, grace=DAY).files == []
    shift += timedelta(days=2)
    assert [item.path for item in collect(store, delete=True, grace=DAY).files] == [entry.path]


def test_older_generations_go_when_both_of_their_files_are_old(store: Store) -> None:
    with patch.object(compaction, "MANY_FILES", 1):
        compaction.compact(store)
        iterate(store, 4)
        compaction.compact(store)
    first = sorted(path for path in files_of(store) if path.startswith("catalog/plans/gen-000001."))
    [document, parquet] = sorted(first, key=lambda path: not path.endswith(".json"))
    age(store, parquet, 25)
    assert collect(store, delete=True, grace=DAY).files == []
    age(store, document, 25)
    assert [item.path for item in collect(store, delete=True, grace=DAY).files] == [document, parquet]
    assert not {document, parquet} & files_of(store).keys()
    assert verify(store, deep=True).findings == []
    everything = {item.path for item in collect(store, delete=True, grace=NONE).files}
    assert everything
    assert all("/gen-000001." in path for path in everything)
    assert {path for path in files_of(store) if path.startswith("catalog/")} == {
        path for path in files_of(store) if "/gen-000002." in path
    }


def test_a_damaged_index_stops_it(store: Store) -> None:
    """Its tars would look like leftovers."""
    path = index(2)
    data = store.directory.read(path)
    overwrite(store.directory, path, data[:-1])
    with pytest.raises(StoreError, match=r"iter=000002/00000\.parquet is damaged .*: restore it from a copy"):
        collect(store, delete=True, grace=NONE)


# -- marks ---------------------------------------------------------------------------------------------------------------


def test_what_no_mark_holds_is_dropped(store: Store) -> None:
    """The last buffer holds the first iteration's best; 3 is the last iteration."""
    tars = {row["latents_file"]: row["media_file"] for row in shard_rows(store)}
    sizes = {entry.path: entry.size for entry in store.directory.entries()}
    found = collect(store, delete=True, grace=DAY, keep_iterations=2)
    [item] = found.shards
    assert (item.path, item.reason) == (index(1), "not needed by the last 2 iterations of any run")
    gone = [path for pair in tars.items() for path in pair if index_of(path) == index(1)]
    assert item.bytes == found.bytes == sum(sizes[path] for path in gone)
    assert not any(store.directory.exists(path) for path in gone)
    assert readable(store) == {index(0), index(2), index(3)}
    [row] = store.read_tables("dropped", store.files("dropped")).to_pylist()
    assert (row["index_file"], row["run_id"], row["iteration"], row["shard"]) == (index(1), RUN, 1, "00000")
    assert (row["trajectories"], row["bytes"]) == (2, item.bytes)
    assert len(shard_rows(store)) == 8  # lineage and densities stay
    assert verify(store, deep=True).findings == []
    assert drop(store, 2) == []


def test_without_keep_iterations_nothing_is_dropped(store: Store) -> None:
    assert collect(store, delete=True, grace=NONE).shards == []
    assert len(readable(store)) == 4


def test_more_iterations_than_there_are_keep_everything(store: Store) -> None:
    assert drop(store, 4) == []


def test_plans_that_are_not_trained_yet(store: Store) -> None:
    store.directory.remove(f"{iteration_folder('updates', RUN, 1)}.parquet")
    assert drop(store, 1) == [index(2)]


def test_an_unfinished_plan_of_other_runs_trajectories(store: Store) -> None:
    """An offline run trains on what other runs drew."""
    path = store.files("trajectories")[1]
    rows = store.read_tables("trajectories", [path])
    chosen = plan(rows, rewards(dict.fromkeys(rows["trajectory_id"].to_pylist(), 0.5)), plan_rule())
    store.publish_table(f"{iteration_folder('plans', 'offline', 0)}.parquet", chosen)
    assert drop(store, 1) == [index(2)]
    train(store, 0, "offline")
    assert drop(store, 1) == []  # the last of its run
    store.publish_table(f"{iteration_folder('plans', 'offline', 1)}.parquet", chosen.slice(0, 0))
    assert drop(store, 1) == [index(1)]


def test_runs_are_counted_each_by_itself(store: Store) -> None:
    for iteration in range(2):
        iterate(store, iteration, "other")
    assert drop(store, 2) == [index(1)]
    assert drop(store, 1) == [index(2)]
    assert {index(0, "other"), index(1, "other")} <= readable(store)


def test_group_reuse_looks_back(store: Store) -> None:
    run = next(store.documents(f"runs/{RUN}.json"))
    store.directory.remove(f"runs/{RUN}.json")
    store.add_run(RUN, run | {"config": {"name": RUN, "seed": 0, "replay": {"reuse_iterations": 2}}})
    assert drop(store, 1) == []


def test_pins_keep_all_that_a_run_drew_and_used(store: Store) -> None:
    first = store.files("buffers")[1]
    store.pin(RUN)
    assert store.pins() == {RUN}
    assert drop(store, 1) == []
    iterate(store, 0, "other")
    older = store.read_tables("buffers", [first])
    store.publish_table(f"{iteration_folder('buffers', 'other', 0)}.parquet", older)
    store.unpin(RUN)
    assert store.pins() == set()
    assert drop(store, 1) == [index(1), index(2)]


def test_a_pin_also_keeps_what_older_buffers_of_its_run_use(store: Store) -> None:
    """Trajectories of another run, in a buffer that is not the last any more."""
    used = store.read_tables("trajectories", [index(1)])
    scores = rewards(dict.fromkeys(used["trajectory_id"].to_pylist(), 1.0))
    store.publish_table(f"{iteration_folder('plans', 'pinned', 0)}.parquet", plan(used, scores, plan_rule()))
    for iteration in range(3):
        train(store, iteration, "pinned")
    store.add_run("pinned", {"config": {"name": "pinned", "seed": 0}, "command": [], "software": {}})
    store.pin("pinned")
    assert drop(store, 1) == [index(2)]
    store.unpin("pinned")
    assert drop(store, 1) == [index(1)]


def test_pins_of_unknown_runs(store: Store) -> None:
    for action in (store.pin, store.unpin):
        with pytest.raises(StoreError, match=r"has no run rum-0; it has \['run-0'\]"):
            action("rum-0")
        with pytest.raises(ValueError, match=r"run_id '\.\./x' cannot be part of a path"):
            action("../x")
    store.pin(RUN)
    store.pin(RUN)
    assert verify(store, deep=False).findings == []
    store.unpin(RUN)
    store.unpin(RUN)


# -- meanwhile -----------------------------------------------------------------------------------------------------------


def meanwhile(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something between the announcement of what is dropped and the second look at the marks."""
    looks = iter((lambda: None, action))

    def interrupted(store: Store, keep: int) -> Marks:
        next(looks)()
        return mark(store, keep)

    monkeypatch.setattr("opgrpo_data.upkeep.garbage.mark", interrupted)


def test_a_plan_that_is_published_meanwhile_keeps_its_trajectories(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = store.read_tables("trajectories", [index(1)])
    chosen = plan(rows, rewards(dict.fromkeys(rows["trajectory_id"].to_pylist(), 0.5)), plan_rule())

    def choose() -> None:
        assert store.dropped_shards() == {index(1), index(2)}
        store.publish_table(f"{iteration_folder('plans', 'other', 0)}.parquet", chosen)

    meanwhile(monkeypatch, choose)
    assert drop(store, 1) == [index(2)]
    assert store.dropped_shards() == {index(2)}
    assert index(1) in readable(store)


def test_a_run_that_goes_on_meanwhile_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, lambda: iterate(store, 4, trained=False))
    assert drop(store, 1) == [index(1), index(2)]
    assert readable(store) == {index(0), index(3), index(4)}
    assert verify(store, deep=True).findings == []


def test_killed_anywhere_it_is_finished_by_the_next(four: Path, tmp_path: Path) -> None:
    """kill -9 before every single operation on files, from the first announcement on, until one attempt lives to its end."""
    seen = set()
    for number in itertools.count(25):
        store = copied(four, tmp_path / str(number))
        killed = collect_and_die(store, number)
        seen.add((len(store.dropped_shards()), len(store.directory.list("trajectories/*/*/*.tar"))))
        assert {index(0), index(3)} <= readable(store)
        assert verify(store, deep=True).findings == []  # no row without bytes, but those that say so
        keep = (1, None)[number % 2]
        gone = {index(1), index(2)} if keep else store.dropped_shards()
        collect(store, delete=True, grace=NONE, keep_iterations=keep)
        assert store.dropped_shards() == gone
        assert readable(store) == {index(i) for i in range(4)} - gone
        assert collect(store, delete=True, grace=NONE, keep_iterations=keep) == Garbage(True, 0, [], [])
        if not killed:
            break
    assert seen == {(0, 8), (1, 8), (2, 8), (2, 7), (2, 6), (2, 5), (2, 4)}  # announced shards, tars left


def collect_and_die(store: Store, operation: int) -> bool:
    """Collect in another process, which kills itself before its n-th operation on files; whether it did."""
    pid = os.fork()
    if pid == 0:
        die_at(operation)
        collect(store, delete=True, grace=NONE, keep_iterations=1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


# -- older versions ------------------------------------------------------------------------------------------------------


def test_an_older_store_is_not_written_what_its_software_misreads(store: Store) -> None:
    marker = store.directory.read("store.json")
    overwrite(store.directory, "store.json", b'{"format": "opgrpo-store", "version": "1.1"}')
    with pytest.raises(StoreError, match=r"has format version 1\.1, and dropping trajectories needs .*: run `opgrpo migrate"):
        collect(store, delete=False, grace=DAY, keep_iterations=1)
    assert collect(store, delete=False, grace=DAY).shards == []
    overwrite(store.directory, "store.json", marker)
    assert drop(store, 1) == [index(1), index(2)]


def test_tars_of_a_lost_index_are_kept_while_anything_speaks_of_their_shard(tmp_path: Path) -> None:
    """The index is the commit, but it may be lost to an accident: then its tars are all that there is of the shard."""
    store = Store.create(str(tmp_path / "store"))
    write_shard(store.directory, folder(), "00000", records(2))
    index = f"{folder()}/00000.parquet"
    place = folder().removeprefix("trajectories/")
    store.publish_table(f"rewards/reward=taste/{place}/00000.v1.000.parquet", rewards({"t0": 1.0}))
    Path(store.directory.path(index)).unlink()
    with pytest.raises(StoreError, match=r"00000\.parquet is gone, but rewards/.* still speaks of its shard"):
        collect(store, delete=True, grace=timedelta(0))
    assert len(store.directory.list(f"{folder()}/*.tar")) == 2
    for path in store.files("rewards"):
        store.directory.remove(path)
    assert len(collect(store, delete=True, grace=timedelta(0)).files) == 2


def test_tars_that_plans_read_from_are_kept_though_the_index_came_anew(store: Store, tmp_path: Path) -> None:
    """An index that was lost, and imported again from a copy, names other tars than the buffers and plans that were there."""
    copy = tmp_path / "copy"
    shutil.copytree(store.directory.root, copy)
    index = store.files("trajectories")[0]
    old = {row["latents_file"] for row in store.read_tables("trajectories", [index]).to_pylist()}
    store.directory.remove(index)
    import_dataset(str(copy), store.directory.url, merge=True)
    new = {row["latents_file"] for row in store.read_tables("trajectories", [index]).to_pylist()}
    assert old.isdisjoint(new)
    collect(store, delete=True, grace=NONE)
    assert all(store.directory.exists(file) for file in old | new)


def test_a_generation_that_cannot_be_read_may_speak_of_them_too(store: Store) -> None:
    with patch.object(compaction, "MANY_FILES", 1):
        compaction.compact(store)
    overwrite(store.directory, f"{folder()}/00007.0badc0de.media.tar", b"leftover")
    overwrite(store.directory, "catalog/trajectories/gen-000001.json", b"{")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(
            StoreError,
            match=r"^catalog/trajectories/gen-000001\.json is not JSON \(.*\): it may speak of shards whose index is gone, and "
            r"nothing was removed\. Restore it from a copy, or remove it$",
        ),
    ):
        collect(store, delete=True, grace=NONE)
    store.directory.remove("catalog/trajectories/gen-000001.json")
    assert "tar that no index names" in {item.reason for item in collect(store, delete=True, grace=NONE).files}


def test_rows_of_a_lost_index_outlive_a_compaction_and_a_collection(store: Store) -> None:
    with patch.object(compaction, "MANY_FILES", 1):
        compaction.compact(store)
        lost = store.files("updates")[1]
        rows = store.read_tables("updates", [lost])
        store.directory.remove(lost)
        with pytest.warns(UserWarning, match="it holds 1 index files that are gone"):
            compaction.compact(store)
    collect(store, delete=True, grace=NONE)
    [first, second] = generations.documents(store, "updates")
    held = generations.read_generation(store.directory, first)
    assert lost in held.files
    assert lost not in generations.read_generation(store.directory, second).files
    with pq.ParquetFile(store.directory.path(held.parquet)) as merged:
        assert merged.read().slice(held.files[store.files("updates")[0]], rows.num_rows).to_pylist() == rows.to_pylist()


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_but_has_the_name_of_an_index_is_named(what: str, store: Store) -> None:
    path = f"{folder()}/x.parquet"
    NO_FILES[what](Path(store.directory.path(path)))
    said = "No such file or directory" if what == "a link to nowhere" else "not a regular file"
    readers: list[Callable[[], object]] = [
        lambda: collect(store, delete=True, grace=NONE),
        lambda: compaction.compact(store),
        lambda: Catalog(store),
    ]
    for read in readers:
        with patch.object(compaction, "MANY_FILES", 1), pytest.raises(StoreError) as caught:
            read()
        assert str(caught.value) == (
            f"{path} cannot be read ({said}): restore it from a copy, or remove it; `opgrpo verify` finds all such files"
        )


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_but_has_the_name_of_a_document_is_named(what: str, store: Store) -> None:
    NO_FILES[what](Path(store.directory.path("runs/x.json")))
    with pytest.raises(StoreError, match=r"^runs/x\.json cannot be read \(.*\): restore it from a copy, or remove it; "):
        Catalog(store)


def test_files_of_other_people_stay(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    own = tmp_path / "store" / "mine" / ".tmp-notes"
    own.parent.mkdir()
    own.write_text("precious")
    assert collect(store, delete=True, grace=timedelta(0)).files == []
    assert own.exists()
