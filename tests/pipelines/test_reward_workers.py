"""Worker processes: the same values as in this process, one build each, and nothing lost when one dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import ConfigError
from pipelines.experiment import Experiment
from pipelines.reward_workers import Batch, Judges
from pipelines.rewards.base import build_reward
from pipelines.score import score
from pipelines.settings import RewardConfig
from tests.pipelines.bad_rewards import brightness, digest
from tests.pipelines.helpers import forked, pictures_of, rows_of, small

ROOT = Path(__file__).parents[2]
TRACED = "tests.pipelines.plain_rewards:traced"


def working(rolled: Path, folder: Path, workers: int = 2, **options: Any) -> Experiment:
    """Eight trajectories in two shards, not yet scored; batches of two, traces in `folder/traces`."""
    (folder / "traces").mkdir(exist_ok=True)
    options = {"folder": str(folder / "traces"), **options}
    return forked(rolled, folder, reward={"name": TRACED, "options": options, "workers": workers, "batch_size": 2})


def traces(folder: Path, prefix: str) -> list[str]:
    return sorted(path.name for path in (folder / "traces").iterdir() if path.name.startswith(prefix))


def shard_of(experiment: Experiment, number: int) -> set[str]:
    """Ids of the trajectories of one shard."""
    path = experiment.store.files("trajectories")[number]
    return set(experiment.store.read_tables("trajectories", [path])["trajectory_id"].to_pylist())


def test_workers_give_the_same_rows_as_this_process(rolled: Path, tmp_path: Path) -> None:
    written = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        experiment = working(rolled, folder, workers)
        outcome = score(experiment, 0)
        assert (outcome.done, outcome.skipped, outcome.detail["failed"]) == (8, 0, 0)
        assert outcome.detail["samples_per_second"] > 0
        written.append({path: experiment.store.directory.read(path) for path in experiment.store.files("rewards")})
    assert written[0] == written[1]
    assert len(written[0]) == 2
    assert len(traces(tmp_path / "0", "built")) == 1
    builders = {name.split("-")[1] for name in traces(tmp_path / "2", "batch")}
    assert 1 <= len(builders) <= 2
    assert len(traces(tmp_path / "2", "built")) == len(builders) + 1  # this process asks for name and version
    assert [name.split("-")[3] for name in traces(tmp_path / "2", "batch")] == ["2"] * 4


def test_a_sample_that_fails_in_a_worker_is_an_error_row(rolled: Path, tmp_path: Path) -> None:
    pictures = pictures_of(forked(rolled, tmp_path / "look"))
    bad = sorted(pictures)[3]
    experiment = working(rolled, tmp_path, digest=digest(pictures[bad]), mood="raises")
    assert score(experiment).detail["failed"] == 1
    rows = {row["trajectory_id"]: row for row in rows_of(experiment, "rewards")}
    assert rows.pop(bad)["error"] == "RuntimeError: cannot look at it"
    assert {name: row["value"] for name, row in rows.items()} == {
        name: brightness(picture) for name, picture in pictures.items() if name != bad
    }


def test_a_dead_worker_is_a_clear_error_and_costs_no_other_shard(rolled: Path, tmp_path: Path) -> None:
    """The sample that kills lies in the second shard: the first stays scored, and a healthy reward finishes the rest."""
    pictures = pictures_of(forked(rolled, tmp_path / "look"))
    experiment = working(rolled, tmp_path, workers=1, version="1")
    first, second = shard_of(experiment, 0), shard_of(experiment, 1)
    deadly = digest(pictures[sorted(second)[-1]])
    options = {"folder": str(tmp_path / "traces")}
    dying = {"name": TRACED, "options": {**options, "digest": deadly, "mood": "dies"}, "workers": 1, "batch_size": 4}
    deadlier = forked(tmp_path / "store", tmp_path / "dying", reward=dying)
    with pytest.raises(ValueError, match=r"a worker of reward traced died .* are kept. Run `opgrpo score` again"):
        score(deadlier)
    assert {row["trajectory_id"] for row in rows_of(deadlier, "rewards")} == first
    healthy = forked(tmp_path / "dying" / "store", tmp_path / "healthy", reward={"name": TRACED, "options": options})
    assert (score(healthy).done, score(healthy).skipped) == (4, 8)
    assert {row["trajectory_id"] for row in rows_of(healthy, "rewards")} == first | second


def test_a_reward_that_cannot_be_built_in_a_worker_says_so(rolled: Path, tmp_path: Path) -> None:
    experiment = working(rolled, tmp_path, mood=f"only {os.getpid()}")
    with pytest.raises(ValueError, match="this reward cannot be built here"):
        score(experiment)


def test_a_reward_that_changes_on_the_way_is_noticed(rolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is edited after this process built it: a worker would judge by other rules under the old version."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "changing.py"
    file.write_text("def half(media, prompts, metadata):\n    return [0.5 for _ in media]\n")
    experiment = forked(rolled, tmp_path, reward={"name": "changing:half", "workers": 1})
    experiment.reward(experiment.config.reward)
    file.write_text("def half(media, prompts, metadata):\n    return [0.25 for _ in media]\n")
    with pytest.raises(ValueError, match=r"reward changing:half changed while it was scoring, from .*'half'.*: score again"):
        score(experiment)
    assert rows_of(experiment, "rewards") == []


def test_parts_of_a_composite_go_to_workers(rolled: Path, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    parts = [
        {"name": TRACED, "weight": 1, "options": {"folder": str(tmp_path / "traces")}},
        {"name": "tests.pipelines.plain_rewards:warmth", "weight": 2},
    ]
    reward = {"name": "composite", "options": {"parts": parts}, "workers": 2, "batch_size": 4}
    experiment = forked(rolled, tmp_path, reward=reward)
    assert score(experiment).done == 8
    found: dict[str, dict[str, float]] = {}
    for row in rows_of(experiment, "rewards"):
        found.setdefault(row["reward"], {})[row["trajectory_id"]] = row["value"]
    pictures = pictures_of(experiment)
    assert found["traced"] == {name: brightness(picture) for name, picture in pictures.items()}
    assert found["composite"] == {name: found["traced"][name] + 2 * found["warmth"][name] for name in pictures}


def test_no_more_batches_wait_than_memory_is_meant_for(tmp_path: Path) -> None:
    config = RewardConfig(name=TRACED, options={"folder": str(tmp_path)}, workers=1)
    sample = np.zeros((2, 2, 3), np.uint8)
    with Judges(build_reward(TRACED, config.options), config) as judges:
        futures = [judges.submit(0, Batch([sample], [""], [{}])) for _ in range(6)]
        assert len(judges._pending) <= 2
        assert sum(not future.done() for future in futures) <= 2
        assert [future.result()[0].value for future in futures] == [0.0] * 6


SCORER = """
import sys, time
import numpy as np
from pipelines.reward_workers import Batch, Judges
from pipelines.rewards.base import build_reward
from pipelines.settings import RewardConfig

if __name__ == "__main__":
    config = RewardConfig(name=%r, options={"folder": sys.argv[1]}, workers=1)
    with Judges(build_reward(config.name, config.options), config) as judges:
        judges.submit(0, Batch([np.zeros((2, 2, 3), np.uint8)], [""], [{}])).result()
        print("scored", flush=True)
        time.sleep(60)
"""


def test_workers_do_not_outlive_a_killed_scorer(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    script = tmp_path / "scorer.py"
    script.write_text(SCORER % TRACED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "traces")]
    scorer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert scorer.stdout is not None
    assert scorer.stdout.readline() == "scored\n"
    (worker,) = {int(name.split("-")[1]) for name in traces(tmp_path, "batch")} - {scorer.pid}
    scorer.kill()
    scorer.communicate()
    deadline = time.monotonic() + 10
    while alive(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has waited for (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_are_no_part_of_what_a_run_is() -> None:
    assert small(reward={"workers": 4}).run_id == small().run_id
    assert small(reward={"workers": 4}).model_dump(mode="json") == small().model_dump(mode="json")


def test_evaluation_has_no_workers() -> None:
    with pytest.raises(ConfigError, match=r"evaluation scores in its own process: leave eval\.reward\.workers at 0"):
        small(eval={"reward": {"workers": 1}})
