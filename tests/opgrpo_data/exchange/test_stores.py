"""Import of another store: all of it, once, verified, whenever it is killed; and nothing that a hostile one has in mind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import export_dataset, import_dataset, store_shards, stores
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.store_shards import pages
from opgrpo_data.io import Directory
from opgrpo_data.schema import DROPPED, LOCATION, TRAJECTORIES, table_of, to_parquet
from opgrpo_data.seal import read_json, sealed_json
from opgrpo_data.store import Store, now
from opgrpo_data.tensors import Header, check_bytes
from opgrpo_data.upkeep.verify import verify
from tests.opgrpo_data.exchange.made import PLACES, contents, damage, filled, quarantined, rows_of, same
from tests.opgrpo_data.factories import overwrite, reward_row, rewards, shard_rows

INDEX = "trajectories/run=run-0/iter=000000/00000.parquet"
WHERE = {"latents_file", "media_file"}
"""What differs between copies: each shard's tars have names of their own."""
EVERYTHING: dict[str, set[str]] = {
    "prompts": set(), "policies": set(), "runs": set(), "trajectories": WHERE, "rewards": set(), "reward_errors": set(),
    "buffer": {"latents_file"}, "plans": {"latents_file"}, "densities": set(), "updates": set(), "evals": set(),
    "quarantine": set(), "dropped": set(),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A filled store. Do not change it."""
    return filled(str(tmp_path_factory.mktemp("source") / "store"))


def forked(store: Store, to: Path) -> Store:
    """A copy to be changed."""
    shutil.copytree(store.directory.root, to)
    return Store.open(str(to))


def taken(source: Store, store: Store) -> dict[str, Any]:
    """What an import says."""
    return import_dataset(source.directory.url, store.directory.url, merge=True)


def names(store: Store) -> set[str]:
    """All published files, the tars by their shard."""
    found = (entry.path for entry in store.directory.entries())
    return {f"{path.rsplit('.', 3)[0]}.{path.rsplit('.', 2)[1]}.tar" if path.endswith(".tar") else path for path in found}


def readable(store: Store, *, unfinished: bool = False) -> None:
    """Assert that nothing is wrong with a store, and that buffers and plans name bytes that are there.

    unfinished: after an import that was cut short, which may be told to be finished.
    """
    findings = verify(store, deep=True).findings
    assert [found for found in findings if not (unfinished and "finish the import" in found.remedy)] == []
    catalog = Catalog(store)
    places = {row["trajectory_id"]: [row[name] for name in LOCATION.names] for row in rows_of(catalog, "trajectories")}
    for view in ("buffer", "plans"):
        for row in rows_of(catalog, view):
            if row["trajectory_id"] in places:
                assert [row[name] for name in LOCATION.names] == places[row["trajectory_id"]], view


# -- all of it --------------------------------------------------------------------------------------------------------


def test_into_an_empty_store(source: Store, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    told = import_dataset(source.directory.url, store.directory.url)
    assert told == {
        "source": source.directory.url, "form": "store", "trajectories": 12, "already_there": 0, "rewards": 12, "files": 18,
        "left_out": {}, "left_out_because": [],
    }  # fmt: skip
    same(store, source, EVERYTHING)
    assert contents(store) == contents(source)
    assert names(store) == names(source)
    assert store.pins() == {"run-0"}
    readable(store)


def test_tars_are_the_same_to_the_last_byte(source: Store, tmp_path: Path) -> None:
    """What stands beside the media too: whoever reads the tars alone sees no difference."""
    store = Store.create(str(tmp_path / "store"))
    taken(source, store)
    ours, theirs = ({row["trajectory_id"]: row for row in shard_rows(it)} for it in (store, source))
    for name, row in ours.items():
        for column in WHERE:
            assert store.directory.read(row[column]) == source.directory.read(theirs[name][column])


def test_through_an_object_store(source: Store, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    there = Store.create(f"{url}/one")
    taken(source, there)
    back = Store.create(f"{url}/two")
    taken(there, back)
    same(back, source, EVERYTHING)
    assert contents(back) == contents(source)


@pytest.mark.parametrize("harm", ["none", "quarantined", "damaged", "misplaced"])
def test_twice_is_once(harm: str, source: Store, tmp_path: Path) -> None:
    """Also where a trajectory never comes."""
    source, store = forked(source, tmp_path / "source"), Store.create(str(tmp_path / "store"))
    if harm == "quarantined":
        quarantined(source, "run-0-i0g0m0")
    elif harm == "damaged":
        damage(source, "run-0-i0g0m0")
    elif harm == "misplaced":
        rewritten(source, INDEX, "trajectories", lambda row: row.update(latents_file="elsewhere"))
    taken(source, store)
    before = {entry.path: entry.modified for entry in store.directory.entries()}
    told = taken(source, store)
    assert {name: told[name] for name in ("trajectories", "already_there", "rewards", "files")} == {
        "trajectories": 0, "already_there": 12 - (harm != "none"), "rewards": 0, "files": 0,
    }  # fmt: skip
    assert {entry.path: entry.modified for entry in store.directory.entries()} == before


def test_two_runs_in_one_store(source: Store, tmp_path: Path) -> None:
    other = filled(str(tmp_path / "other"), "run-1")
    store = Store.create(str(tmp_path / "store"))
    taken(source, store)
    taken(other, store)
    assert contents(store) == contents(source) | contents(other)
    ours, one, two = Catalog(store), Catalog(source), Catalog(other)
    for view in EVERYTHING.keys() - {"policies", "prompts"}:
        without = EVERYTHING[view]
        both = [json.dumps(row, sort_keys=True, default=str) for it in (one, two) for row in rows_of(it, view, without)]
        assert sorted(both) == [json.dumps(row, sort_keys=True, default=str) for row in rows_of(ours, view, without)], view
    assert {row["policy_id"] for row in rows_of(ours, "policies")} == {"policy-0", "run-0-mean", "run-1-mean"}
    assert len(rows_of(store, "prompts")) == 2
    readable(store)


def test_a_run_that_went_on_elsewhere(tmp_path: Path) -> None:
    """The same run in two stores, one iteration further in one: what both have stays, what refers to it finds it."""
    further = filled(str(tmp_path / "further"), iterations=3)
    store = filled(str(tmp_path / "store"), iterations=2)
    mine = {entry.path for entry in store.directory.entries()}
    told = taken(further, store)
    assert (told["trajectories"], told["already_there"], told["rewards"]) == (6, 12, 6)
    same(store, further, {name: {*without, "created_at"} for name, without in EVERYTHING.items()})
    assert contents(store) == contents(further)
    assert mine <= {entry.path for entry in store.directory.entries()}
    readable(store)


def test_merge_with_what_tars_brought(source: Store, tmp_path: Path) -> None:
    """Some of each shard are there already: the rest comes, no id and no reward twice."""
    export_dataset(source, str(tmp_path / "tars"), "webdataset", where="member_index = 1 OR iteration = 1")
    store = Store.create(str(tmp_path / "store"))
    first = import_dataset(str(tmp_path / "tars"), store.directory.url)
    assert first["trajectories"] == 8
    told = taken(source, store)
    assert (told["trajectories"], told["already_there"], told["rewards"]) == (4, 8, 4)
    same(store, source, {**EVERYTHING, "trajectories": PLACES, "buffer": PLACES, "plans": PLACES})
    assert contents(store) == contents(source)
    assert set(source.files("trajectories")) <= set(store.files("trajectories"))  # so that no run draws them again
    readable(store)
    assert taken(source, store)["files"] == 0


def test_rewards_of_two_scorers(source: Store, tmp_path: Path) -> None:
    """One scored a version more, and again what had failed; the other a second reward: both come together."""
    one, other = forked(source, tmp_path / "one"), forked(source, tmp_path / "other")
    folder = "run=run-0/iter=000000"
    one.publish_table(f"rewards/reward=taste/{folder}/00001.v1.001.parquet", rewards([reward_row("run-0-i0g1m2", 0.5)]))
    one.publish_table(
        f"rewards/reward=taste/{folder}/00000.v2.000.parquet", rewards([reward_row("run-0-i0g0m0", 7.0, version="2")])
    )
    other.publish_table(
        f"rewards/reward=smell/{folder}/00000.v1.000.parquet", rewards([reward_row("run-0-i0g0m0", 9.0, reward="smell")])
    )
    assert taken(one, other)["rewards"] == 2
    assert taken(other, one)["rewards"] == 1
    same(one, other, {"rewards": set(), "reward_errors": set()})
    found = Catalog(one).query("SELECT reward, version, value FROM rewards WHERE trajectory_id = 'run-0-i0g0m0' ORDER BY ALL")
    assert [tuple(row.values()) for row in found.to_pylist()] == [("smell", "1", 9.0), ("taste", "1", 0.0), ("taste", "2", 7.0)]
    assert len(rows_of(one, "rewards")) == 13


# -- killed -----------------------------------------------------------------------------------------------------------


def test_killed_after_every_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt is killed after the first file it publishes. In between nothing is half there; in the end all is."""
    source, store = filled(str(tmp_path / "source"), iterations=1), Store.create(str(tmp_path / "store"))
    publish, done = Directory.publish, 0

    def killing(directory: Directory, path: str, data: bytes) -> bool:
        nonlocal done
        if done:
            raise KeyboardInterrupt
        done += publish(directory, path, data)
        return bool(done)

    attempts = 0
    while True:
        attempts += 1
        done = 0
        monkeypatch.setattr(Directory, "publish", killing)
        try:
            taken(source, store)
        except KeyboardInterrupt:
            monkeypatch.undo()
            if attempts % 5 == 0:
                readable(store, unfinished=True)
            continue
        monkeypatch.undo()
        break
    assert attempts > 12
    same(store, source, EVERYTHING)
    assert contents(store) == contents(source)
    readable(store)


def test_killed_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every read of the source: no file that was begun is there."""
    source, store = filled(str(tmp_path / "source"), iterations=1), Store.create(str(tmp_path / "store"))
    read, left = Directory.read_range, 0

    def killing(directory: Directory, path: str, offset: int, length: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return read(directory, path, offset, length)

    for allowed in range(0, 60, 20):
        left = allowed
        monkeypatch.setattr(Directory, "read_range", killing)
        with suppress(KeyboardInterrupt):
            taken(source, store)
        monkeypatch.undo()
        readable(store, unfinished=True)
    taken(source, store)
    same(store, source, EVERYTHING)


# -- left out ---------------------------------------------------------------------------------------------------------


def test_damaged_trajectories_do_not_come(source: Store, tmp_path: Path) -> None:
    broken = forked(source, tmp_path / "broken")
    damage(broken, "run-0-i0g0m0")
    damage(broken, "run-0-i0g0m2", "media")
    row = next(row for row in shard_rows(broken) if row["trajectory_id"] == "run-0-i1g1m0")
    Path(broken.directory.root, row["latents_file"]).unlink()
    row = next(row for row in shard_rows(broken) if row["trajectory_id"] == "run-0-i1g0m2")
    tar = Path(broken.directory.root, row["latents_file"])
    tar.write_bytes(tar.read_bytes()[: row["latents_offset"] + 10])
    store = Store.create(str(tmp_path / "store"))
    told = taken(broken, store)
    lost = {"run-0-i0g0m0", "run-0-i0g0m2", "run-0-i1g0m2", "run-0-i1g1m0", "run-0-i1g1m1", "run-0-i1g1m2"}
    assert (told["trajectories"], told["left_out"]) == (6, {"damaged": 6})
    there = contents(source)
    assert contents(store) == {name: there[name] for name in there.keys() - lost}
    assert store.quarantined() == lost  # which buffers and plans may name
    reasons = {row["trajectory_id"]: row["reason"] for row in rows_of(store, "quarantine")}
    assert reasons == {name: "missing" if name.startswith("run-0-i1g1") else "checksum" for name in lost} | {
        "run-0-i1g0m2": "truncated"
    }
    assert not {row["trajectory_id"] for row in rows_of(store, "rewards")} & lost
    assert taken(broken, store)["left_out"] == {"quarantined": 6}


def test_quarantined_trajectories_stay_there_and_their_quarantine_comes(source: Store, tmp_path: Path) -> None:
    other = forked(source, tmp_path / "other")
    quarantined(other, "run-0-i0g0m0")
    store = Store.create(str(tmp_path / "store"))
    told = taken(other, store)
    assert (told["trajectories"], told["left_out"]) == (11, {"quarantined": 1})
    same(store, other, {"quarantine": set()})
    assert "run-0-i0g0m0" not in contents(store)


def test_a_quarantine_elsewhere_does_not_bar_what_is_well_here(source: Store, tmp_path: Path) -> None:
    other, store = forked(source, tmp_path / "other"), forked(source, tmp_path / "store")
    quarantined(other, "run-0-i0g0m0")
    damage(other, "run-0-i0g0m1")
    assert taken(other, store)["already_there"] == 12
    assert store.quarantined() == set()


def dropped(store: Store, shard: str = "00000") -> None:
    """Drop a shard of iteration 0 as `opgrpo gc` does."""
    index = f"trajectories/run=run-0/iter=000000/{shard}.parquet"
    row = {"index_file": index, "run_id": "run-0", "iteration": 0, "shard": shard, "trajectories": 3, "bytes": 1,
           "reason": "age", "dropped_at": now()}  # fmt: skip
    store.publish_table(f"dropped/run=run-0/iter=000000/{shard}.parquet", table_of([row], DROPPED))
    for path in store.directory.list(f"trajectories/run=run-0/iter=000000/{shard}.*.tar"):
        store.directory.remove(path)


def test_of_dropped_shards_the_rows_come(source: Store, tmp_path: Path) -> None:
    other = forked(source, tmp_path / "other")
    dropped(other)
    store = Store.create(str(tmp_path / "store"))
    told = taken(other, store)
    assert (told["trajectories"], told["rewards"], told["left_out"]) == (9, 12, {"dropped": 3})
    same(store, other, EVERYTHING)
    readable(store)
    assert taken(other, store)["already_there"] == 12


def test_what_was_dropped_elsewhere_stays_here(source: Store, tmp_path: Path) -> None:
    other, store = forked(source, tmp_path / "other"), forked(source, tmp_path / "store")
    dropped(other)
    assert taken(other, store)["already_there"] == 12
    assert store.dropped_shards() == set()
    assert contents(store) == contents(source)


def test_damaged_tables_documents_and_tensors_do_not_come(source: Store, tmp_path: Path) -> None:
    broken = forked(source, tmp_path / "broken")
    paths = {
        INDEX: "trajectories", "rewards/reward=taste/run=run-0/iter=000001/00000.v1.000.parquet": "rewards",
        "buffers/run=run-0/iter=000001.parquet": "buffers", "plans/run=run-0/iter=000000.parquet": "plans",
        "updates/run=run-0/iter=000000.parquet": "updates", "policies/policy-0/policy.json": "policies",
        "policies/run-0-mean/weights.safetensors": "tensors", "runs/run-0.json": "runs",
    }  # fmt: skip
    for path in paths:
        data = bytearray(broken.directory.read(path))
        data[len(data) - 3 if path.endswith("safetensors") else len(data) // 2] ^= 4
        overwrite(broken.directory, path, bytes(data))
    store = Store.create(str(tmp_path / "store"))
    told = taken(broken, store)
    assert (told["trajectories"], told["rewards"]) == (9, 6)
    assert told["left_out"] == {f"damaged files of {kind}": 1 for kind in paths.values()}
    assert {message.partition(":")[0] for message in told["left_out_because"]} == set(paths)
    assert not [path for path in paths if store.directory.exists(path)]


# -- refused ----------------------------------------------------------------------------------------------------------


def test_same_ids_with_other_bytes(source: Store, tmp_path: Path) -> None:
    other = filled(str(tmp_path / "other"), iterations=1, salt=1)
    store = forked(source, tmp_path / "store")
    before = {entry.path: entry.modified for entry in store.directory.entries()}
    told = (
        rf"^6 trajectories of {other.directory.url} are in {store.directory.url} with other bytes: run-0-i0g0m0, .*, \.\.\.\. "
        r"Nothing was imported: keep the two in stores of their own, or give one of the runs another name and draw it again$"
    )
    with pytest.raises(StoreError, match=told):
        taken(other, store)
    assert {entry.path: entry.modified for entry in store.directory.entries()} == before


def test_a_store_that_holds_something_needs_merge(source: Store, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"), "run-1", iterations=1)
    told = (
        rf"^the store {store.directory.url} holds something already: add --merge to keep that and take what is new \(also to "
        r"finish an import that was cut short\), or choose another store$"
    )
    with pytest.raises(StoreError, match=told):
        import_dataset(source.directory.url, store.directory.url)
    assert import_dataset(source.directory.url, store.directory.url, merge=True)["trajectories"] == 12


def test_a_store_is_not_imported_into_itself(source: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source.directory.root)
    for name in (f"{source.directory.url}/", str(tmp_path / "link")):
        with pytest.raises(StoreError, match=r"is the store itself: name another one to import from$"):
            import_dataset(name, source.directory.url, merge=True)


@pytest.mark.parametrize("kind", ["file", "link", "memory"])
def test_neither_lies_in_the_other(kind: str, tmp_path: Path) -> None:
    """Before anything is made."""
    place = f"memory://{tmp_path.name}" if kind == "memory" else str(tmp_path)
    filled(f"{place}/outer", iterations=1)
    filled(f"{place}/outer/there", iterations=1)
    (tmp_path / "link").symlink_to(tmp_path / "outer")
    outer = f"{place}/link" if kind == "link" else f"{place}/outer"
    before = Directory(f"{place}/outer").entries()
    for source, to in (("outer", f"{outer}/inside"), ("outer", f"{outer}/there"), ("outer/there", outer)):
        with pytest.raises(StoreError, match=r"lies in .*: choose a source and a store that are apart$"):
            import_dataset(f"{place}/{source}", to, merge=True)
    assert Directory(f"{place}/outer").entries() == before
    assert import_dataset(f"{place}/outer", f"{place}/outer-too")["trajectories"] == 6  # the neighbour of a like name


@pytest.mark.parametrize(("source", "to"), [("", "store"), ("store", ""), (" ", "store")])
def test_an_empty_place(source: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"^the place '\s*' is empty: name a directory or a bucket prefix, for example s3://"):
        import_dataset(source, to, merge=True)
    assert list(tmp_path.iterdir()) == []


def test_neither_store_nor_export(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    store = Store.create(str(tmp_path / "store"))
    told = "has neither a store.json nor an opgrpo-export.json: name a store, or a folder that opgrpo export wrote$"
    with pytest.raises(StoreError, match=told):
        import_dataset(str(tmp_path / "folder"), store.directory.url)


# -- hostile ----------------------------------------------------------------------------------------------------------


def rewritten(store: Store, path: str, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the first row of a table as an attacker would, with a seal that holds."""
    rows = store.read_tables(kind, [path]).to_pylist()
    change(rows[0])
    overwrite(store.directory, path, to_parquet(table_of(rows, store.read_tables(kind, [path]).schema)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trajectory_id": "../../x"}, "trajectory_id '../../x' cannot be part of a path"),
        ({"run_id": "/etc"}, "run_id '/etc' cannot be part of a path"),
        ({"trajectory_id": "run-0-i0g0m1"}, "it names a trajectory twice"),
        ({"num_steps": 2**31 - 1}, "has num_steps 2147483647; expected 1 to 10000"),
        ({"latent_shape": [2**31 - 1] * 8}, "more than 17179869184 bytes"),
        ({"latent_shape": [-1, 2]}, "has latents of shape"),
        ({"media_format": "html"}, "has media_format 'html'"),
        ({"latents_crc32": [None] * 4}, "has no checksum for each"),
        ({"media_crc32": None}, "has no checksum for each"),
    ],
)  # fmt: skip
def test_a_hostile_index_does_not_come(change: dict[str, Any], told: str, source: Store, tmp_path: Path) -> None:
    hostile = Store.create(str(tmp_path / "hostile"))
    hostile.publish_table(INDEX, source.read_tables("trajectories", [INDEX]))
    rewritten(hostile, INDEX, "trajectories", lambda row: row.update(change))
    left_out = LeftOut()
    assert list(pages(hostile, left_out)) == []
    assert left_out.counts == {"damaged files of trajectories": 1}
    assert told in left_out.messages[0]


def test_indexes_come_page_by_page(source: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_shards, "PAGE_ROWS", 7)
    found = [{index: len(rows) for index, rows in page.items()} for page in pages(source, LeftOut())]
    assert [sum(page.values()) for page in found] == [6, 6]
    assert [index for page in found for index in page] == source.files("trajectories")


PLACES_ELSEWHERE: list[dict[str, Any]] = [
    {"latents_file": "../../../../../../etc/passwd"}, {"latents_file": "store.json"}, {"media_file": "/etc/passwd"},
    {"latents_offset": 2**62}, {"latents_offset": -1}, {"media_length": 2**50}, {"media_length": -1},
    {"media_offset": None}, {"latents_length": None}, {"latents_header": 0},
]  # fmt: skip


def test_a_hostile_place_costs_one_trajectory(source: Store, tmp_path: Path) -> None:
    hostile = forked(source, tmp_path / "hostile")
    changes = iter(PLACES_ELSEWHERE)
    lost = set()
    for index in hostile.files("trajectories"):
        rows = hostile.read_tables("trajectories", [index]).to_pylist()
        for row in rows:
            if change := next(changes, None):
                row.update(change)
                lost.add(row["trajectory_id"])
        overwrite(hostile.directory, index, to_parquet(table_of(rows, TRAJECTORIES)))
    store = Store.create(str(tmp_path / "store"))
    said = taken(hostile, store)
    assert (said["trajectories"], said["left_out"]) == (2, {"damaged": 10})
    assert contents(store).keys() == contents(source).keys() - lost
    assert {path.name for path in tmp_path.iterdir()} == {"hostile", "store"}


def test_a_hostile_drop_speaks_for_no_other_shard(source: Store, tmp_path: Path) -> None:
    hostile, store = forked(source, tmp_path / "hostile"), filled(str(tmp_path / "store"), "run-1", iterations=1)
    dropped(hostile)
    path = "dropped/run=run-0/iter=000000/00000.parquet"
    mine = store.files("trajectories")[0]
    rewritten(hostile, path, "dropped", lambda row: row.update(index_file=mine))
    said = taken(hostile, store)
    assert said["left_out"]["damaged files of dropped"] == 1
    assert rows_of(store, "dropped") == []


BAD_DOCUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("run", {"run_id": "other"}), ("run", {"config": []}),
    ("run", {"config": {"name": "x", "seed": "y"}}), ("run", {"created_at": 5}), ("run", {"command": "rm -rf /"}),
    ("policy", {"policy_id": "../x"}), ("policy", {"iteration": "x"}), ("policy", {"created_at": "never"}),
    ("pin", {"run_id": "run-1"}),
]  # fmt: skip


def test_hostile_documents_do_not_come(source: Store, tmp_path: Path) -> None:
    """One that SQL cannot show would close every view."""
    hostile = forked(source, tmp_path / "hostile")
    kinds = {"run": "runs/run-0.json", "policy": "policies/policy-0/policy.json", "pin": "pins/run-0.json"}
    paths = set()
    for number, (kind, change) in enumerate(BAD_DOCUMENTS):
        document = read_json(hostile.directory.read(kinds[kind]))
        path = kinds[kind].replace("run-0", f"bad-{number}").replace("policy-0", f"bad-{number}")
        key = "policy_id" if kind == "policy" else "run_id"
        hostile.directory.publish(path, sealed_json({**document, key: f"bad-{number}", **change}))
        paths.add(path)
    store = Store.create(str(tmp_path / "store"))
    said = taken(hostile, store)
    assert said["left_out"] == {"damaged files of runs": 5, "damaged files of policies": 3, "damaged files of pins": 1}
    assert {message.partition(":")[0] for message in said["left_out_because"]} == paths
    assert [row["run_id"] for row in rows_of(store, "runs")] == ["run-0"]


def test_a_hostile_prompt_does_not_come(source: Store, tmp_path: Path) -> None:
    hostile = forked(source, tmp_path / "hostile")
    path = hostile.files("prompts")[0]
    rewritten(hostile, path, "prompts", lambda row: row.update(text="something else"))
    store = Store.create(str(tmp_path / "store"))
    assert taken(hostile, store)["left_out"] == {"damaged files of prompts": 1}
    assert len(rows_of(store, "prompts")) == 1


def test_a_hostile_reward_does_not_come(source: Store, tmp_path: Path) -> None:
    hostile = forked(source, tmp_path / "hostile")
    path = "rewards/reward=taste/run=run-0/iter=000000/00000.v1.000.parquet"
    rewritten(hostile, path, "rewards", lambda row: row.update(reward="other"))
    store = Store.create(str(tmp_path / "store"))
    said = taken(hostile, store)
    assert (said["rewards"], said["left_out"]) == (9, {"damaged files of rewards": 1})


def test_a_hostile_quarantine_speaks_for_no_other_trajectory(source: Store, tmp_path: Path) -> None:
    """Nor does a damaged one end the import: its trajectory is left out."""
    hostile = forked(source, tmp_path / "hostile")
    for name in ("run-0-i0g0m0", "run-0-i0g0m1"):
        quarantined(hostile, name)
    rewritten(hostile, "quarantine/run-0-i0g0m0.parquet", "quarantine", lambda row: row.update(trajectory_id="run-0-i1g0m0"))
    overwrite(hostile.directory, "quarantine/run-0-i0g0m1.parquet", b"PAR1")
    store = Store.create(str(tmp_path / "store"))
    said = taken(hostile, store)
    assert (said["trajectories"], said["left_out"]) == (10, {"quarantined": 2, "damaged files of quarantine": 2})
    assert rows_of(store, "quarantine") == []


def test_what_is_written_is_what_was_checked(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes between its check and its copy does not come, and what follows its last tensor never does."""
    other, store = forked(source, tmp_path / "other"), Store.create(str(tmp_path / "store"))
    path = "policies/run-0-mean/weights.safetensors"
    whole = other.directory.read(path)

    def changing(directory: Directory, path: str, header: Header) -> None:
        check_bytes(directory, path, header)
        overwrite(other.directory, path, whole[:-1] + b"x")

    monkeypatch.setattr(stores, "check_bytes", changing)
    told = taken(other, store)
    assert told["left_out"] == {"damaged files of tensors": 1}
    assert told["left_out_because"] == [f"{path}: it changed while it was copied"]
    assert not store.directory.exists(path)
    monkeypatch.undo()
    overwrite(other.directory, path, whole + b"more")
    assert taken(other, store)["left_out"] == {}
    assert store.directory.read(path) == whole


def test_a_picture_is_read_once(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that were found small enough are those that are written."""
    read, path, asked = Directory.read_range, "runs/run-0/before_after.png", []

    def asking(directory: Directory, relative: str, offset: int, length: int) -> bytes:
        asked.append(relative)
        return read(directory, relative, offset, length)

    store = Store.create(str(tmp_path / "store"))
    monkeypatch.setattr(Directory, "read_range", asking)
    taken(source, store)
    monkeypatch.undo()
    assert asked.count(path) == 1
    assert store.directory.read(path) == source.directory.read(path)


def test_large_pictures_of_runs_do_not_come(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_PICTURE_BYTES", 10)
    store = Store.create(str(tmp_path / "store"))
    assert taken(source, store)["left_out"] == {"damaged files of pictures": 1}
