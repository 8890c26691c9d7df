"""Importing a replay buffer: trajectories of one store are continued by a run in another, from its first iteration on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.store import Store
from pipelines.config import RunConfig
from pipelines.experiment import Experiment
from pipelines.progress import Progress
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.train import train
from tests.integration.harness import opgrpo, opgrpo_json
from tests.pipelines.helpers import SMALL, created, flipped, merged, reopened, rows_of, small

Row = dict[str, Any]


def importing(source: Path | str, **changes: Any) -> RunConfig:
    """The small configuration under another name, with the buffers of `source`."""
    return small(**merged({"name": "second", "seed": 1, "replay": {"import_buffer": str(source)}}, changes))


def iterate(experiment: Experiment, iteration: int) -> None:
    """The stages of one iteration."""
    for stage in (rollout, score, select, train):
        stage(experiment, iteration)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_rows(store: Path | str, kind: str, **which: Any) -> list[Row]:
    """All rows of one kind of table."""
    opened = Store.open(str(store))
    rows: list[Row] = opened.read_tables(kind, opened.files(kind, **which)).to_pylist()
    return rows


def latents(experiment: Experiment, row: Row, steps: int) -> bytes:
    """x_0..x_steps as stored."""
    return read_latents(experiment.store.directory, LatentLocation.of(row), 0, steps).tobytes()


def last_buffer(store: Path, run: str) -> dict[str, Row]:
    """The last buffer of a run, by trajectory_id."""
    opened = Store.open(str(store))
    return {r["trajectory_id"]: r for r in opened.read_tables("buffers", opened.files("buffers", run=run)[-1:]).to_pylist()}


@pytest.fixture(scope="module")
def imported(replayed: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run in another store after two iterations; it began with the buffer of the store `replayed`. Do not change it."""
    experiment = created(tmp_path_factory.mktemp("imported"), importing(replayed))
    iterate(experiment, 0)
    iterate(experiment, 1)
    return experiment


def imported_buffer(experiment: Experiment) -> dict[str, Row]:
    """The buffer before the first iteration, by trajectory_id."""
    path = experiment.buffer_path(-1)
    assert path is not None
    return {row["trajectory_id"]: row for row in experiment.store.read_tables("buffers", [path]).to_pylist()}


# -- what is imported ----------------------------------------------------------------------------------------------------


def test_the_last_buffer_is_copied_with_bytes_densities_and_lineage(imported: Experiment, replayed: Path) -> None:
    theirs, ours = last_buffer(replayed, small().run_id), imported_buffer(imported)
    assert len(ours) == 4
    assert ours.keys() == theirs.keys()
    source = {row["trajectory_id"]: row for row in all_rows(replayed, "trajectories")}
    copies = {row["trajectory_id"]: row for row in all_rows(imported.store.directory.url, "trajectories", run="imported")}
    assert copies.keys() == ours.keys()
    placed = {"shard", "latents_file", "latents_offset", "latents_header", "latents_length", "media_file", "media_offset"}
    other = Store.open(str(replayed))
    for name, copy in copies.items():
        original = source[name]
        assert {n: v for n, v in copy.items() if n not in placed} == {n: v for n, v in original.items() if n not in placed}
        assert latents(imported, copy, 5) == read_latents(other.directory, LatentLocation.of(original), 0, 5).tobytes()
        assert read_media(imported.store.directory, copy) == read_media(other.directory, original)
        # The buffer points at the copy, in our store.
        assert ours[name]["latents_file"] == copy["latents_file"]
        assert imported.store.directory.exists(ours[name]["latents_file"])


def test_ages_go_on(imported: Experiment, replayed: Path) -> None:
    """An entry a iterations old is born at -1 - a, so that it is a + 1 old after our first iteration."""
    theirs, ours = last_buffer(replayed, small().run_id), imported_buffer(imported)
    assert {row["age"] for row in theirs.values()} >= {0, 1}
    for name, row in ours.items():
        assert row["born_iteration"] == -1 - theirs[name]["age"] < 0
        assert (row["age"], row["iteration"], row["run_id"]) == (theirs[name]["age"], -1, imported.run_id)
        for column in ("reward", "decayed_reward", "fresh_mean", "fresh_std", "behaviour_logprob", "noise_seeds", "sigmas"):
            assert row[column] == pytest.approx(theirs[name][column]), column
    for iteration in (0, 1):
        for row in rows_of(imported, "buffers", iteration):
            if row["run_id"] == imported.run_id and row["iteration"] == iteration:
                assert row["age"] == iteration - row["born_iteration"]
                if row["trajectory_id"] in ours:
                    assert row["age"] == theirs[row["trajectory_id"]]["age"] + iteration + 1


def test_the_first_iteration_continues_imported_entries(imported: Experiment, replayed: Path) -> None:
    ours = imported_buffer(imported)
    mine = f"trajectories/run={imported.run_id}/"
    rows = [row for row in rows_of(imported, "trajectories", 0) if row["latents_file"].startswith(mine)]
    assert len(rows) == 8
    continued = [row for row in rows if row["parent_id"]]
    assert len(continued) == 2  # one of each group
    there = {row["trajectory_id"]: row for row in all_rows(replayed, "trajectories")}
    other = Store.open(str(replayed))
    for row in continued:
        assert row["parent_id"] in ours
        parent = there[row["parent_id"]]
        assert parent["prompt_id"] == row["prompt_id"]
        prefix = read_latents(other.directory, LatentLocation.of(parent), 0, 2).tobytes()
        assert latents(imported, row, 2) == prefix
        assert row["behaviour_logprob"][:2] == parent["behaviour_logprob"][:2]
        assert row["noise_seeds"] == parent["noise_seeds"][:2] + [row["seed"]] * 3
        assert all(value > 0 for value in row["path_variance"])  # another policy drew the prefix
    plan = {row["trajectory_id"]: row for row in rows_of(imported, "plans", 0)}
    for row in continued:
        log_w = np.sum(row["old_logprob"][:2]) - np.sum(row["behaviour_logprob"][:2])
        found = plan[row["trajectory_id"]]
        assert found["role"] == "continuation"
        assert found["importance_weight"] == pytest.approx(min(np.exp(log_w), 2.0), rel=1e-6)


def test_the_second_lap_meets_prompts_that_only_the_import_knows(imported: Experiment) -> None:
    """Iteration 1 visits the other two prompts: their entries, too, come from the other store."""
    ours = imported_buffer(imported)
    continued = [row for row in rows_of(imported, "trajectories", 1) if row["parent_id"]]
    assert {row["parent_id"] for row in continued} <= set(ours)
    assert len(continued) == 2
    assert imported.iteration == 2  # trained


def test_an_import_may_be_thinned_by_a_rule_of_its_own(replayed: Path, tmp_path: Path) -> None:
    """The importing run's selection applies, and only its own prompts come over."""
    config = importing(replayed, prompts={"limit": 2}, replay={"selection": "worst"})
    experiment = created(tmp_path, config)
    theirs = last_buffer(replayed, small().run_id)
    asked = {prompt.prompt_id for prompt in experiment.prompts["train"]}
    assert len(asked) == 2
    expected = {name for name, row in theirs.items() if row["prompt_id"] in asked}
    assert set(imported_buffer(experiment)) == expected
    assert len(all_rows(tmp_path / "store", "trajectories")) == len(expected)


def test_an_import_can_be_imported(imported: Experiment, tmp_path: Path) -> None:
    """Copies of copies: the third store takes the last buffer of the run in the second."""
    experiment = created(tmp_path, importing(imported.store.directory.url, name="third"))
    theirs = {row["trajectory_id"]: row for row in rows_of(imported, "buffers", 1) if row["iteration"] == 1}
    assert set(imported_buffer(experiment)) == set(theirs)
    rollout(experiment, 0)
    assert sum(row["parent_id"] is not None for row in rows_of(experiment, "trajectories", 0)) >= 2


def test_quarantined_entries_stay_behind(replayed: Path, tmp_path: Path) -> None:
    shutil.copytree(replayed, tmp_path / "source")
    source = Store.open(str(tmp_path / "source"))
    victim = next(iter(last_buffer(tmp_path / "source", small().run_id)))
    source.quarantine(victim, CorruptionError("file", "member", 1, 2))
    experiment = created(tmp_path, importing(tmp_path / "source"))
    assert len(imported_buffer(experiment)) == 3
    assert victim not in imported_buffer(experiment)


def test_a_damaged_trajectory_is_left_out(replayed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(replayed, tmp_path / "source")
    entries = last_buffer(tmp_path / "source", small().run_id)
    victim, row = next(iter(entries.items()))
    location = LatentLocation.of(row)
    flipped(tmp_path / "source" / location.file, location.offset + location.header + 5)
    experiment = created(tmp_path, importing(tmp_path / "source"))
    assert set(imported_buffer(experiment)) == set(entries) - {victim}
    assert "not imported" in capsys.readouterr().err


def test_two_runs_that_import_share_what_they_have_in_common(replayed: Path, tmp_path: Path) -> None:
    first = created(tmp_path, importing(replayed))
    second = created(tmp_path, importing(replayed, name="another"))
    assert set(imported_buffer(first)) == set(imported_buffer(second))
    held = all_rows(tmp_path / "store", "trajectories", run="imported")
    assert len(held) == len({row["trajectory_id"] for row in held}) == 4
    scored = {row["trajectory_id"] for row in all_rows(tmp_path / "store", "rewards", run="imported")}
    assert scored == set(imported_buffer(first))


def test_an_import_cut_short_is_finished_although_the_source_went_on(replayed: Path, tmp_path: Path) -> None:
    """The shard is committed, the buffer is not, and by the next attempt the source holds other entries."""
    shutil.copytree(replayed, tmp_path / "source")
    config = importing(tmp_path / "source")
    created(tmp_path, config)
    for path in [*(tmp_path / "store").glob("runs/*.json"), *(tmp_path / "store").glob("buffers/**/*.parquet")]:
        path.unlink()
    other = Experiment.open(str(tmp_path / "source"), small(iterations=3), Progress(quiet=True))
    iterate(other, 2)
    expected = set(last_buffer(tmp_path / "source", small().run_id))
    assert set(imported_buffer(created(tmp_path, config))) == expected


# -- again, and from the same store --------------------------------------------------------------------------------------


def test_init_is_idempotent_also_after_a_crash(replayed: Path, tmp_path: Path) -> None:
    config = importing(replayed)
    experiment = created(tmp_path, config)
    before = snapshot(tmp_path / "store")
    assert created(tmp_path, config).run_id == experiment.run_id
    assert snapshot(tmp_path / "store") == before
    [document] = (tmp_path / "store" / "runs").glob("*.json")
    document.unlink()  # as if the process had died before its last write
    again = created(tmp_path, config)
    assert again.document["imported_buffer"] == experiment.buffer_path(-1)
    after = snapshot(tmp_path / "store")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {f"runs/{config.run_id}.json"}


def test_the_source_is_only_read(imported: Experiment, replayed: Path, tmp_path: Path) -> None:
    before = snapshot(replayed)
    created(tmp_path, importing(replayed))
    assert snapshot(replayed) == before


def test_an_imported_run_does_not_need_the_source_any_more(replayed: Path, tmp_path: Path) -> None:
    shutil.copytree(replayed, tmp_path / "source")
    experiment = created(tmp_path, importing(tmp_path / "source"))
    shutil.rmtree(tmp_path / "source")
    iterate(reopened(experiment), 0)
    assert sum(row["parent_id"] is not None for row in rows_of(experiment, "trajectories", 0)) >= 2


@pytest.mark.parametrize("spelling", ["as it is", "trailing slash", "relative"])
def test_importing_from_the_same_store_copies_nothing(
    spelling: str, replayed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(replayed, tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    url = {"as it is": str(tmp_path / "store"), "trailing slash": f"{tmp_path}/store/", "relative": "store"}[spelling]
    before = snapshot(tmp_path / "store")
    config = importing(url)
    experiment = created(tmp_path, config)
    made = {name for name in snapshot(tmp_path / "store") if name not in before}
    assert made == {f"runs/{config.run_id}.json", f"buffers/run={config.run_id}-imported/iter=000000.parquet"}
    theirs, ours = last_buffer(tmp_path / "store", small().run_id), imported_buffer(experiment)
    assert {name: row["latents_file"] for name, row in ours.items()} == {n: row["latents_file"] for n, row in theirs.items()}
    rollout(experiment, 0)
    mine = [row for row in rows_of(experiment, "trajectories", 0) if row["run_id"] == config.run_id and row["parent_id"]]
    assert {row["parent_id"] for row in mine} <= set(theirs)
    assert len(mine) == 2


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout": {"sampler": "dance_sde"}}, r"small-\w+ differs in rollout.sampler$"),
        ({"rollout": {"num_steps": 6, "noise_level": 0.5}}, "differs in rollout.num_steps, rollout.noise_level"),
        ({"reward": {"name": "scene_strict"}}, "differs in reward.name"),
        (
            {"reward": {"name": "tests.pipelines.bad_rewards:picky", "options": {"colour": "red"}}},
            "differs in reward.name, reward.options",
        ),
        ({"rollout": {"storage_dtype": "float16"}}, "differs in rollout.storage_dtype"),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, replayed: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=f"replay.import_buffer: the store .* has no entry for this run: .*{reason}"):
        created(tmp_path, importing(replayed, **changes))
    assert not list((tmp_path / "store").glob("runs/*.json"))
    assert not list((tmp_path / "store").glob("buffers/**/*.parquet"))


def test_what_may_differ(replayed: Path, tmp_path: Path) -> None:
    """How the run trains, how many it draws and how it replays is its own affair."""
    changes: dict[str, Any] = {
        "train": {"lr": 1e-3, "objective": "forward"},
        "rollout": {"group_size": 3},
        "replay": {"truncation": "adaptive", "prefix_steps": 3, "members": 2, "correction": "none"},
    }
    experiment = created(tmp_path, importing(replayed, **changes))
    iterate(experiment, 0)
    assert len(imported_buffer(experiment)) == 4


def test_other_prompts_have_no_entries(replayed: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "a red circle number {i}"}}\n' for i in range(2)))
    config = importing(replayed, prompts={"source": str(prompts), "limit": None})
    with pytest.raises(StoreError, match=r"has no entry for this run: small-\w+ has 0 entries for this run's prompts"):
        created(tmp_path, config)


def test_a_store_without_runs_or_no_store_at_all(tmp_path: Path) -> None:
    Store.create(str(tmp_path / "empty"))
    with pytest.raises(StoreError, match="/empty has no entry for this run: it has no runs"):
        created(tmp_path, importing(tmp_path / "empty"))
    with pytest.raises(StoreError, match=r"no store at .*nowhere: make one with `opgrpo init"):
        created(tmp_path, importing(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_buffers_has_no_entries(rolled: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has 0 entries for this run's prompts"):
        created(tmp_path, importing(rolled))


# -- the command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The importing run's configuration without the import."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merged(dict(SMALL), {"name": "second", "seed": 1})))
    return path


def test_import_buffer_is_a_flag_of_init(config_file: Path, replayed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    told = opgrpo_json("init", config_file, "--store", store, "--import-buffer", replayed)
    assert told["run_id"] == importing(replayed).run_id
    assert len(all_rows(store, "trajectories", run="imported")) == 4
    # The same as the setting, so the stages find the run by it.
    again = opgrpo_json("init", config_file, "--store", store, "--set", f"replay.import_buffer={replayed}")
    assert again == told
    done = opgrpo_json("rollout", config_file, "--store", store, "--set", f"replay.import_buffer={replayed}")
    assert done["detail"]["continuations"] == 2
    assert [path.name for path in (store / "runs").iterdir()] == [f"{told['run_id']}.json"]


def test_import_of_a_dry_run_touches_nothing(config_file: Path, replayed: Path, tmp_path: Path) -> None:
    said = opgrpo("init", config_file, "--store", tmp_path / "store", "--import-buffer", replayed, "--dry-run").stdout
    assert importing(replayed).run_id in said
    assert not (tmp_path / "store").exists()


def test_an_import_that_does_not_fit_is_one_line(config_file: Path, replayed: Path, tmp_path: Path) -> None:
    arguments = ("init", config_file, "--store", tmp_path / "store", "--import-buffer", replayed)
    done = opgrpo(*arguments, "--set", "rollout.sampler=dance_sde", check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: replay.import_buffer: the store ")
    assert line.endswith("differs in rollout.sampler")
