"""One trajectory shown: what SQL says of it, told by hand; its strip, pixel for pixel what the model's decoder makes of it."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.reading import read_media
from opgrpo_data.schema import TRAJECTORIES, table_of, to_parquet
from opgrpo_data.seal import read_json, sealed_json
from opgrpo_data.store import Store
from pipelines import media
from pipelines.policies.base import POLICIES
from pipelines.show import CELL, show, strip
from tests.integration.harness import opgrpo
from tests.opgrpo_data.factories import overwrite
from tests.pipelines.helpers import flipped

Finished = tuple[Path, dict[str, Any]]


@pytest.fixture
def store(finished: Finished) -> Store:
    """A finished run. Do not change it."""
    return Store.open(str(finished[0]))


@pytest.fixture
def forked(finished: Finished, tmp_path: Path) -> Store:
    """A copy to be changed."""
    shutil.copytree(finished[0], tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


def rows(store: Store, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Catalog(store).query(sql).to_pylist()
    return found


def test_what_is_known_of_a_continuation(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a picture no model is loaded."""
    monkeypatch.setattr(POLICIES, "known", {})
    row = rows(store, "FROM trajectories WHERE parent_id IS NOT NULL ORDER BY trajectory_id")[0]
    name, parent = row["trajectory_id"], row["parent_id"]
    told = show(store, name)
    assert told["trajectory_id"] == name
    assert [link["trajectory_id"] for link in told["parents"]] == [parent]
    assert name in [link["trajectory_id"] for link in show(store, parent)["children"]]
    prompts = {each["prompt_id"]: each for each in store.read_tables("prompts", store.files("prompts")).to_pylist()}
    assert told["prompt"] == prompts[row["prompt_id"]]["text"]
    assert told["metadata"] == json.loads(prompts[row["prompt_id"]]["metadata"])
    values = [
        each for each in store.read_tables("rewards", store.files("rewards")).to_pylist() if each["trajectory_id"] == name
    ]
    assert told["rewards"] == [{key: each[key] for key in ("reward", "version", "value", "error")} for each in values]
    updates = [
        each for each in store.read_tables("updates", store.files("updates")).to_pylist() if each["trajectory_id"] == name
    ]
    [use] = told["uses"]
    assert (use["role"], use["iteration"], use["optimizer_steps"]) == ("continuation", row["iteration"], len(updates))
    assert use["importance_weight"] == updates[0]["importance_weight"]
    assert use["advantage"] == updates[0]["advantage"]
    assert use["loss"] == pytest.approx(sum(each["loss"] for each in updates))
    assert (told["quarantine"], told["dropped"]) == (None, False)
    assert "picture" not in told


def test_how_long_it_was_in_the_buffer(store: Store) -> None:
    buffers = store.read_tables("buffers", store.files("buffers")).to_pylist()
    for name in {row["trajectory_id"] for row in buffers}:
        iterations = [row["iteration"] for row in buffers if row["trajectory_id"] == name]
        [span] = show(store, name)["buffers"]
        assert (span["first_iteration"], span["last_iteration"], span["iterations"]) == (
            min(iterations),
            max(iterations),
            len(iterations),
        )
        break


def test_a_chain_of_continuations_to_its_beginning(forked: Store) -> None:
    """Also one that a damaged index closes to a circle."""
    [index] = forked.files("trajectories", iteration=0)[:1]
    table = forked.read_tables("trajectories", [index]).to_pylist()
    for row, parent in zip(table, [*table[1:], table[0]], strict=True):
        row["parent_id"] = parent["trajectory_id"]
    overwrite(forked.directory, index, to_parquet(table_of(table, TRAJECTORIES)))
    found = show(forked, table[0]["trajectory_id"])["parents"]
    assert {row["trajectory_id"] for row in found} == {row["trajectory_id"] for row in table}


def test_best_and_beginnings(store: Store) -> None:
    best = rows(store, "SELECT max(value) AS value FROM rewards")[0]["value"]
    expected = rows(store, f"SELECT min(trajectory_id) AS name FROM rewards WHERE value = {best!r}")[0]["name"]
    assert show(store, "best")["trajectory_id"] == expected
    assert show(store, expected[:20])["trajectory_id"] == expected


def test_best_is_never_a_damaged_one(forked: Store) -> None:
    best = show(forked, "best")["trajectory_id"]
    forked.quarantine(best, CorruptionError("file", "member", 1, None))
    assert show(forked, "best")["trajectory_id"] != best
    assert show(forked, best)["quarantine"] == "truncated"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("zz", "^the store has no trajectory zz: see the view trajectories of `opgrpo sql`, or say `best`$"),
        ("../x", "^trajectory_id '../x' cannot be part of a path"),
        ("x' OR 1=1", "^trajectory_id .* cannot be part of a path"),
    ],
)
def test_no_such_trajectory(name: str, told: str, store: Store) -> None:
    with pytest.raises(ValueError, match=told):
        show(store, name)


def test_several_begin_like_that(store: Store) -> None:
    first = sorted(row["trajectory_id"] for row in rows(store, "SELECT trajectory_id FROM trajectories"))
    letter = next(name[0] for name, after in pairwise(first) if name[0] == after[0])
    with pytest.raises(StoreError, match=f"^several trajectories begin with {letter}, among them {letter}"):
        show(store, letter)


def test_nothing_scored(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^no trajectory of the store has a reward: run `opgrpo score` first$"):
        show(Store.create(str(tmp_path / "store")), "best")


# -- for people ---------------------------------------------------------------------------------------------------------------

LITERALS = re.compile(r"\bNone\b|\bTrue\b|\bFalse\b|[\[\]{}]|datetime")


def test_a_trajectory_in_words(store: Store, finished: Finished) -> None:
    """As people read it, not as Python writes it."""
    name = rows(store, "FROM trajectories WHERE parent_id IS NULL ORDER BY trajectory_id")[0]["trajectory_id"]
    said = opgrpo("store", "show", name, "--store", finished[0]).stdout
    assert not LITERALS.search(said), said
    assert {"parents: none", "quarantine: none", "dropped: no"} <= set(said.splitlines())
    told = show(store, name)
    assert f"latent_shape: {', '.join(map(str, told['latent_shape']))}" in said.splitlines()
    [reward] = told["rewards"]
    assert f"rewards: \n  reward {reward['reward']}, version {reward['version']}, value {reward['value']}, error none" in said


def test_runs_in_words(forked: Store) -> None:
    """Also one that is known by its trajectories alone."""
    [path] = forked.directory.list("runs/*.json")
    forked.directory.remove(path)
    said = opgrpo("store", "ls", "--store", forked.directory.url).stdout
    assert not LITERALS.search(said), said
    assert "kept_policies" in said
    assert re.search(r"│ false\s*│$", said, re.MULTILINE)  # not pinned


# -- the strip --------------------------------------------------------------------------------------------------------------


def test_the_strip_ends_with_the_stored_picture(store: Store, tmp_path: Path) -> None:
    told = show(store, "best", tmp_path / "deep" / "strip.png")
    assert told["picture"] == str(tmp_path / "deep" / "strip.png")
    drawn = np.asarray(Image.open(tmp_path / "deep" / "strip.png"))
    [row] = rows(store, f"FROM trajectories WHERE trajectory_id = '{told['trajectory_id']}'")
    sample = media.decode(read_media(store.directory, row))
    expected = np.asarray(Image.fromarray(sample).resize((CELL, CELL), Image.Resampling.NEAREST))
    assert drawn.shape == (18 + CELL + 4, 4 + (row["num_steps"] + 1) * (CELL + 4), 3)
    assert np.array_equal(drawn[18 : 18 + CELL, -4 - CELL : -4], expected)
    noise = drawn[18 : 18 + CELL, 4 : 4 + CELL]
    assert np.abs(noise.astype(int) - expected).mean() > 5


def test_pictures_of_any_size_and_videos_under_their_sigmas() -> None:
    picture = np.full((2 * CELL, 4 * CELL, 3), 10, np.uint8)
    video = np.stack([np.full((CELL, CELL, 3), value, np.uint8) for value in (1, 2, 3)])
    drawn = np.asarray(Image.open(io.BytesIO(strip([picture, video], [1.0, 0.0]))))
    assert drawn.shape == (18 + CELL + 4, 4 + 2 * CELL + 4 + CELL + 4, 3)
    assert (drawn[18 : 18 + CELL, 4 : 4 + 2 * CELL] == 10).all()
    assert (drawn[18 : 18 + CELL, -4 - CELL : -4] == 2).all()
    assert (drawn[:18] < 128).any()  # text


def test_no_picture_goes_into_the_store(store: Store) -> None:
    with pytest.raises(StoreError, match=r"strip.png lies in the store .*: choose a place outside it$"):
        show(store, "best", Path(store.directory.root, "policies", "strip.png"))


def test_what_is_there_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "strip.png").write_text("mine")
    with pytest.raises(ValueError, match=f"^{tmp_path}/strip.png is there already: choose another file$"):
        show(store, "best", tmp_path / "strip.png")
    assert (tmp_path / "strip.png").read_text() == "mine"


@pytest.mark.parametrize("to", ["/proc/none/strip.png", "/proc/strip.png", "{}/file/strip.png", "{}/folder"])
def test_a_picture_that_cannot_be_written(
    to: str, store: Store, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before a model is loaded; and the command fails."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    place = Path(to.format(tmp_path))
    monkeypatch.setattr(POLICIES, "known", {})
    told = f"{place} is there already: choose another file" if place.exists() else f"cannot write {place}: "
    with pytest.raises((ValueError, OSError), match=re.escape(told)):
        show(store, "best", place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    failed = opgrpo("store", "show", "best", "--store", finished[0], "--to", place, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert told in failed.stderr


def test_a_full_disk_leaves_no_half_of_a_picture(store: Store, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^\[Errno 27\] cannot write {tmp_path}/strip.png: File too large$"):
            show(store, "best", tmp_path / "strip.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def without_picture(store: Store, tmp_path: Path) -> str:
    """Why there is no strip; the rest is told all the same."""
    told = show(store, "best", tmp_path / "strip.png")
    assert told["picture"] is None
    assert told["prompt"]
    assert not (tmp_path / "strip.png").exists()
    reason: str = told["no_picture"]
    return reason


def test_damaged_latents(forked: Store, tmp_path: Path) -> None:
    name = show(forked, "best")["trajectory_id"]
    [row] = rows(forked, f"FROM trajectories WHERE trajectory_id = '{name}'")
    flipped(Path(forked.directory.root, row["latents_file"]), row["latents_offset"] + row["latents_header"] + 3)
    assert f"member {name}.latents.npy latent 0: expected crc32" in without_picture(forked, tmp_path)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        (
            {"family": "os:system", "model": "touch evil"},
            r"^the policy of run \S+ is built by 'os:system', Python code that is not opgrpo's: ",
        ),
        ({"family": "unheard"}, r"^the policy of run \S+ is built by 'unheard', Python code that is not opgrpo's: "),
    ],
)
def test_a_model_that_cannot_be_loaded(policy: dict[str, str], told: str, forked: Store, tmp_path: Path) -> None:
    """A store may come from anyone: to look at it runs no code that it names."""
    [path] = forked.directory.list("runs/*.json")
    document = read_json(forked.directory.read(path))
    document["config"]["policy"] |= policy
    overwrite(forked.directory, path, sealed_json(document))
    reason = without_picture(forked, tmp_path)
    assert re.search(told, reason), reason


def test_a_model_whose_files_changed(forked: Store, tmp_path: Path) -> None:
    [path] = forked.directory.list("runs/*.json")
    document = read_json(forked.directory.read(path)) | {"model_id": "another"}
    overwrite(forked.directory, path, sealed_json(document))
    told = f"the files of 'embedded' changed since run {document['run_id']} began (another, now "
    assert without_picture(forked, tmp_path).startswith(told)


def test_a_run_that_is_not_known(forked: Store, tmp_path: Path) -> None:
    [path] = forked.directory.list("runs/*.json")
    forked.directory.remove(path)
    assert without_picture(forked, tmp_path).endswith(", whose model would decode its latents")
