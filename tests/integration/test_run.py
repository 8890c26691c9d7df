"""One run from the first command to the last: what it prints, what it leaves, and that other tools can read it."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import webdataset
from PIL import Image

from opgrpo_data.store import Store
from tests.integration.harness import Running, opgrpo, opgrpo_json

Finished = tuple[Path, dict[str, Any]]
LEARNING_CURVE = (
    "SELECT iteration, count(*) AS n, avg(value) AS reward FROM trajectories JOIN rewards USING (trajectory_id) "
    "GROUP BY 1 ORDER BY 1"
)


def test_result_has_what_a_script_needs(finished: Finished) -> None:
    store, result = finished
    assert Path(result["store"]) == store
    assert result["run_id"].startswith("small-")
    assert result["samples"] == 16
    assert result["gain_error"] >= 0
    assert 0 <= result["held_out_before"] <= 1
    assert 0 <= result["held_out_after"] <= 1
    assert result["seconds"] > 0
    assert Image.open(result["picture"]).size[0] > 500


def test_learning_curve_by_sql(finished: Finished) -> None:
    rows = opgrpo_json("sql", "--store", finished[0], LEARNING_CURVE)
    assert [(row["iteration"], row["n"]) for row in rows] == [(0, 8), (1, 8)]
    assert all(0 <= row["reward"] <= 1 for row in rows)
    assert "reward" in opgrpo("sql", "--store", finished[0], LEARNING_CURVE).stdout


def test_plain_duckdb_reads_the_indexes(finished: Finished) -> None:
    query = f"SELECT count(*), count(DISTINCT trajectory_id) FROM '{finished[0]}/trajectories/**/*.parquet'"
    assert duckdb.connect().execute(query).fetchall() == [(16, 16)]


def test_plain_webdataset_reads_the_tars(finished: Finished) -> None:
    tars = sorted(map(str, finished[0].glob("trajectories/**/*.media.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None))
    assert len(samples) == 16
    assert {sample["__key__"] for sample in samples} == {json.loads(sample["json"])["trajectory_id"] for sample in samples}
    assert all(np.asarray(Image.open(io.BytesIO(sample["png"]))).shape == (24, 24, 3) for sample in samples)
    latents = sorted(map(str, finished[0].glob("trajectories/**/*.latents.tar")))
    arrays = [sample["latents.npy"] for sample in webdataset.WebDataset(latents, shardshuffle=False, nodesplitter=None)]
    assert all(np.load(io.BytesIO(array)).shape == (6, 8, 3, 3) for array in arrays)


def test_replay_reaches_the_plan(finished: Finished) -> None:
    """Both prompts are drawn in every iteration, so from the second on every group has a continuation."""
    rows = opgrpo_json(
        "sql",
        "--store",
        finished[0],
        "SELECT p.iteration, p.role, count(*) AS n, min(t.prefix_steps) AS k, bool_and(b.trajectory_id IS NOT NULL) AS known "
        "FROM plans p JOIN trajectories t USING (trajectory_id) LEFT JOIN trajectories b ON t.parent_id = b.trajectory_id "
        "GROUP BY ALL ORDER BY ALL",
    )
    assert rows == [
        {"iteration": 0, "role": "fresh", "n": 8, "k": 0, "known": False},
        {"iteration": 1, "role": "continuation", "n": 2, "k": 2, "known": True},
        {"iteration": 1, "role": "fresh", "n": 6, "k": 0, "known": False},
    ]


def test_lineage_of_a_gradient_is_one_query(finished: Finished) -> None:
    rows = opgrpo_json(
        "sql",
        "--store",
        finished[0],
        "SELECT u.trajectory_id, t.policy_id, t.latents_file, t.latents_offset, t.latents_length, prompts.text "
        "FROM updates u JOIN trajectories t USING (trajectory_id) JOIN prompts USING (prompt_id) WHERE u.iteration = 1",
    )
    assert len(rows) == 8
    for row in rows:
        with tarfile.open(finished[0] / row["latents_file"]) as tar:
            member = tar.getmember(f"{row['trajectory_id']}.latents.npy")
        assert (member.offset_data, member.size) == (row["latents_offset"], row["latents_length"])


def test_ratios_are_one_at_the_first_optimizer_step(finished: Finished) -> None:
    """Before the first update the current policy is the old one: nothing but rounding may move the ratio."""
    rows = opgrpo_json(
        "sql",
        "--store",
        finished[0],
        "SELECT max(abs(ratio - 1)) AS off FROM (SELECT unnest(ratio) AS ratio FROM updates WHERE optimizer_step = 0)",
    )
    assert rows[0]["off"] <= 1e-6


def test_a_finished_run_does_nothing_again(finished: Finished, config: Path) -> None:
    store, result = finished
    before = sorted(path for path in store.rglob("*") if path.is_file())
    again = opgrpo_json("run", config, "--store", store)
    assert again["policy_id"] == result["policy_id"]
    assert sorted(path for path in store.rglob("*") if path.is_file()) == before


def test_staged_commands_give_the_same_policy(finished: Finished, config: Path, tmp_path: Path) -> None:
    """The separate commands, one process each, end where the in-process loop ended."""
    store = tmp_path / "store"
    opgrpo("init", config, "--store", store, process=True)
    for _ in range(2):
        for stage in ("rollout", "score", "select", "train"):
            assert opgrpo_json(stage, config, "--store", store, process=True)["done"] > 0
    assert opgrpo_json("eval", config, "--store", store)["detail"]["policy_id"] == finished[1]["policy_id"]


def test_every_stage_says_nothing_to_do(finished: Finished, config: Path) -> None:
    for stage in ("rollout", "score", "select", "train", "eval"):
        outcome = opgrpo_json(stage, config, "--store", finished[0])
        assert (stage, outcome["done"]) == (stage, 0)


def test_dry_run_changes_nothing(finished: Finished, config: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    before = sorted(store.rglob("*"))
    longer = ("--set", "iterations=3")
    assert opgrpo_json("rollout", config, "--store", store, "--dry-run", *longer)["detail"]["trajectories"] == 8
    told = opgrpo_json("run", config, "--store", store, "--dry-run", *longer)
    assert (told["iterations_done"], told["iterations_to_do"], told["trajectories"]) == (2, 1, 8)
    assert sorted(store.rglob("*")) == before


def test_a_longer_run_continues_the_shorter(finished: Finished, config: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    result = opgrpo_json("run", config, "--store", store, "--set", "iterations=3")
    assert result["run_id"] == finished[1]["run_id"]
    assert len(Store.open(str(store)).files("updates", run=result["run_id"])) == 3


def test_flow_grpo_has_no_continuations(config: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    opgrpo("run", config, "--store", store, "--set", "algorithm=flow_grpo")
    rows = opgrpo_json("sql", "--store", store, "SELECT DISTINCT role FROM plans")
    assert rows == [{"role": "fresh"}]


def test_the_commands_to_go_on_with_can_be_pasted(config: Path, tmp_path: Path) -> None:
    """Even with a space in the path; the longer run is the same run."""
    store = tmp_path / "my store"
    said = opgrpo("run", config, "--store", store, "--set", "iterations=1", "--set", "seed=5").stdout
    commands = [shlex.split(line) for line in said.partition("go on with:\n")[2].splitlines()]
    assert [command[:2] for command in commands] == [["opgrpo", "sql"], ["opgrpo", "sql"], ["opgrpo", "run"]]
    for command in commands:
        opgrpo(*command[1:])
    runs = opgrpo_json("sql", "--store", store, "SELECT run_id, count(DISTINCT iteration) AS n FROM updates GROUP BY 1")
    assert [run["n"] for run in runs] == [2]


def test_two_processes_on_one_run_end_at_one_policy(finished: Finished, config: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    both = [Running("run", config, "--store", store, "--json") for _ in range(2)]
    ended = [running.wait() for running in both]
    assert [done.returncode for done in ended] == [0, 0], [done.stderr for done in ended]
    results = [json.loads(done.stdout) for done in ended]
    assert {result["policy_id"] for result in results} == {finished[1]["policy_id"]}
    for table in ("trajectories", "rewards", "plans"):
        assert opgrpo_json("sql", "--store", store, f"SELECT count(*) AS n FROM {table}") == [{"n": 16}]


def test_prompts_of_ones_own_without_a_held_out_split(config: Path, tmp_path: Path) -> None:
    """The run goes through unevaluated; when the file is gone it still goes on, when it says something else it does not."""
    prompts, store = tmp_path / "prompts.jsonl", tmp_path / "store"
    lines = ['{"text": "un carré rouge"}', '{"text": "a blue circle", "metadata": {"n": 1}}']
    prompts.write_text("\n".join(lines))
    settings = [f"prompts.source={prompts}", "reward.name=tests.integration.rewards:Failing", "reward.options.how=never"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = opgrpo("run", config, "--store", store, "--set", "iterations=1", *overrides)
    assert "no held-out prompts" in done.stderr
    texts = opgrpo_json("sql", "--store", store, "SELECT DISTINCT text FROM trajectories JOIN prompts USING (prompt_id)")
    assert sorted(row["text"] for row in texts) == ["a blue circle", "un carré rouge"]
    prompts.write_text("\n".join([*lines, '{"text": "one more"}']))
    refused = opgrpo("run", config, "--store", store, *overrides, check=False)
    assert refused.returncode == 1
    assert "changed since run" in refused.stderr
    prompts.unlink()
    assert opgrpo_json("run", config, "--store", store, *overrides)["held_out_after"] is None


def test_sql_keeps_every_column_and_is_json(finished: Finished) -> None:
    rows = opgrpo_json("sql", "--store", finished[0], "SELECT 1 AS a, 2 AS a, 'NaN'::DOUBLE AS x, ['inf'::DOUBLE, 0.5] AS y")
    assert rows == [{"a": 1, "a_1": 2, "x": None, "y": [None, 0.5]}]
    wide = opgrpo("sql", "--store", finished[0], "SELECT repeat('x', 500) AS long").stdout
    assert "x" * 500 in wide


def test_a_prompt_in_two_files_is_one_prompt(finished: Finished, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    before = opgrpo_json("sql", "--store", store, "SELECT count(*) AS n FROM trajectories JOIN prompts USING (prompt_id)")
    Store.open(str(store)).add_prompts(
        [{"text": row["text"], "metadata": json.loads(row["metadata"])} for row in prompts_of(store)[::-1]], "train"
    )
    assert len(prompts_of(store)) == 512
    after = opgrpo_json("sql", "--store", store, "SELECT count(*) AS n FROM trajectories JOIN prompts USING (prompt_id)")
    assert before == after == [{"n": 16}]


def prompts_of(store: Path) -> list[dict[str, str]]:
    """The view `prompts`."""
    rows: list[dict[str, str]] = opgrpo_json("sql", "--store", store, "SELECT text, metadata FROM prompts")
    return rows


def test_init_can_be_tried(config: Path, tmp_path: Path, finished: Finished) -> None:
    told = opgrpo_json("init", config, "--store", tmp_path / "store", "--dry-run")
    assert told["run_id"] == finished[1]["run_id"]
    assert not (tmp_path / "store").exists()


def test_one_sample_has_no_known_error(finished: Finished, config: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    outcome = opgrpo_json("eval", config, "--store", store, "--set", "eval.samples=1")
    assert (outcome["detail"]["samples"], outcome["detail"]["standard_error"]) == (1, None)


def test_a_run_goes_on_over_imported_trajectories(finished: Finished, config: Path, tmp_path: Path) -> None:
    """What an import brought is not drawn again, under whatever shard's name it lies; what it lacks is."""
    for name, condition, drawn in (("all", "true", 0), ("some", "member_index < 3", 2)):
        tars, store = tmp_path / f"{name}-tars", tmp_path / f"{name}-store"
        opgrpo("export", "--store", finished[0], "--as", "webdataset", "--to", tars, "--where", condition)
        opgrpo("import", tars, "--store", store)
        opgrpo("init", config, "--store", store)
        assert opgrpo_json("rollout", config, "--store", store)["detail"]["trajectories"] == drawn
        result = opgrpo_json("run", config, "--store", store)
        rows = opgrpo_json(
            "sql", "--store", store, "SELECT count(*) AS n, count(DISTINCT trajectory_id) AS ids FROM trajectories"
        )
        assert rows == [{"n": 16, "ids": 16}]
        assert opgrpo("verify", "--store", store, "--deep").returncode == 0
        if name == "all":
            assert result["policy_id"] == finished[1]["policy_id"]
