"""Generations hold what the index files hold, whatever is killed, raced or damaged; nothing else in the store changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opgrpo_data import pieces
from opgrpo_data.errors import StoreError
from opgrpo_data.generations import Generation, faults, in_force
from opgrpo_data.io import Directory
from opgrpo_data.pieces import read_pieces
from opgrpo_data.schema import TRAJECTORIES, conform, to_parquet
from opgrpo_data.seal import read_json, sealed_json
from opgrpo_data.store import Store
from opgrpo_data.upkeep import compaction
from opgrpo_data.upkeep.compaction import compact, superseded_generations
from tests.opgrpo_data.factories import folder, located_row, overwrite, rewards, trajectories

MANY = 4
STEP_BYTES = 4096
FIRST = "catalog/trajectories/gen-000001.json"


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small stores are worth a generation."""
    monkeypatch.setattr(compaction, "MANY_FILES", MANY)
    monkeypatch.setattr(pieces, "MANY_FILES", MANY)


def commit(store: Store, first: int, last: int, size: int = 3) -> None:
    """Index files `first` .. `last` - 1, two to an iteration, of `size` trajectories; and a reward file for each."""
    for shard in range(first, last):
        names = [f"t{shard:03d}-{k}" for k in range(size)]
        rows = [located_row(name, iteration=shard // 2, shard=f"{shard:05d}") for name in names]
        store.publish_table(f"{folder(shard // 2)}/{shard:05d}.parquet", trajectories(rows))
        place = folder(shard // 2).replace("trajectories", "rewards/reward=taste")
        store.publish_table(f"{place}/{shard:05d}.v1.000.parquet", rewards({name: float(shard) for name in names}))


def filled(url: str, count: int = 6) -> Store:
    store = Store.create(url)
    commit(store, 0, count)
    return store


def rows(store: Store, kind: str = "trajectories") -> list[dict[str, Any]]:
    """Rows as readers get them."""
    return [row for _, table in read_pieces(store, kind) for row in table.to_pylist()]


def plain_rows(store: Store, kind: str = "trajectories") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.read_tables(kind, store.files(kind)).to_pylist()
    return found


def current(store: Store, kind: str = "trajectories") -> Generation:
    generation, _ = in_force(store, kind)
    assert generation is not None
    return generation


def contents(store: Store) -> dict[str, bytes]:
    return {entry.path: store.directory.read(entry.path) for entry in store.directory.entries()}


def damage(store: Store, path: str, change: Callable[[bytes], bytes]) -> None:
    overwrite(store.directory, path, change(store.directory.read(path)))


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


# -- what a generation is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["disk", "memory://compaction-whole"])
def test_a_generation_holds_the_rows_of_the_index_files(url: str, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store") if url == "disk" else url)
    before = contents(store)
    told = compact(store)
    assert [(each["kind"], each["files"], each["new"], each["rows"], each["committed"]) for each in told["compacted"]] == [
        ("trajectories", 6, 6, 18, True),
        ("rewards", 6, 6, 18, True),
    ]
    after = contents(store)
    assert {path: data for path, data in after.items() if not path.startswith("catalog/")} == before
    document = read_json(after[FIRST])
    merged = after[document["parquet"]]
    assert document["files"] == dict.fromkeys(store.files("trajectories"), 3)
    assert (document["rows"], document["bytes"], document["crc32"]) == (18, len(merged), f"{zlib.crc32(merged):08x}")
    assert pq.read_table(pa.BufferReader(merged)).to_pylist() == plain_rows(store) == rows(store)
    assert rows(store, "rewards") == plain_rows(store, "rewards")


def test_a_generation_grows_out_of_the_one_before_it(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    commit(store, 6, 6 + MANY - 1)
    assert compact(store)["compacted"] == []  # too few
    assert rows(store) == plain_rows(store)
    commit(store, 6 + MANY - 1, 12)
    told = compact(store)["compacted"][0]
    assert (told["generation"], told["files"], told["new"], told["rows"]) == ("catalog/trajectories/gen-000002.json", 12, 6, 36)
    assert rows(store) == plain_rows(store)
    assert current(store).number == 2


def test_large_row_groups_are_divided_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", 5)
    monkeypatch.setattr(pieces, "BATCH_ROWS", 4)
    store = filled(str(tmp_path / "store"), 7)
    store.publish_table(f"{folder()}/empty.parquet", TRAJECTORIES.empty_table())
    compact(store)
    assert pq.ParquetFile(store.directory.path(current(store).parquet)).metadata.num_row_groups > 3
    assert sorted(map(str, rows(store))) == sorted(map(str, plain_rows(store)))
    wanted = store.files("trajectories")[1:6]
    read = list(read_pieces(store, "trajectories", ["trajectory_id"], wanted))
    found = [name for _, table in read for name in table["trajectory_id"].to_pylist()]
    assert found == store.read_tables("trajectories", wanted)["trajectory_id"].to_pylist()


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"), 1)
    assert compact(store) == {
        "compacted": [],
        "nothing_to_do": [
            "trajectories: 1 index files outside a generation, 4 make one worth while",
            "rewards: 1 index files outside a generation, 4 make one worth while",
        ],
        "damaged": [],
        "dry_run": False,
    }


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    before = contents(store)
    told = compact(store, dry_run=True)
    assert [(each["files"], each["rows"], each["committed"]) for each in told["compacted"]] == [(6, None, False)] * 2
    assert contents(store) == before


def test_columns_of_a_newer_minor_version_are_null_in_older_files(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    for shard in range(MANY):
        table = rewards({f"t{shard}": 1.0})
        older = table.drop_columns(["version"]) if shard % 2 else table
        store.publish_table(f"rewards/reward=a/run=r/iter=000000/{shard}.parquet", older)
    compact(store)
    assert [row["version"] for row in rows(store, "rewards")] == ["1", None, "1", None]


def test_an_older_store_is_migrated_first(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    overwrite(store.directory, "store.json", sealed_json({"format": "opgrpo-store", "version": "1.1", "created_at": "x"}))
    with pytest.raises(StoreError, match=r"has format version 1\.1, and compacting needs 1\.2: run `opgrpo migrate"):
        compact(store)


# -- kills and races -----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """The process is gone, as far as the store can tell."""


class Stopping(Directory):
    """A directory that breaks off at its n-th write, file or publication."""

    def __init__(self, url: str, left: int) -> None:
        super().__init__(url)
        self.left = left

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoppedError

    @contextmanager
    def write_atomic(self, relative: str) -> Iterator[BinaryIO]:
        self.step()
        with super().write_atomic(relative) as file:

            def counted(data: Any) -> int:
                if file.tell() // STEP_BYTES != (file.tell() + len(data)) // STEP_BYTES:
                    self.step()
                return file.write(data)

            yield SimpleNamespace(write=counted)  # type: ignore[misc]
            self.step()
        self.step()

    def publish(self, relative: str, data: bytes) -> bool:
        self.step()
        published = super().publish(relative, data)
        self.step()
        return published


def test_a_compaction_that_breaks_off_anywhere_changes_nothing_for_readers(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    commit(store, 6, 12)
    expected = plain_rows(store)
    numbers = set()
    for steps in range(1000):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "store", copy)
        try:
            compact(Store(Stopping(str(copy), steps)))
            finished = True
        except StoppedError:
            finished = False
        again = Store.open(str(copy))
        assert rows(again) == expected
        numbers.add(current(again).number)
        compact(again)
        assert (rows(again), current(again).number) == (expected, 2)
        assert list(faults(again, deep=True)) == []
        for path in superseded_generations(again):
            again.directory.remove(path)
        assert len(again.directory.list("catalog/trajectories/*")) == 2
        shutil.rmtree(copy)
        if finished:
            break
    assert finished
    assert steps > 8
    assert numbers == {1, 2}


def test_killed_compactors_lose_nothing(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    expected = plain_rows(store)
    command = [sys.executable, "-m", "tests.opgrpo_data.upkeep.crashing_compactor"]
    kills = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for count in range(0, 1000, 5):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "store", copy)
            print(json.dumps({"store": str(copy), "many": MANY, "die_at": count}), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            found = Store.open(str(copy))
            assert rows(found) == expected
            compact(found)
            assert current(found).number == 1
            assert rows(found) == expected
            shutil.rmtree(copy)
            if status == 0:
                break
            assert status == 9
            kills += 1
        server.stdin.close()
    assert status == 0
    assert kills > 5


def test_of_two_compactions_at_once_one_wins_and_the_other_leaves_nothing(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))

    class Slow(Directory):
        def publish(self, relative: str, data: bytes) -> bool:
            if relative.startswith("catalog/trajectories"):
                commit(store, 6, 7)  # a writer is there as well
                assert compact(store)["compacted"][0]["committed"]
            return super().publish(relative, data)

    told = compact(Store(Slow(str(tmp_path / "store"))))["compacted"]
    assert [each["committed"] for each in told] == [False]
    assert current(store).files.keys() == set(store.files("trajectories"))
    assert len(store.directory.list("catalog/trajectories/*")) == 2
    assert rows(store) == plain_rows(store)


def test_what_is_committed_meanwhile_is_read_beside_the_generation(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))

    class Busy(Directory):
        def publish(self, relative: str, data: bytes) -> bool:
            commit(store, 6, 8)
            return super().publish(relative, data)

    compact(Store(Busy(str(tmp_path / "store"))))
    assert len(current(store).files) == 6
    assert rows(store) == plain_rows(store)
    assert len(rows(store)) == 24


# -- damage --------------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[bytes], bytes]:
    """The JSON of a generation with other entries, sealed."""
    return lambda data: sealed_json(read_json(data) | changes)


JSON_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped": (lambda data: flipped(data, 40), "seal says|JSON"),
    "cut": (lambda data: data[:-3], "delimiter|Expecting|Unterminated"),
    "empty": (lambda _: b"", "Expecting value"),
    "list": (lambda _: b"[]", "holds no JSON object"),
    "lacking": (lambda _: sealed_json({"rows": 1}), r"it describes no generation \(KeyError\('parquet'\)\)"),
    "elsewhere": (changed(parquet="../gen-000001.01234567.parquet"), "it contradicts itself"),
    "a table": (changed(parquet="trajectories/run=run-0/iter=000000/00000.parquet"), "it contradicts itself"),
    "fewer": (changed(rows=1), "it contradicts itself"),
    "negative": (changed(files={"a": -1, "b": 19}), "it contradicts itself"),
    "huge": (changed(footer_bytes=10**18, bytes=10**18), "it contradicts itself"),
    "fraction": (changed(bytes=1e30), "it contradicts itself"),
    "texts": (changed(files=["a"]), "it describes no generation"),
}
PARQUET_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "footer": lambda data: flipped(data, len(data) - 60),
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("kind", JSON_DAMAGE)
def test_a_damaged_commit_is_passed_over(kind: str, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    change, message = JSON_DAMAGE[kind]
    damage(store, FIRST, change)
    with pytest.warns(
        UserWarning, match=rf"(?s)gen-000001\.json is passed over \(.*({message}).*\): what it holds is read from"
    ):
        assert rows(store) == plain_rows(store)
    assert [path for path, _ in faults(store, deep=False)] == [FIRST]
    with pytest.warns(UserWarning, match="passed over"):
        [told] = compact(store)["compacted"]
    assert told["generation"] == "catalog/trajectories/gen-000002.json"
    assert rows(store) == plain_rows(store)


@pytest.mark.parametrize("kind", PARQUET_DAMAGE)
def test_a_damaged_parquet_file_is_passed_over(kind: str, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    damage(store, current(store).parquet, PARQUET_DAMAGE[kind])
    with pytest.warns(UserWarning, match="has another size or footer than it was written with"):
        assert rows(store) == plain_rows(store)


def test_a_missing_parquet_file_is_passed_over_for_the_generation_before(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    commit(store, 6, 12)
    compact(store)
    store.directory.remove(current(store).parquet)
    with pytest.warns(UserWarning, match=r"gen-000002\.json is passed over"):
        assert rows(store) == plain_rows(store)
    with pytest.warns(UserWarning, match="passed over"):
        assert current(store).number == 1


def test_damage_in_the_middle_of_a_page_is_found_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", 3)
    monkeypatch.setattr(pieces, "BATCH_ROWS", 1)
    store = filled(str(tmp_path / "store"))
    compact(store)
    parquet = current(store).parquet
    column = pq.ParquetFile(store.directory.path(parquet)).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    damage(store, parquet, lambda data: flipped(data, start + column.total_compressed_size - 3))
    assert list(faults(store, deep=False)) == []
    [(_, problem)] = faults(store, deep=True)
    assert "expected crc32" in problem
    with pytest.warns(UserWarning, match="CRC checksum verification failed"):
        assert rows(store) == plain_rows(store)


def damage_a_page(store: Store) -> None:
    """Flip a bit of a page of the generation in force: its footer stays as it was."""
    damage(store, current(store).parquet, lambda data: flipped(data, 100))


@pytest.mark.parametrize("new", [0, MANY])
def test_a_generation_with_a_damaged_page_is_made_again_out_of_the_index_files(new: int, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    assert compact(store)["compacted"] == []
    damage_a_page(store)
    commit(store, 6, 6 + new)
    with pytest.warns(UserWarning, match=r"gen-000001\.json is passed over \(.*expected crc32"):
        told = compact(store, dry_run=True)["compacted"]
    assert (told[0]["kind"], told[0]["new"]) == ("trajectories", new)
    with pytest.warns(UserWarning, match=r"gen-000001\.json is passed over \(.*expected crc32"):
        told = compact(store)["compacted"]
    assert (told[0]["generation"], told[0]["files"], told[0]["committed"]) == (
        "catalog/trajectories/gen-000002.json",
        6 + new,
        True,
    )
    assert rows(store) == plain_rows(store)
    assert list(faults(store, deep=True)) == []  # nobody reads the damaged one any more
    assert compact(store)["compacted"] == []


def test_of_damaged_generations_only_those_that_could_be_read_are_told(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    for count in range(1, 4):
        compact(store)
        commit(store, MANY * count + 2, MANY * (count + 1) + 2)
    first, second, third = (FIRST.replace("1", str(n)) for n in (1, 2, 3))
    for path in (first, second):
        damage(store, path, lambda data: flipped(data, 40))
    assert list(faults(store, deep=True)) == []
    damage_a_page(store)
    assert list(faults(store, deep=False)) == []
    assert [path for path, _ in faults(store, deep=True)] == [third, second, first]
    damage(store, third, lambda data: flipped(data, 40))
    assert [path for path, _ in faults(store, deep=False)] == [third, second, first]


def test_behind_a_generation_of_lost_files_an_older_one_could_be_read(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    commit(store, 6, 12)
    compact(store)
    damage(store, FIRST, lambda data: flipped(data, 40))
    store.directory.remove(store.files("trajectories")[11])
    assert [path for path, _ in faults(store, deep=False)] == [FIRST]


def test_a_generation_of_files_that_are_gone_is_not_in_force(tmp_path: Path) -> None:
    """A damaged reward file may be removed and scored again: its old rows must not come back."""
    store = filled(str(tmp_path / "store"))
    compact(store)
    store.directory.remove(store.files("rewards")[2])
    with pytest.warns(
        UserWarning, match=r"it holds 1 index files that are gone, for example rewards/.*/00002\.v1\.000\.parquet"
    ):
        assert rows(store, "rewards") == plain_rows(store, "rewards")
    with pytest.warns(UserWarning, match="passed over"):
        compact(store)
    assert len(rows(store, "rewards")) == 15
    assert current(store, "rewards").number == 2


def test_a_damaged_index_file_stays_outside_and_is_named(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    path = store.files("trajectories")[3]
    damage(store, path, lambda data: flipped(data, 100))
    assert compact(store)["damaged"] == [path]
    assert path not in current(store).files
    with pytest.raises(StoreError, match=rf"{path} is damaged"):
        rows(store)


# -- garbage -------------------------------------------------------------------------------------------------------------


def test_superseded_generations_are_told_json_first(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    assert superseded_generations(store) == []
    compact(store)
    first = current(store).parquet
    commit(store, 6, 12)
    compact(store)
    for attempt in ("gen-000002.00000000.parquet", "gen-000003.00000000.parquet"):
        overwrite(store.directory, f"catalog/trajectories/{attempt}", b"what a killed compaction left")
    overwrite(store.directory, "catalog/trajectories/notes.txt", b"not ours")
    expected = [FIRST, first]
    expected += [f"catalog/trajectories/gen-00000{n}.00000000.parquet" for n in (2, 3)]
    found = superseded_generations(store)
    assert [path for path in found if "/trajectories/" in path] == expected
    for path in found:
        store.directory.remove(path)
    assert rows(store) == plain_rows(store)
    assert list(faults(store, deep=True)) == []


def test_a_damaged_newest_generation_supersedes_nothing(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    damage(store, FIRST, lambda data: flipped(data, 40))
    with pytest.warns(UserWarning, match="passed over"):
        assert superseded_generations(store) == []


def lose(store: Store, number: int) -> str:
    """Remove an index file; returns its path."""
    path = store.files("trajectories")[number]
    store.directory.remove(path)
    return path


def superseded(store: Store) -> list[str]:
    """What of the trajectories' generations nobody needs."""
    return [path for path in superseded_generations(store) if "/trajectories/" in path]


@pytest.mark.parametrize("unread", ["gone", "damaged"])
def test_the_last_copy_of_rows_is_never_superseded(unread: str, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    if unread == "gone":
        lost = lose(store, 2)
        with pytest.warns(UserWarning, match="it holds 1 index files that are gone"):
            compact(store)
    else:
        damage_a_page(store)
        lost = store.files("trajectories")[2]
        intact = store.directory.read(lost)
        damage(store, lost, lambda data: data[:-1])
        with pytest.warns(UserWarning, match="expected crc32"):
            assert compact(store)["damaged"] == [lost]
    assert current(store).number == 2
    assert superseded(store) == []
    if unread == "gone":  # its rows are still to be had
        held = pq.read_table(store.directory.path(read_json(store.directory.read(FIRST))["parquet"]))
        overwrite(store.directory, lost, to_parquet(conform(held.slice(6, 3), TRAJECTORIES)))
    else:
        overwrite(store.directory, lost, intact)
    commit(store, 6, 6 + MANY)
    compact(store)
    assert current(store).files.keys() == set(store.files("trajectories"))
    assert [path for path in superseded(store) if path.endswith(".json")] == [FIRST, FIRST.replace("1", "2")]
    assert len(superseded(store)) == 4


def test_a_generation_that_does_not_say_what_it_holds_stays(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    compact(store)
    intact, first = store.directory.read(FIRST), current(store).parquet
    commit(store, 6, 12)
    compact(store)
    for change, _ in JSON_DAMAGE.values():
        overwrite(store.directory, FIRST, change(intact))
        assert superseded(store) == []
    overwrite(store.directory, FIRST, intact)
    overwrite(store.directory, first, b"of no use to anybody")
    assert superseded(store) == [FIRST, first]
