"""`verify`: nothing wrong in what the writers wrote; every kind of damage found, named, and put in quarantine when asked."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from opgrpo_data.schema import DROPPED, TRAJECTORIES, UPDATES, table_of, to_parquet
from opgrpo_data.seal import sealed_json
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder
from opgrpo_data.upkeep import compaction
from opgrpo_data.upkeep.verify import Report, verify
from tests.opgrpo_data.factories import RUN, folder, overwrite, random_latents, record, records, shard_rows
from tests.opgrpo_data.upkeep.whole import files_of, whole_store, with_digest


class Contents(dict[str, bytes]):
    """Files by path. Hypothesis prints what a test was given."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """The files of a whole store. Do not change them."""
    store = whole_store(str(tmp_path_factory.mktemp("whole") / "store"))
    with patch.object(compaction, "MANY_FILES", 1):
        compaction.compact(store)
    return Contents(files_of(store))


@pytest.fixture
def store(written: Contents, tmp_path: Path) -> Store:
    """A store of one's own, to be damaged."""
    for path, content in written.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return Store.open(str(tmp_path))


def change(store: Store, path: str, changed: Callable[[bytes], bytes]) -> None:
    """Replace a file by something made of it."""
    overwrite(store.directory, path, changed(store.directory.read(path)))


def flip(store: Store, path: str, position: int, bit: int = 0) -> None:
    """Flip a bit of a file."""
    change(store, path, lambda data: data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])


def told(report: Report) -> list[tuple[str, str | None, str]]:
    """What was found, without the remedies."""
    return [(finding.path, finding.member, finding.problem) for finding in report.findings]


def tar_of(store: Store, kind: str = "latents") -> str:
    """The first tar."""
    return str(shard_rows(store)[0][f"{kind}_file"])


# -- nothing is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_sound_store(deep: bool, scheme: str, tmp_path: Path) -> None:
    store = whole_store(f"{scheme}{tmp_path}/store")
    report = verify(store, deep=deep)
    assert report.findings == []
    assert (report.trajectories, report.quarantined, report.unsealed) == (4, 0, 0)
    sizes = {entry.path: entry.size for entry in store.directory.entries()}
    assert report.files == len(sizes)
    indexes = sum(size for path, size in sizes.items() if path.endswith((".parquet", ".json")))
    assert report.bytes == (sum(sizes.values()) if deep else indexes)


def test_an_empty_store_and_one_with_unusual_shards(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    assert verify(store, deep=True).findings == []
    long_name = record("x" * 120, np.zeros((2, 3), np.float16), dtype="float16", media_format="webp", media=b"")
    scalars = record("t9", random_latents(0, 1, (), "bfloat16"), dtype="bfloat16")
    write_shard(store.directory, folder(), "00000", [long_name, scalars])
    write_shard(store.directory, folder(), "00001", [])
    write_shard(store.directory, folder(1), "0.a", records(3, media=bytes(513), iteration=1))
    assert verify(store, deep=True).findings == []


def test_progress_is_shown_over_files(store: Store) -> None:
    seen: dict[str, int] = {}

    def bar(tasks: Any, description: str) -> Iterator[str]:
        seen[description] = len(tasks)
        yield from tasks

    verify(store, deep=False, bar=bar)
    assert (seen["shards"], seen["plans"], seen["tensors"]) == (2, 2, 4)


def test_leftovers_are_no_findings(store: Store) -> None:
    """What killed commands leave behind is for `gc`."""
    directory = store.directory
    overwrite(directory, f"{folder()}/00000.0badc0de.latents.tar", b"half a tar")
    overwrite(directory, "policies/lost/weights.safetensors", with_digest({}))
    Path(directory.root, "trajectories", ".tmp-0123").write_bytes(b"half a file")
    assert verify(store, deep=True).findings == []


# -- flipped bits --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(written: Contents, memory: Store, data: st.DataObject) -> None:
    """Anywhere: latents, media, notes, padding, tar headers, tables, footers, documents, weights, states, conditions."""
    path = data.draw(st.sampled_from(sorted(written)))
    position = data.draw(st.integers(0, len(written[path]) - 1))
    flip(memory, path, position, data.draw(st.integers(0, 7)))
    try:
        findings = verify(Store.open(memory.directory.url), deep=True).findings
        assert any(path in f"{finding.path} {finding.problem}" for finding in findings)
    except StoreError as error:
        assert path == "store.json", error  # noqa: PT017  a store that does not open has been noticed
    finally:
        overwrite(memory.directory, path, written[path])


@pytest.fixture(scope="module")
def memory(written: Contents) -> Store:
    """The whole store in memory."""
    directory = Directory("memory://flipped-bits")
    for path, content in written.items():
        overwrite(directory, path, content)
    return Store(directory)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_truncation_is_found(written: Contents, memory: Store, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(set(written) - {"store.json"})))
    overwrite(memory.directory, path, written[path][: data.draw(st.integers(0, len(written[path]) - 1))])
    for deep in (True, False):
        findings = verify(memory, deep=deep).findings
        whole_members = path.endswith(".tar")  # the zeros that fill up a tar are looked at in deep alone
        named = any(path in f"{finding.path} {finding.problem}" for finding in findings)
        assert named or (whole_members and not deep)
    overwrite(memory.directory, path, written[path])


# -- tars ----------------------------------------------------------------------------------------------------------------


def test_a_damaged_latent_names_the_trajectory_and_goes_to_quarantine(store: Store) -> None:
    row = shard_rows(store)[1]
    flip(store, row["latents_file"], row["latents_offset"] + row["latents_length"] - 1)
    assert verify(store, deep=False).findings == []
    [finding] = verify(store, deep=True).findings
    assert (finding.path, finding.member) == (row["latents_file"], f"{row['trajectory_id']}.latents.npy")
    assert f"latent 3: expected crc32 {row['latents_crc32'][3]:08x}, found crc32" in finding.problem
    assert "verify --deep --quarantine" in finding.remedy
    assert store.quarantined() == set()
    assert len(verify(store, deep=True, quarantine=True).findings) == 1
    [kept] = store.read_tables("quarantine", store.files("quarantine")).to_pylist()
    assert (kept["trajectory_id"], kept["reason"], kept["file"]) == (row["trajectory_id"], "checksum", row["latents_file"])
    again = verify(store, deep=True)
    assert (again.findings, again.quarantined) == ([], 1)


def test_damaged_media(store: Store) -> None:
    row = shard_rows(store)[0]
    flip(store, row["media_file"], row["media_offset"])
    [(path, member, problem)] = told(verify(store, deep=True, quarantine=True))
    assert (path, member) == (row["media_file"], f"{row['trajectory_id']}.png")
    assert f"expected crc32 {row['media_crc32']:08x}" in problem
    assert store.quarantined() == {row["trajectory_id"]}


@pytest.mark.parametrize(
    ("position", "problem"),
    [
        (3, "its tar header is damaged"),  # the member's name
        (130, "its tar header is damaged"),  # its size
        (505, "its tar header is damaged"),  # what fills up the header
        (512 + 7, "its npy header is not that of float32"),
        (512 + 100, "its npy header is not that of float32"),  # a space that fills it up
        (-1025, "there is something behind the last member"),
        (-1, "there is something behind the last member"),
    ],
)
def test_damage_that_readers_by_offset_would_not_see(position: int, problem: str, store: Store) -> None:
    path = tar_of(store)
    flip(store, path, position % len(store.directory.read(path)))
    [(found, _, said)] = told(verify(store, deep=True, quarantine=True))
    assert (found, problem in said) == (path, True)
    assert store.quarantined() == set()  # the trajectory is whole


def test_damaged_padding_and_note(store: Store) -> None:
    row = shard_rows(store)[0]
    flip(store, row["latents_file"], row["latents_offset"] + row["latents_length"] + 1)
    note = row["media_offset"] + 512 + 512  # behind the picture's block and the note's header
    flip(store, row["media_file"], note + store.directory.read(row["media_file"])[note:].index(b"red"))
    name = row["trajectory_id"]
    found = told(verify(store, deep=True))
    assert found[0] == (row["latents_file"], f"{name}.latents.npy", "the bytes behind it, up to the next block, are not zero")
    assert found[1][:2] == (row["media_file"], f"{name}.json")
    assert "it is not as it was written (its seal says crc32" in found[1][2]


def test_a_damaged_note_header_hides_nothing_behind_it(store: Store) -> None:
    first, second = shard_rows(store)[:2]
    flip(store, first["media_file"], first["media_offset"] + 512 + 5)
    flip(store, second["media_file"], second["media_offset"])
    assert [member for _, member, _ in told(verify(store, deep=True))] == [
        f"{first['trajectory_id']}.json",
        f"{second['trajectory_id']}.png",
    ]


@pytest.mark.parametrize("deep", [False, True])
def test_a_missing_tar(deep: bool, store: Store) -> None:
    path, names = tar_of(store), {row["trajectory_id"] for row in shard_rows(store)[:2]}
    store.directory.remove(path)
    assert told(verify(store, deep=deep, quarantine=True)) == [(path, None, "there is no such file; 2 trajectories lie in it")]
    rows = store.read_tables("quarantine", store.files("quarantine")).to_pylist()
    assert {row["trajectory_id"]: row["reason"] for row in rows} == dict.fromkeys(names, "missing")
    assert verify(store, deep=deep).findings == []


@pytest.mark.parametrize("deep", [False, True])
def test_a_tar_cut_inside_a_member(deep: bool, store: Store) -> None:
    row = shard_rows(store)[1]
    cut = row["latents_offset"] + 200
    change(store, row["latents_file"], lambda data: data[:cut])
    [(path, _, problem)] = told(verify(store, deep=deep, quarantine=True))
    assert (path, f"it ends after {cut} bytes, at least" in problem) == (row["latents_file"], True)
    [kept] = store.read_tables("quarantine", store.files("quarantine")).to_pylist()
    assert (kept["trajectory_id"], kept["reason"], kept["found_crc32"]) == (row["trajectory_id"], "truncated", None)


def test_tars_that_grew_or_shrank_behind_the_last_member(store: Store) -> None:
    change(store, tar_of(store), lambda data: data + bytes(512))
    change(store, tar_of(store, "media"), lambda data: data[:-512])
    assert {problem for _, _, problem in told(verify(store, deep=True))} == {
        "the tar has 10752 bytes, 10240 were written",
        "the tar has 9728 bytes, 10240 were written",
    }


def test_members_in_another_place_than_the_index_says(store: Store) -> None:
    """The tar is replaced by one with a member more."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("stranger"), io.BytesIO())
        with tarfile.open(fileobj=io.BytesIO(store.directory.read(tar_of(store)))) as old:
            for info in old.getmembers():
                tar.addfile(info, old.extractfile(info))
    overwrite(store.directory, tar_of(store), content.getvalue())
    problems = [problem for _, _, problem in told(verify(store, deep=True))]
    assert any("its tar header is damaged" in problem for problem in problems)


# -- indexes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"latents_length": 5}, "contradicts itself"),
        ({"latents_crc32": [1]}, "contradicts itself"),
        ({"latents_dtype": None, "latent_dtype": "float8"}, "contradicts itself"),
        ({"media_offset": None}, r"the row has no ['media_offset']"),
        ({"media_offset": -1}, "the row has negative sizes or offsets"),
        ({"num_steps": 9}, "the row has 4 latents for 9 steps"),
        ({"media_file": "../../etc/passwd"}, "the row's bytes would lie in ../../etc/passwd, a file of another shard"),
        ({"trajectory_id": None}, "a row has no trajectory_id"),
    ],
    ids=repr,
)
def test_rows_that_contradict_themselves(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(2))
    rows = shard_rows(store)
    rows[1] |= {name: value for name, value in changes.items() if name in TRAJECTORIES.names}
    index = store.files("trajectories")[0]
    store.directory.remove(index)
    store.publish_table(index, table_of(rows, TRAJECTORIES))
    for deep in (False, True):
        found = [said for path, _, said in told(verify(store, deep=deep)) if path == index]
        assert len(found) == 1
        assert problem in found[0]


def test_a_trajectory_in_two_indexes(store: Store) -> None:
    index = store.files("trajectories")[0]
    store.publish_table(index.replace("00000.parquet", "00001.parquet"), store.read_tables("trajectories", [index]))
    twin = index.replace("00000.parquet", "00001.parquet")
    names = sorted(row["trajectory_id"] for row in shard_rows(store)[:2])
    found = [(f.path, f.problem, f.remedy) for f in verify(store, deep=False).findings if "has too" in f.problem]
    problem = f"it has trajectories that {index} has too (2, for example {names[0]})"
    assert found == [(twin, problem, "nothing is lost, their bytes are the same: readers take one of them")]


def test_buffers_and_plans_of_lost_indexes(store: Store) -> None:
    lost = shard_rows(store)[0]["trajectory_id"]
    index = store.files("trajectories")[0]
    store.directory.remove(index)
    found = {path: problem for path, _, problem in told(verify(store, deep=False))}
    assert found.keys() == {
        index,
        index.rpartition("/")[0],
        *(f"{iteration_folder('buffers', RUN, i)}.parquet" for i in (0, 1)),
        f"{iteration_folder('plans', RUN, 0)}.parquet",
        *store.files("rewards", iteration=0),
    }
    buffer = found[f"{iteration_folder('buffers', RUN, 1)}.parquet"]
    assert buffer == f"it names trajectories that no index has (1, for example {lost})"


def test_a_damaged_table_says_how_it_is_made_again(store: Store) -> None:
    path = store.files("plans")[0]
    change(store, path, lambda data: data[:-1])
    [finding] = verify(store, deep=False).findings
    assert finding.path == path
    assert finding.problem.startswith("it is damaged (")
    assert finding.remedy == "restore it from a copy, or remove it and run `opgrpo select` for that iteration again"


def test_dropped_shards_have_no_bytes(store: Store) -> None:
    for kind in ("latents", "media"):
        store.directory.remove(tar_of(store, kind))
    index = store.files("trajectories")[0]
    assert len(verify(store, deep=True).findings) == 2
    row = {"index_file": index, "run_id": RUN, "iteration": 0, "shard": "00000"}
    store.publish_table(index.replace("trajectories/", "dropped/"), table_of([row], DROPPED))
    assert verify(store, deep=True).findings == []
    lost = f"dropped/run={RUN}/iter=000000/0.parquet"
    store.publish_table(lost, table_of([row | {"index_file": "nowhere", "shard": "0"}], DROPPED))
    assert told(verify(store, deep=True)) == [(lost, None, "it speaks of nowhere, which is not there")]


# -- generations ---------------------------------------------------------------------------------------------------------


def test_generations_know_of_indexes_that_are_gone(store: Store) -> None:
    """Nothing else speaks of the last updates: without them the iteration would be trained again."""
    path = store.files("updates")[1]
    store.directory.remove(path)
    assert (path, None, "it is gone; catalog/updates/gen-000001.json holds a copy of its rows") in told(
        verify(store, deep=False)
    )


def test_generations_and_their_indexes_agree(store: Store) -> None:
    path = store.files("updates")[0]
    overwrite(
        store.directory, path, to_parquet(table_of([{"run_id": RUN, "iteration": 0, "new_policy_id": "new"}] * 2, UPDATES))
    )
    assert told(verify(store, deep=False)) == [
        ("catalog/updates/gen-000001.json", None, f"it tells 1 rows of {path}, which has 2")
    ]


def test_damaged_generations(store: Store) -> None:
    [path] = store.directory.list("catalog/plans/*.parquet")
    flip(store, path, 100)
    assert verify(store, deep=False).findings == []
    [finding] = verify(store, deep=True).findings
    assert (finding.path, finding.remedy) == (
        "catalog/plans/gen-000001.json",
        "run `opgrpo compact`, which makes another",
    )
    assert f"it cannot be used: {path}: expected crc32" in finding.problem


# -- documents -----------------------------------------------------------------------------------------------------------


def test_documents(store: Store) -> None:
    def publish(path: str, document: dict[str, Any]) -> None:
        overwrite(store.directory, path, sealed_json(document))

    [run] = store.documents("runs/*.json")
    publish("policies/a/policy.json", {"policy_id": "a"})
    publish("policies/b/policy.json", {"policy_id": "b", "created_at": run["created_at"], "kind": "average"})
    publish(f"runs/{RUN}.json", run | {"prompts": {"train": "prompts/gone.parquet"}, "base_policy_id": "gone"})
    publish("pins/ghost.json", {"run_id": "ghost", "pinned_at": run["created_at"]})
    overwrite(store.directory, "runs/torn.json", b'{"run_id": "to')
    overwrite(store.directory, "runs/unsealed.json", json.dumps(run | {"run_id": "unsealed"}).encode())
    assert {(path, problem.partition(" (")[0]) for path, _, problem in told(verify(store, deep=False))} == {
        ("policies/a/policy.json", "it lacks ['created_at']"),
        ("policies/b/policy.json", "it speaks of policies/b/weights.safetensors, which is not there"),
        (f"runs/{RUN}.json", "it speaks of prompts/gone.parquet, which is not there"),
        (f"runs/{RUN}.json", "it speaks of policies/gone/policy.json, which is not there"),
        ("pins/ghost.json", "it speaks of runs/ghost.json, which is not there"),
        ("runs/torn.json", "it is not JSON"),
        ("runs/unsealed.json", "it has no seal, which every file of this format version has"),
    }


# -- tensors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "its header would have 0 bytes"),
        ((2**62).to_bytes(8, "little"), "its header would have 4611686018427387904 bytes"),
        ((4).to_bytes(8, "little") + b"nope", "its header cannot be read (JSONDecodeError"),
        ((2).to_bytes(8, "little") + b"[]", "its header cannot be read ("),
        ((19).to_bytes(8, "little") + b'{"__metadata__": 3}', "its header cannot be read (AttributeError"),
    ],
)
def test_files_that_are_no_safetensors(content: bytes, problem: str, store: Store) -> None:
    overwrite(store.directory, "conditions/encoder=e/1.safetensors", content)
    [finding] = verify(store, deep=False).findings
    assert problem in finding.problem
    assert finding.remedy == "restore it from a copy, or remove it, and its prompts are encoded again"


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "leaves a gap or an overlap"),
        ({"dtype": "pickle", "shape": [1], "data_offsets": [0, 4]}, "KeyError"),
        ({"dtype": "F32", "shape": [1]}, "KeyError"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "its header tells"),
    ],
)
def test_headers_that_contradict_themselves(entry: dict[str, Any], problem: str, store: Store) -> None:
    header = json.dumps({"w": entry}).encode()
    overwrite(store.directory, "policies/mean/weights.safetensors", len(header).to_bytes(8, "little") + header + bytes(4))
    [finding] = verify(store, deep=False).findings
    assert problem in finding.problem


def test_tensors_are_read_in_deep_alone(store: Store) -> None:
    for path in ("policies/mean/weights.safetensors", "conditions/encoder=e/0.safetensors"):
        flip(store, path, len(store.directory.read(path)) - 1)
    assert verify(store, deep=False).findings == []
    found = {path: problem for path, _, problem in told(verify(store, deep=True))}
    assert "it is damaged: expected digest" in found["policies/mean/weights.safetensors"]
    assert "it is damaged: tensor k/embeds: expected crc32" in found["conditions/encoder=e/0.safetensors"]


def test_a_report_is_json(store: Store) -> None:
    store.directory.remove(tar_of(store))
    report = json.loads(json.dumps(asdict(verify(store, deep=True))))
    assert report["deep"] is True
    assert report["findings"][0].keys() == {"path", "member", "problem", "remedy", "kind"}
