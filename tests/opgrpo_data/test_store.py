"""A store: made once, opened or refused with a reason, filled put-if-absent; damage names the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opgrpo_data import ids
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.schema import PLANS, PROMPTS, QUARANTINE, REWARDS, SCHEMA_VERSION, table_of
from opgrpo_data.store import TABLES, Store, iteration_folder, now
from tests.opgrpo_data.factories import overwrite, rewards

PROMPT: dict[str, Any] = {"text": "a red square", "metadata": {"kind": "single", "count": 1}}


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A new store: on disk, and on an object store."""
    return Store.create(str(tmp_path / "store") if request.param == "file" else f"memory://{tmp_path}")


# -- create and open -----------------------------------------------------------------------------------------------------


def test_create_writes_the_marker_once(store: Store) -> None:
    marker = store.directory.read("store.json")
    document = json.loads(marker)
    assert (document["format"], document["version"]) == ("opgrpo-store", SCHEMA_VERSION)
    assert abs((now() - datetime.fromisoformat(document["created_at"])).total_seconds()) < 60
    url = store.directory.url
    assert Store.create(url).directory.read("store.json") == marker
    assert Store.open(url).directory.root == store.directory.root


def test_create_makes_the_folders_above(tmp_path: Path) -> None:
    Store.create(str(tmp_path / "a" / "b" / "store"))
    assert (tmp_path / "a" / "b" / "store" / "store.json").is_file()


def test_create_refuses_what_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(StoreError, match="is not empty and not an opgrpo store: choose another directory"):
        Store.create(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_create_takes_an_empty_directory(tmp_path: Path) -> None:
    Store.create(str(tmp_path))
    Store.open(str(tmp_path))


def test_open_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"no store at {tmp_path}: make one with `opgrpo init --store {tmp_path} CONFIG`"):
        Store.open(str(tmp_path))
    with pytest.raises(StoreError, match=f"make one with `opgrpo init --store '{tmp_path}/my store' CONFIG`"):
        Store.open(str(tmp_path / "my store"))
    (tmp_path / "file").touch()
    for place in ("file", "file/in"):
        with pytest.raises(StoreError, match=f"no store at {tmp_path}/{place}: it is a file, or lies in one, and a store is"):
            Store.open(str(tmp_path / place))
    with pytest.raises(StoreError, match="no store at memory://nowhere: make one with"):
        Store.open("memory://nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "opgrpo-store", "version": "9.0"}', r"has format version 9\.0, newer than .*: upgrade opgrpo"),
        (b'{"format": "opgrpo-store", "version": "1.99"}', r"has format version 1\.99, newer than .*: upgrade opgrpo"),
        (b'{"format": "opgrpo-store", "version": "new"}', "has the format version 'new'"),
        (b'{"format": "something"}', "is not an opgrpo store: its store.json says format 'something'"),
        (b'{"format": "opgrpo-st', "store.json is not JSON .*: the store was damaged"),
        (b"", "store.json is not JSON .*: the store was damaged"),
        (b"\xff\xfe\x00", "store.json is not JSON .*: the store was damaged"),
        (b'["opgrpo-store"]', "store.json holds no JSON object: the store was damaged"),
        (b"null", "store.json holds no JSON object: the store was damaged"),
    ],
    ids=repr,
)
def test_open_refuses_other_markers_and_says_where(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes(content)
    for door in (Store.open, Store.create):
        with pytest.raises(StoreError, match=f"{tmp_path}.*{message}"):
            door(str(tmp_path))


# -- tables --------------------------------------------------------------------------------------------------------------


def reward_path(name: str, run: str, iteration: int, shard: str) -> str:
    return f"rewards/reward={name}/run={run}/iter={iteration:06d}/{shard}.parquet"


def test_tables_are_published_once_and_read_in_order(store: Store) -> None:
    path = "rewards/reward=taste/run=r/iter=000000/{}.parquet"
    first, second = rewards({"a": 1.0, "b": None}), rewards({"c": 3.0})
    assert store.publish_table(path.format("1"), second)
    assert store.publish_table(path.format("0"), first)
    assert not store.publish_table(path.format("0"), second)
    files = store.files("rewards")
    assert files == [path.format("0"), path.format("1")]
    assert store.read_tables("rewards", files).equals(pa.concat_tables([first, second]))
    assert store.read_tables("rewards", files[::-1])["trajectory_id"].to_pylist() == ["c", "a", "b"]


@pytest.mark.parametrize("kind", TABLES)
def test_no_files_read_as_an_empty_table(kind: str, store: Store) -> None:
    assert store.files(kind) == []
    assert store.read_tables(kind, []).equals(TABLES[kind].schema.empty_table())


def test_an_older_file_reads_with_nulls_and_a_newer_one_without_its_extras(store: Store) -> None:
    store.publish_table("prompts/old.parquet", pa.table({"prompt_id": ["p"], "text": ["a"]}))
    store.publish_table("prompts/young.parquet", pa.table({"mood": [1], "split": ["train"], "prompt_id": ["q"]}))
    table = store.read_tables("prompts", store.files("prompts"))
    assert table.schema == PROMPTS
    assert table.to_pylist() == [
        {"prompt_id": "p", "text": "a", "metadata": None, "split": None},
        {"prompt_id": "q", "text": None, "metadata": None, "split": "train"},
    ]


def test_files_by_run_iteration_and_reward(store: Store) -> None:
    for name in ("good", "bad"):
        for run in ("r", "r2"):
            for iteration in (1, 11):
                store.publish_table(reward_path(name, run, iteration, "0"), rewards({}))
    assert len(store.files("rewards")) == 8
    assert store.files("rewards", run="r", iteration=1, reward="good") == [reward_path("good", "r", 1, "0")]
    assert store.files("rewards", run="r2") == [
        reward_path(name, "r2", iteration, "0") for name in ("bad", "good") for iteration in (1, 11)
    ]
    assert len(store.files("rewards", iteration=11)) == 4
    store.publish_table(f"{iteration_folder('plans', 'r', 1)}.parquet", PLANS.empty_table())
    assert store.files("plans", run="r", iteration=1) == ["plans/run=r/iter=000001.parquet"]
    assert store.files("plans", iteration=2) == []


def test_iteration_folder() -> None:
    assert iteration_folder("plans", "tiny-0a", 12) == "plans/run=tiny-0a/iter=000012"
    with pytest.raises(ValueError, match=r"run_id '\.\./x' cannot be part of a path"):
        iteration_folder("plans", "../x", 0)


# -- damage --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableFile:
    """One file of rewards in a store in memory, to be damaged a thousand times."""

    store: Store
    path: str
    content: bytes

    def read(self, content: bytes) -> pa.Table:
        """What the store reads when the file holds these bytes instead."""
        overwrite(self.store.directory, self.path, content)
        return self.store.read_tables("rewards", [self.path])


@pytest.fixture
def table_file(tmp_path: Path) -> TableFile:
    store = Store.create(f"memory://{tmp_path}")
    path = reward_path("taste", "r", 0, "00000")
    store.publish_table(path, rewards({f"trajectory-{i}": i * 0.1234 for i in range(20)}))
    return TableFile(store, path, store.directory.read(path))


def data_bytes(content: bytes) -> list[int]:
    """Positions of all bytes of all pages (dictionaries, data, and their headers)."""
    group = pq.read_metadata(pa.BufferReader(content)).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    begins = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [begin + column.total_compressed_size for begin, column in zip(begins, columns, strict=True)]
    return [position for begin, end in zip(begins, ends, strict=True) for position in range(begin, end)]


def flipped(content: bytes, position: int) -> bytes:
    """The bytes with one bit flipped."""
    return content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :]


def test_no_flipped_bit_changes_a_stored_number(table_file: TableFile) -> None:
    """A log-prob or a reward is training data as a latent is: a damaged page is refused, and the file named."""
    intact = table_file.read(table_file.content)
    refused = 0
    for position in data_bytes(table_file.content):
        try:
            assert table_file.read(flipped(table_file.content, position)).equals(intact), position
        except StoreError as error:
            assert f"{table_file.path} is damaged" in str(error)  # noqa: PT017  what does not matter need not raise
            refused += 1
    assert refused > 0.8 * len(data_bytes(table_file.content))


def test_damage_of_the_footer_is_no_traceback(table_file: TableFile) -> None:
    for position in sorted(set(range(len(table_file.content))) - set(data_bytes(table_file.content))):
        try:
            assert table_file.read(flipped(table_file.content, position)).schema == REWARDS
        except StoreError as error:
            assert f"{table_file.path} is damaged" in str(error)  # noqa: PT017  not every byte of a footer has a meaning


def test_every_truncation_of_a_table_is_refused(table_file: TableFile) -> None:
    for size in range(len(table_file.content)):
        with pytest.raises(StoreError, match=rf"{table_file.path} is damaged .*: restore it from a copy"):
            table_file.read(table_file.content[:size])


def test_a_table_of_something_else_is_refused(store: Store) -> None:
    store.publish_table("rewards/reward=x/run=r/iter=000000/0.parquet", pa.table({"value": ["not a number"]}))
    with pytest.raises(StoreError, match=r"iter=000000/0\.parquet is damaged .*not a number"):
        store.read_tables("rewards", store.files("rewards"))


def test_a_damaged_document_is_named(store: Store) -> None:
    store.add_run("good", {"config": {}, "command": [], "software": {}})
    store.directory.publish("runs/torn.json", b'{"run_id": "to')
    with pytest.raises(StoreError, match=r"runs/torn\.json is not JSON .*: the store was damaged"):
        list(store.documents("runs/*.json"))


# -- prompts, runs, policies ---------------------------------------------------------------------------------------------


def test_prompts_are_added_once(store: Store) -> None:
    prompts: list[dict[str, Any]] = [PROMPT, {"text": "ein grüner Kreis", "metadata": {}}]
    train = store.add_prompts(prompts, "train")
    assert store.add_prompts(prompts, "train") == train
    test = store.add_prompts(prompts[:1], "test")
    assert store.files("prompts") == [test, train]
    assert store.read_tables("prompts", [train])["text"].to_pylist() == ["a red square", "ein grüner Kreis"]
    assert store.add_prompts(prompts[::-1], "train") not in (train, test)  # another order is another file
    rows = store.read_tables("prompts", [test, train]).to_pylist()
    assert rows == [
        {"prompt_id": ids.prompt_id(p["text"], p["metadata"]), "text": p["text"], "metadata": metadata, "split": split}
        for p, metadata, split in (
            (prompts[0], '{"count":1,"kind":"single"}', "test"),
            (prompts[0], '{"count":1,"kind":"single"}', "train"),
            (prompts[1], "{}", "train"),
        )
    ]


def test_a_split_cannot_name_another_place(store: Store) -> None:
    with pytest.raises(ValueError, match=r"split '\.\./x' cannot be part of a path"):
        store.add_prompts([PROMPT], "../x")


def test_runs_are_registered_once(store: Store) -> None:
    document = {"config": {"name": "tiny", "seed": 1}, "command": ["opgrpo"], "software": {"python": "3"}}
    assert store.add_run("tiny-1", document)
    assert not store.add_run("tiny-1", {"config": "another"})
    [stored] = store.documents("runs/*.json")
    assert datetime.fromisoformat(stored.pop("created_at")).tzinfo == UTC
    assert stored == {"run_id": "tiny-1", **document}
    with pytest.raises(ValueError, match="run_id 'a/b' cannot be part of a path"):
        store.add_run("a/b", document)


def test_policies_are_registered_once_with_their_weights(store: Store) -> None:
    assert store.add_policy("p1", {"family": "sd3"}, b"weights of p1")
    assert not store.add_policy("p1", {"family": "another"}, b"other bytes")
    assert store.add_policy("p2", {"family": "sd3"}, None)
    assert store.directory.read("policies/p1/weights.safetensors") == b"weights of p1"
    assert [(d["policy_id"], d["family"]) for d in store.documents("policies/*/policy.json")] == [("p1", "sd3"), ("p2", "sd3")]
    with pytest.raises(ValueError, match=r"policy_id '\.\.' cannot be part of a path"):
        store.add_policy("..", {}, None)


def test_weights_without_their_document_are_no_policy_yet(store: Store) -> None:
    """policy.json is the commit: a kill between the two leaves weights that the next attempt keeps."""
    with store.directory.write_atomic("policies/p1/weights.safetensors") as file:
        file.write(b"weights")
    assert list(store.documents("policies/*/policy.json")) == []
    assert store.add_policy("p1", {"family": "sd3"}, b"weights")
    assert store.directory.read("policies/p1/weights.safetensors") == b"weights"


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"policy_id": "p1"}'])
def test_a_document_that_lacks_what_it_must_have_is_named(store: Store, content: str) -> None:
    store.directory.publish("policies/p1/policy.json", content.encode())
    with pytest.raises(StoreError, match=r"policies/p1/policy\.json (lacks|holds no JSON object).*: the store was damaged"):
        list(store.documents("policies/*/policy.json"))


# -- quarantine ----------------------------------------------------------------------------------------------------------


def test_quarantine(store: Store) -> None:
    assert store.quarantined() == set()
    store.quarantine("t1", CorruptionError("a.tar", "t1.latents.npy latent 2", 2**32 - 1, 7))
    store.quarantine("t2", CorruptionError("a.tar", "t2.latents.npy latent 0", 1, None))
    store.quarantine("t1", CorruptionError("b.tar", "seen again", 3, 4))
    assert store.quarantined() == {"t1", "t2"}
    rows: list[dict[str, Any]] = store.read_tables("quarantine", store.files("quarantine")).to_pylist()
    assert [row.pop("noticed_at").tzinfo for row in rows]
    assert rows == [
        dict(zip(QUARANTINE.names, values, strict=False))
        for values in (
            ("t1", "a.tar", "t1.latents.npy latent 2", "checksum", 2**32 - 1, 7),
            ("t2", "a.tar", "t2.latents.npy latent 0", "truncated", 1, None),
        )
    ]


def test_rows_that_do_not_fit_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"columns \['judge'\] are not in the schema"):
        store.publish_table("rewards/x.parquet", table_of([{"judge": "me"}], REWARDS))
    assert store.directory.list("rewards/*") == []
