"""Index rows, tars and JSON made to harm: refused in one line. Nothing executes, leaves the store or hangs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.exchange.export import export_dataset
from opgrpo_data.exchange.importing import import_dataset
from opgrpo_data.locations import LatentLocation, Locations, Spans
from opgrpo_data.reading import read_latents, read_many, read_media
from opgrpo_data.schema import TRAJECTORIES, table_of, to_parquet
from opgrpo_data.seal import JSON_BYTES, read_json, sealed_json
from opgrpo_data.store import Store
from opgrpo_data.upkeep.garbage import collect
from opgrpo_data.upkeep.verify import verify
from tests.opgrpo_data.factories import folder, overwrite, shard_rows
from tests.opgrpo_data.hostile import TARS, one_line, outside, refusal, small_store, watched

INDEX = f"{folder()}/00000.parquet"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """See small_store."""
    return small_store(str(tmp_path / "store"))


# -- index rows ------------------------------------------------------------------------------------------------------------

LIES: list[dict[str, Any]] = [
    {"latents_file": "../../../../../../etc/passwd"},
    {"latents_file": "/etc/passwd"},
    {"latents_file": "trajectories/../../x.tar"},
    {"latents_file": ""},
    {"latents_file": "."},
    {"latents_file": "a\0b"},
    {"latents_file": "x" * 5000},
    {"latents_file": None},
    {"latents_offset": -1},
    {"latents_offset": 2**63 - 1},
    {"latents_length": 2**62},
    {"latents_header": 2**40, "latents_length": 2**40 + 128},
    {"latent_shape": [2**31 - 1] * 3},
    {"latent_shape": [2**20, 2**15], "latents_length": 128 + 4 * 4 * 2**35},
    {"latent_shape": []},
    {"latent_dtype": "O"},
    {"latents_crc32": []},
    {"trajectory_id": "../../x"},
    {"trajectory_id": "x" * 10**5},
    {"trajectory_id": None},
    {"media_file": "../../../../../../etc/passwd"},
    {"media_file": None},
    {"media_file": "a\0b"},
    {"media_offset": -1},
    {"media_offset": 2**63 - 1},
    {"media_length": 2**63 - 1},
    {"media_length": 2**33},
    {"media_length": -1},
    {"media_length": None},
    {"media_crc32": None},
    {"num_steps": -5},
    {"num_steps": None},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: ",".join(f"{name}={str(value)[:20]!r}" for name, value in lie.items()))
def test_a_lying_row_is_refused_by_every_reader(lie: dict[str, Any], store: Store) -> None:
    honest, row = shard_rows(store)
    overwrite(store.directory, INDEX, to_parquet(table_of([honest, row | lie], TRAJECTORIES)))
    table = store.read_tables("trajectories", [INDEX])
    readers: list[Callable[[], object]] = [
        lambda: _all_latents(store, table),
        lambda: read_latents(store.directory, LatentLocation.of(table.to_pylist()[1]), 0, 3),
        lambda: read_media(store.directory, table.to_pylist()[1]),
        lambda: collect(store, delete=True, grace=timedelta(0), keep_iterations=1),
    ]
    with watched() as events:
        said = [refusal(read) for read in readers]
        report = verify(store, deep=True)
    assert report.findings
    refused = [each for each in said if each is not None]
    assert all(map(one_line, refused))
    assert refused or lie.keys() & {"num_steps", "trajectory_id"}
    assert outside(store, events) == []
    assert Path("/etc/passwd").exists()


def _all_latents(store: Store, table: pa.Table) -> None:
    locations = Locations.of(table)
    for read in read_many(store.directory, Spans.of(locations, 0 * locations.count, locations.count - 1)):
        if isinstance(read, CorruptionError):
            raise read


# -- tars ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_damage(name: str, store: Store, tmp_path: Path) -> None:
    row = shard_rows(store)[0]
    for kind in ("latents", "media"):
        overwrite(store.directory, row[f"{kind}_file"], TARS[name])
    before = sorted(tmp_path.rglob("*"))
    with watched() as events:
        with pytest.raises(CorruptionError, match=r"t0\.latents\.npy latent 0"):
            read_latents(store.directory, LatentLocation.of(row), 0, 3)
        with pytest.raises(CorruptionError, match=r"t0\.png"):
            read_media(store.directory, row)
        findings = verify(store, deep=True).findings
    assert {finding.path for finding in findings if finding.kind == "damage"} == {row["latents_file"], row["media_file"]}
    assert sorted(tmp_path.rglob("*")) == before
    assert outside(store, events) == []


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_not_imported(name: str, store: Store, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export_dataset(store, str(export), "webdataset")
    [file] = export.glob("*.tar")
    file.write_bytes(TARS[name])
    before = set(tmp_path.rglob("*"))
    told: list[dict[str, Any]] = []
    said = refusal(lambda: told.append(import_dataset(str(export), str(tmp_path / "new"))))
    assert said is None or one_line(said)
    assert all(each["trajectories"] == 0 and each["left_out"] for each in told)
    added = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "new") for path in added)
    assert not Path("/tmp/escaped.latents.npy").exists()


def test_a_pipe_in_the_store_does_not_block(store: Store) -> None:
    row = shard_rows(store)[0]
    for path in (INDEX, row["media_file"], "runs/run-0.json"):
        file = Path(store.directory.path(path))
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(OSError, match=r"not a regular file: .*" + file.name):
            store.directory.read(path)
        with pytest.raises(OSError, match=r"not a regular file"):
            store.directory.read_range(path, 0, 10)
    latents = Path(store.directory.path(row["latents_file"]))
    latents.unlink()
    os.mkfifo(latents)
    with pytest.raises(OSError, match="seek"):
        read_latents(store.directory, LatentLocation.of(row), 0, 3)


# -- JSON ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10**6, "is not JSON"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "is not JSON"),
        (b'{"a": ' + b"9" * 10**5 + b"}", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"NaN", "holds no JSON object"),
        (b"[]", "holds no JSON object"),
        (b" " * (JSON_BYTES + 1), f"has {JSON_BYTES + 1} bytes, {JSON_BYTES} at most are read"),
    ],
    ids=["brackets", "braces", "digits", "nothing", "no text", "NaN", "list", "long"],
)
def test_hostile_json_is_refused(content: bytes, message: str, store: Store) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(content)
    overwrite(store.directory, "runs/run-0.json", content)
    with pytest.raises(StoreError, match=rf"runs/run-0\.json {message}.*restore it from a copy") as caught:
        list(store.documents("runs/*.json"))
    assert one_line(caught.value)
    with pytest.raises(StoreError, match=r"runs/run-0\.json"):
        Catalog(store)
    assert "runs/run-0.json" in {finding.path for finding in verify(store, deep=True).findings}
    overwrite(store.directory, "store.json", content)
    with pytest.raises(StoreError, match=rf"store\.json {message}"):
        Store.open(store.directory.url)


@pytest.mark.parametrize(
    "lie",
    [
        {"run_id": "../../x"},
        {"run_id": "run-1"},
        {"run_id": None},
        {"run_id": ["run-0"]},
        {"created_at": 5},
        {"created_at": None},
        {"created_at": "yesterday"},
        {"created_at": "2026-01-01T00:00:00"},
        {"created_at": "9999-99-99T00:00:00+00:00"},
        {"config": []},
        {"config": {"name": ["x"], "seed": 0}},
        {"config": {"name": "x", "seed": 10**30}},
        {"config": {"name": "x", "seed": float("nan")}},
        {"command": {}},
        {"software": "none"},
    ],
    ids=str,
)
def test_a_document_that_means_nothing_is_refused(lie: dict[str, Any], store: Store) -> None:
    [run] = store.documents("runs/*.json")
    overwrite(store.directory, "runs/run-0.json", sealed_json(run | lie))
    with pytest.raises(StoreError, match=r"runs/run-0\.json (is of|holds what it cannot) .*restore it from a copy") as caught:
        list(store.documents("runs/*.json"))
    assert one_line(caught.value)
    with pytest.raises(StoreError, match=r"runs/run-0\.json"):
        Catalog(store)
    assert "runs/run-0.json" in {finding.path for finding in verify(store, deep=True).findings}


@pytest.mark.parametrize(
    "lie",
    [
        {"policy_id": "policy-1"},
        {"iteration": "x"},
        {"iteration": 2**70},
        {"kind": [1]},
        {"parameters": {}},
        {"created_at": {}},
    ],
    ids=str,
)
def test_a_policy_that_means_nothing_is_refused(lie: dict[str, Any], store: Store) -> None:
    [policy] = store.documents("policies/*/policy.json")
    overwrite(store.directory, "policies/policy-0/policy.json", sealed_json(policy | lie))
    with pytest.raises(StoreError, match=r"policies/policy-0/policy\.json (is of|holds what it cannot)") as caught:
        list(store.documents("policies/*/policy.json"))
    assert one_line(caught.value)


@pytest.mark.parametrize(
    "version",
    ["1", "", "1.2.3", "x.y", "-1.0", "1.99", "9" * 5000 + ".0", None, 1.2, [1, 2], {"a": 1}],
    ids=lambda v: str(v)[:10],
)
def test_an_odd_version_is_refused(version: Any, store: Store) -> None:
    overwrite(store.directory, "store.json", json.dumps({"format": "opgrpo-store", "version": version}).encode())
    if version == 1.2:  # a number is printed as the version it looks like
        assert Store.open(store.directory.url).version == "1.2"
        return
    with pytest.raises(StoreError, match="format version") as caught:
        Store.open(store.directory.url)
    assert one_line(caught.value)
