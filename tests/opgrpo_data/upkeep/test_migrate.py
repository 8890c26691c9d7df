"""Older stores: a fixture of every released version is opened, read, selected from and verified; `migrate` raises a copy."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from opgrpo_data import buffer
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.schema import SCHEMA_VERSION
from opgrpo_data.seal import sealed_json
from opgrpo_data.store import TABLES, Store, index_of, require_current
from opgrpo_data.stream import stream
from opgrpo_data.upkeep.garbage import collect
from opgrpo_data.upkeep.migrate import CHANGES, migrate
from opgrpo_data.upkeep.verify import verify
from tests.opgrpo_data.factories import buffer_rule, no_buffer, overwrite, plan, plan_rule
from tests.opgrpo_data.fixtures.make import FOLDER, SOFTWARE
from tests.opgrpo_data.upkeep.whole import files_of

VERSIONS = sorted(SOFTWARE)
OLDER = [version for version in VERSIONS if version != SCHEMA_VERSION]
MEMBERS = 12
"""Trajectories in every fixture: two iterations of two groups of three."""


@pytest.fixture
def fixture(request: pytest.FixtureRequest) -> Store:
    """A fixture store. Do not change it."""
    return Store.open(str(FOLDER / f"store-{request.param}"))


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A fixture store of one's own."""
    shutil.copytree(FOLDER / f"store-{request.param}", tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


every = pytest.mark.parametrize("fixture", VERSIONS, indirect=True)
older = pytest.mark.parametrize("copy", OLDER, indirect=True)


def table(store: Store, kind: str) -> pa.Table:
    """All rows of one kind."""
    return store.read_tables(kind, store.files(kind))


# -- reading -------------------------------------------------------------------------------------------------------------


def test_every_version_has_a_fixture() -> None:
    assert sorted(path.name for path in FOLDER.glob("store-*")) == [f"store-{version}" for version in VERSIONS]
    assert VERSIONS[-1] == SCHEMA_VERSION
    assert sorted(CHANGES) == VERSIONS[1:]
    for version in VERSIONS:
        files = files_of(Store.open(str(FOLDER / f"store-{version}")))
        assert sum(map(len, files.values())) < 300_000
        assert not [path for path in files if path.endswith(".safetensors")]


@every
def test_it_opens_and_every_view_answers(fixture: Store) -> None:
    catalog = Catalog(fixture)
    views = [name for (name,) in catalog.connection.execute("SELECT table_name FROM (SHOW TABLES) AS t(table_name)").fetchall()]
    assert len(views) >= len(TABLES)
    rows = {view: catalog.query(f"SELECT * FROM {view}").num_rows for view in views}
    for view in ("prompts", "policies", "runs", "trajectories", "rewards", "buffer", "plans", "updates", "evals"):
        assert rows[view] > 0, view
    assert rows["trajectories"] == rows["rewards"] == MEMBERS
    assert catalog.query("SELECT DISTINCT role FROM plans ORDER BY 1").to_pydict() == {"role": ["continuation", "fresh"]}


@every
def test_trajectories_read_and_verify(fixture: Store) -> None:
    unusable = fixture.unusable(table(fixture, "trajectories").to_pylist())
    whole = 0
    for row in table(fixture, "trajectories").to_pylist():
        location = LatentLocation.of(row)
        if row["trajectory_id"] in unusable:
            with pytest.raises(CorruptionError):
                read_latents(fixture.directory, location, 0, row["num_steps"])
            continue
        assert read_latents(fixture.directory, location, 0, row["num_steps"]).shape == (5, *row["latent_shape"])
        assert read_media(fixture.directory, row).startswith(b"\x89PNG")
        whole += 1
    assert whole == MEMBERS - len(unusable)
    report = verify(fixture, deep=True)
    assert (report.findings, report.trajectories) == ([], MEMBERS)
    assert (report.unsealed > 0) == (fixture.version in OLDER)


@every
def test_its_trajectories_can_be_selected_planned_and_streamed(fixture: Store) -> None:
    """As the stages do: the newest iteration's candidates against the buffer before, then the plan, then its bytes."""
    rows, scores = table(fixture, "trajectories"), table(fixture, "rewards")
    previous = table(fixture, "buffers")
    previous = previous.filter(pc.equal(previous["iteration"], 0))
    newest = rows.filter(pc.equal(rows["iteration"], 1))
    unusable = fixture.unusable([*rows.to_pylist(), *previous.to_pylist()])
    kept = buffer.select(previous, buffer.candidates(newest, scores), unusable, run_id="r", iteration=1, rule=buffer_rule())
    assert len(set(kept["prompt_id"].to_pylist())) == kept.num_rows == 2
    assert not unusable & set(kept["trajectory_id"].to_pylist())
    planned = plan(newest, scores, plan_rule(), excluded=unusable, iteration=1)
    batches = list(stream(fixture.directory, planned))
    assert sum(len(batch.rows) for batch in batches) == planned.num_rows > 0
    assert not any(batch.damaged for batch in batches)
    first = buffer.select(no_buffer(), buffer.candidates(rows, scores), unusable, run_id="r", iteration=1, rule=buffer_rule())
    assert first.num_rows == 2


def test_the_newest_fixture_has_what_its_version_brought() -> None:
    store = Store.open(str(FOLDER / f"store-{SCHEMA_VERSION}"))
    [quarantined] = table(store, "quarantine").to_pylist()
    assert quarantined["reason"] == "checksum"
    dropped = {row["index_file"] for row in table(store, "dropped").to_pylist()}
    assert dropped
    assert dropped == {index_of(row["latents_file"]) for row in table(store, "trajectories").to_pylist()} - {
        index_of(path) for path in store.directory.list("trajectories/*/*/*.latents.tar")
    }
    assert len(store.pins()) == 1


# -- migrate -------------------------------------------------------------------------------------------------------------


@older
def test_migrate_changes_the_version_alone(copy: Store) -> None:
    before = files_of(copy)
    url, version = copy.directory.url, copy.version
    told = migrate(url, dry_run=True)
    assert files_of(copy) == before
    assert (told["from"], told["to"], told["dry_run"]) == (version, SCHEMA_VERSION, True)
    assert any("table dropped" in change for change in told["changes"])
    assert any("table densities" in change for change in told["changes"]) == (version == "1.0")
    assert migrate(url) == told | {"dry_run": False}
    after = files_of(copy)
    assert {path for path in after if after[path] != before.get(path)} == {
        "store.json",
        f"migrations/{version}-{SCHEMA_VERSION}.json",
    }
    assert before.keys() <= after.keys()
    old, new = json.loads(before["store.json"]), json.loads(after["store.json"])
    assert new == old | {"version": SCHEMA_VERSION, "seal": new["seal"]}
    report = verify(Store.open(url), deep=True)
    assert (report.findings, report.unsealed, report.trajectories) == ([], 0, MEMBERS)
    assert migrate(url)["changes"] == []
    assert files_of(copy) == after


@older
def test_after_it_every_change_of_an_older_file_is_noticed(copy: Store) -> None:
    """Which no checksum of its own tells: a setting in a run's document, the statistics in a footer."""
    [run] = copy.directory.list("runs/*.json")
    index = copy.files("rewards")[0]
    changed = {
        run: copy.directory.read(run).replace(b'"seed": 0', b'"seed": 1'),
        index: copy.directory.read(index).replace(b"parquet-cpp-arrow", b"parquet-cpp-arroz"),
    }
    for path, content in changed.items():
        overwrite(copy.directory, path, content)
    assert verify(copy, deep=True).findings == []
    for path, content in changed.items():
        overwrite(copy.directory, path, content.replace(b'"seed": 1', b'"seed": 0').replace(b"arroz", b"arrow"))
    migrate(copy.directory.url)
    for path, content in changed.items():
        overwrite(copy.directory, path, content)
    findings = verify(copy, deep=False).findings
    assert {finding.path for finding in findings} == set(changed)
    assert all("it has changed since the store was migrated: expected crc32" in finding.problem for finding in findings)


@older
def test_what_older_software_would_misread_needs_a_migration(copy: Store) -> None:
    day = timedelta(days=1)
    with pytest.raises(StoreError, match=rf"needs {SCHEMA_VERSION}: run `opgrpo migrate --store {copy.directory.url}` first"):
        collect(copy, delete=True, grace=day, keep_iterations=1)
    with pytest.raises(StoreError, match=rf"has format version {copy.version}, and compact needs {SCHEMA_VERSION}"):
        require_current(copy, "compact")
    migrate(copy.directory.url)
    require_current(copy, "compact")
    collect(copy, delete=True, grace=day, keep_iterations=1)
    assert verify(copy, deep=True).findings == []


@older
def test_killed_before_the_marker_it_is_done_again(copy: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what older software published in between is written down, too."""
    version = copy.version

    def dies_at_the_marker(document: dict[str, object], **style: object) -> bytes:
        if "format" in document:
            raise KeyboardInterrupt
        return sealed_json(document, **style)

    monkeypatch.setattr("opgrpo_data.upkeep.migrate.sealed_json", dies_at_the_marker)
    with pytest.raises(KeyboardInterrupt):
        migrate(copy.directory.url)
    assert copy.version == version
    assert verify(copy, deep=True).findings == []
    path = copy.files("evals")[0]
    overwrite(copy.directory, path.replace(".parquet", "-again.parquet"), copy.directory.read(path))
    monkeypatch.undo()
    migrate(copy.directory.url)
    assert copy.version == SCHEMA_VERSION
    assert verify(copy, deep=True).findings == []


@older
def test_a_damaged_store_is_not_migrated(copy: Store) -> None:
    path = copy.files("plans")[0]
    overwrite(copy.directory, path, copy.directory.read(path)[:-1])
    before = files_of(copy)
    with pytest.raises(StoreError, match=rf"1 things are wrong in .*, the first: {path}: it is damaged .*; restore it from a"):
        migrate(copy.directory.url)
    assert files_of(copy) == before


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("9.0", r"has format version 9\.0, newer than .*: upgrade opgrpo to open it"),
        ("1.99", r"has format version 1\.99, newer than .*: upgrade opgrpo to open it"),
        ("0.9", r"has format version 0\.9: only stores of version 1 can be migrated"),
    ],
)
def test_newer_and_other_major_versions(version: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes(sealed_json({"format": "opgrpo-store", "version": version}))
    with pytest.raises(StoreError, match=message):
        migrate(str(tmp_path))


def test_a_current_store(tmp_path: Path) -> None:
    before = files_of(Store.create(str(tmp_path)))
    assert migrate(str(tmp_path))["changes"] == []
    assert files_of(Store.open(str(tmp_path))) == before
    with pytest.raises(StoreError, match="no store at"):
        migrate(str(tmp_path / "nowhere"))
