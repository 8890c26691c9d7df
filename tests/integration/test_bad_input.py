"""What users get wrong, and disks: one line that says what to do, exit code 1 or 2, and a store that is as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.disk import room
from opgrpo_data.catalog import Catalog
from opgrpo_data.store import Store
from tests.integration.harness import opgrpo, opgrpo_json

Finished = tuple[Path, dict[str, Any]]


def refused(*arguments: str | Path, code: int = 1) -> str:
    """Run a command that must fail: the one line it says."""
    done = opgrpo(*arguments, check=False)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def snapshot(store: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture
def store(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished store, to be damaged."""
    copy = tmp_path / "store"
    shutil.copytree(finished[0], copy)
    return copy


def test_unknown_key_names_the_nearest(config: Path, tmp_path: Path) -> None:
    said = refused("run", config, "--store", tmp_path / "new", "--set", "train.learning_rat=1", "--set", "trian.lr=1", code=2)
    assert "unknown key 'trian'; did you mean 'train'?" in said
    assert not (tmp_path / "new").exists()


def test_wrong_value_says_which_and_what(config: Path, tmp_path: Path) -> None:
    said = refused("run", config, "--store", tmp_path, "--set", "rollout.group_size=many", code=2)
    assert "rollout.group_size" in said
    assert "'many'" in said


def test_impossible_combination_is_refused_with_a_reason(config: Path, tmp_path: Path) -> None:
    said = refused("run", config, "--store", tmp_path, "--set", "replay.prefix_steps=5", code=2)
    assert "the old policy has to draw a tail" in said


def test_missing_config_and_missing_store(config: Path, tmp_path: Path) -> None:
    assert "no config file" in refused("run", tmp_path / "absent.yaml", "--store", tmp_path, code=2)
    assert "make one with `opgrpo init" in refused("rollout", config, "--store", tmp_path / "absent")
    assert "no store at" in refused("sql", "SELECT 1", "--store", tmp_path / "absent")


def test_a_config_that_is_a_folder_and_a_store_that_is_a_file(config: Path, tmp_path: Path) -> None:
    assert "cannot read the config file" in refused("run", tmp_path, "--store", tmp_path / "store", code=2)
    (tmp_path / "letter.txt").write_text("dear reader")
    assert "choose another directory" in refused("init", config, "--store", tmp_path / "letter.txt")


def test_a_model_that_is_not_there(config: Path, tmp_path: Path) -> None:
    said = refused("init", config, "--store", tmp_path / "store", "--set", f"policy.model={tmp_path}/absent")
    assert "cannot load the StableDiffusion3Pipeline" in said
    assert not (tmp_path / "store").exists()


def test_usage_error_is_exit_code_2() -> None:
    assert opgrpo("rollout", check=False).returncode == 2
    assert opgrpo("no-such-command", check=False).returncode == 2


def test_a_directory_that_is_no_store(config: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    assert "not empty and not an opgrpo store" in refused("run", config, "--store", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "a red square", "split": "held_out"}\n'])
def test_prompt_file_without_training_prompts(content: str, config: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    said = refused("init", config, "--store", tmp_path / "store", "--set", f"prompts.source={prompts}")
    assert "holds no training prompt" in said
    assert not (tmp_path / "store").exists()


def test_fewer_prompts_than_an_iteration_takes(config: Path, tmp_path: Path) -> None:
    said = refused("init", config, "--store", tmp_path / "store", "--set", "prompts.limit=1")
    assert "rollout.prompts_per_iteration is 2, but there are only 1 training prompts" in said
    assert not (tmp_path / "store").exists()


def test_store_of_a_newer_format(config: Path, store: Path) -> None:
    (store / "store.json").write_text(json.dumps({"format": "opgrpo-store", "version": "2.0"}))
    before = snapshot(store)
    for command in (["rollout", config], ["sql", "SELECT 1"]):
        assert "upgrade opgrpo" in refused(*command, "--store", store)
    assert snapshot(store) == before


def test_run_that_the_store_does_not_know(config: Path, store: Path) -> None:
    said = refused("rollout", config, "--store", store, "--set", "train.lr=1e-5")
    assert "has no run" in said
    assert "opgrpo init" in said


@pytest.mark.parametrize("how", ["nan", "raises"])
def test_reward_that_always_fails_stops_the_run(how: str, config: Path, tmp_path: Path) -> None:
    options = ["eval.reward.name=scene_soft", "reward.name=tests.integration.rewards:Failing", f"reward.options.how={how}"]
    overrides = [part for option in options for part in ("--set", option)]
    said = refused("run", config, "--store", tmp_path / "store", *overrides)
    assert f"failing_{how} failed on all 8 samples" in said
    errors = Catalog(Store.open(str(tmp_path / "store"))).query("SELECT error FROM reward_errors").to_pylist()
    assert len(errors) == 8
    assert ("ran away" if how == "raises" else "not a finite number") in errors[0]["error"]


def test_reward_that_fails_sometimes_leaves_those_out(config: Path, tmp_path: Path, finished: Finished) -> None:
    texts = opgrpo_json("sql", "--store", finished[0], "SELECT DISTINCT text FROM trajectories JOIN prompts USING (prompt_id)")
    word = sorted(row["text"] for row in texts)[0]
    store = tmp_path / "store"
    options = ["eval.reward.name=scene_soft", "reward.name=tests.integration.rewards:Failing"]
    options += ["reward.options.how=raises", f"reward.options.word={word}"]
    overrides = [part for option in options for part in ("--set", option)]
    done = opgrpo("run", config, "--store", store, *overrides)
    assert "failed on 4 of 8 samples" in done.stderr
    assert "failed on 8 of 8 samples" in opgrpo("score", config, "--store", store, *overrides).stderr  # retried, and no worse
    rows = opgrpo_json("sql", "--store", store, "SELECT iteration, count(*) AS n FROM plans GROUP BY 1 ORDER BY 1")
    assert [row["n"] for row in rows] == [4, 4]


def test_corrupt_latents_are_quarantined_and_training_goes_on(config: Path, store: Path) -> None:
    """A byte flips in a trajectory that the plan uses, after it was planned."""
    opened = Store.open(str(store))
    row = Catalog(opened).query("SELECT * FROM trajectories WHERE iteration = 1 AND prefix_steps = 0 LIMIT 1").to_pylist()[0]
    for path in [*store.glob("updates/run=*/iter=000001.parquet"), *store.glob("states/run=*/iter=000002/*")]:
        path.unlink()
    flip(store / row["latents_file"], row["latents_offset"] + row["latents_header"] + 5)
    done = opgrpo("train", config, "--store", store)
    assert "quarantined and left out" in done.stderr
    assert row["trajectory_id"] in done.stderr
    told = opgrpo_json("sql", "--store", store, "SELECT trajectory_id, file FROM quarantine")
    assert told == [{"trajectory_id": row["trajectory_id"], "file": row["latents_file"]}]
    trained = opgrpo_json("sql", "--store", store, "SELECT trajectory_id FROM updates WHERE iteration = 1")
    assert len(trained) == 7
    assert row["trajectory_id"] not in {one["trajectory_id"] for one in trained}


def test_corrupt_prefix_is_drawn_fresh(config: Path, store: Path) -> None:
    """A byte flips in a trajectory that the next iteration would replay."""
    opened = Store.open(str(store))
    entry = Catalog(opened).query("SELECT * FROM buffer WHERE iteration = 1 LIMIT 1").to_pylist()[0]
    flip(store / entry["latents_file"], entry["latents_offset"] + entry["latents_header"] + 5)
    done = opgrpo("run", config, "--store", store, "--set", "iterations=3")
    assert "quarantined and not replayed" in done.stderr
    assert entry["trajectory_id"] in done.stderr
    query = "SELECT count(*) FILTER (prefix_steps > 0) AS replayed, count(*) AS n FROM trajectories WHERE iteration = 2"
    assert opgrpo_json("sql", "--store", store, query) == [{"replayed": 1, "n": 8}]


def test_corrupt_picture_becomes_an_error_row(config: Path, store: Path) -> None:
    opened = Store.open(str(store))
    row = Catalog(opened).query("SELECT * FROM trajectories LIMIT 1").to_pylist()[0]
    flip(store / row["media_file"], row["media_offset"] + 60)
    shutil.rmtree(store / "rewards")
    done = opgrpo("score", config, "--store", store)
    assert "failed on 1 of 16 samples" in done.stderr
    errors = opgrpo_json("sql", "--store", store, "SELECT trajectory_id, error FROM reward_errors")
    assert [error["trajectory_id"] for error in errors] == [row["trajectory_id"]]
    assert "expected crc32" in errors[0]["error"]


def test_no_space_left(config: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 1 MiB: the training state does not fit. With room again, the run ends as it would have."""
    store = tmp_path / "store"
    with room(store, 1024**2, mounted=False):
        said = refused("run", config, "--store", store)
    assert "make room and run the same command again" in said
    assert not list(store.rglob(".tmp-*"))
    assert opgrpo_json("sql", "--store", store, "SELECT count(*) AS n FROM trajectories") == [{"n": 8}]
    assert opgrpo_json("run", config, "--store", store)["iterations"] == 2


def test_another_model_under_the_same_name(config: Path, tmp_path: Path) -> None:
    """The folder that the run began with now holds a model of another latent shape."""
    from pipelines.embedded import PIPELINE_DIR

    model, store = tmp_path / "model", tmp_path / "store"
    shutil.copytree(PIPELINE_DIR, model)
    overrides = ["--set", f"policy.model={model}", "--set", "policy.options.max_sequence_length=0"]
    opgrpo("init", config, "--store", store, *overrides)
    opgrpo("rollout", config, "--store", store, *overrides)
    opgrpo("score", config, "--store", store, *overrides)
    opgrpo("select", config, "--store", store, *overrides)
    settings = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps({**settings, "sample_size": 2}))
    before = snapshot(store)
    said = refused("train", config, "--store", store, *overrides)
    assert "is not the one that run small-" in said
    assert snapshot(store) == before


def test_sql_cannot_change_the_store(store: Path) -> None:
    before = snapshot(store)
    for query in (f"COPY prompts TO '{store}/prompts/new.parquet'", "DROP VIEW prompts", "SELECT 1; SELECT 2", "SELEC 1"):
        refused("sql", query, "--store", store)
    assert "disabled by configuration" in refused("sql", "SELECT * FROM read_text('/etc/hostname')", "--store", store)
    assert snapshot(store) == before


def flip(path: Path, position: int) -> None:
    """Flip one bit of a file."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_run_cannot_be_made_shorter(config: Path, store: Path) -> None:
    assert "trained to iteration 2 already" in refused("run", config, "--store", store, "--set", "iterations=1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_reward", "unknown reward 'no_such_reward'; known: "),
        ("os:getcwd", "which has no text attribute 'name'"),
        ("broken_reward:make", "cannot import reward 'broken_reward:make': ZeroDivisionError"),
    ],
)
def test_rewards_that_are_none(name: str, message: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    said = refused("run", config, "--store", tmp_path / "store", "--set", f"reward.name={name}")
    assert message in said


def test_score_before_rollout(config: Path, tmp_path: Path) -> None:
    opgrpo("init", config, "--store", tmp_path / "store")
    assert "run `opgrpo rollout` first" in refused("score", config, "--store", tmp_path / "store")
    assert "run `opgrpo rollout` first" in refused("select", config, "--store", tmp_path / "store")
    assert "run `opgrpo select` first" in refused("train", config, "--store", tmp_path / "store")


def test_a_damaged_buffer_is_made_again(config: Path, store: Path) -> None:
    """As the message says: remove it and select again."""
    buffer = next(store.glob("buffers/run=*/iter=000001.parquet"))
    good = buffer.read_bytes()
    buffer.chmod(0o644)
    buffer.write_bytes(good[: len(good) // 2])
    longer = ("run", config, "--store", store, "--set", "iterations=3")
    assert "remove it and run `opgrpo select` for that iteration again" in refused(*longer)
    buffer.unlink()
    opgrpo("select", config, "--store", store, "--iteration", "1")
    assert buffer.read_bytes() == good
    opgrpo(*longer)
