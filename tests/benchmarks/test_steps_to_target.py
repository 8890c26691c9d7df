"""The benchmark's own arithmetic, against closed forms; one real run of it; and its committed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from benchmarks.steps_to_target import analysis, conditioning, grid, preference, runner
from benchmarks.steps_to_target.analysis import ArmCurves, cost_to, ratios
from benchmarks.steps_to_target.arms import ARMS, BASE, merged
from benchmarks.steps_to_target.runner import Spec, standard_error
from benchmarks.steps_to_target.tasks import TASKS, search_prompts
from pipelines.config import build_config
from pipelines.embedded import scenes
from pipelines.prompts import load_prompts, thinned
from tests.integration.harness import Running


def arm(*rewards: list[float]) -> ArmCurves:
    """Seeds of an arm that is evaluated every 10 iterations; every cost is the iteration."""
    reward = np.array(rewards)
    at = np.broadcast_to(10.0 * np.arange(reward.shape[1]), reward.shape)
    return ArmCurves(reward, reward, dict.fromkeys(analysis.COSTS, at))


def test_cost_is_linear_between_evaluations() -> None:
    reward, cost = np.array([0.0, 0.5, 0.4, 1.0]), np.array([0.0, 10.0, 20.0, 40.0])
    assert cost_to(0.25, reward, cost) == 5.0
    assert cost_to(0.5, reward, cost) == 10.0
    assert cost_to(0.7, reward, cost) == pytest.approx(30.0)
    assert cost_to(0.0, reward, cost) == 0.0
    assert cost_to(1.1, reward, cost) == math.inf


def test_ratio_to_the_baselines_final_level() -> None:
    """The baseline ends at 0.8 (mean of its last two), which it reached at 40; the arm reaches 0.8 at 10."""
    baseline = arm([0.0, 0.2, 0.4, 0.6, 0.8, 0.8], [0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    fast = arm([0.0, 0.8, 0.8, 0.8, 0.8, 0.8])
    alone = {"ratio": 0.25, "seeds": 1, "low": None, "high": None}  # one seed has no interval
    assert ratios(fast, baseline, "iterations", 50) == alone
    three = arm(*[[0.0, 0.8, 0.8, 0.8, 0.8, 0.8]] * 3), arm(*[[0.0, 0.2, 0.4, 0.6, 0.8, 0.8]] * 3)
    assert ratios(*three, "iterations", 50) == {"ratio": 0.25, "seeds": 3, "low": 0.25, "high": 0.25}
    assert ratios(fast, baseline, "iterations", 50, level=0.4)["ratio"] == 0.25
    never = arm([0.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert ratios(never, baseline, "iterations", 50)["ratio"] is None
    flat = arm([0.5, 0.5, 0.4, 0.4, 0.4, 0.4])
    assert ratios(fast, flat, "iterations", 50)["ratio"] is None  # it sets no target


def test_bootstrap_interval_holds_the_spread_of_seeds() -> None:
    baseline = arm(*[[0.0, 0.5, 1.0, 1.0]] * 3)
    spread = arm([0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    found = ratios(spread, baseline, "iterations", 400)
    assert (found["low"], found["high"]) == (0.5, 1.5)


def test_the_final_level_is_the_mean_of_the_last_two_evaluations() -> None:
    rising = arm([0.0, 0.1, 0.2], [0.0, 0.1, 0.2])
    assert analysis.final_level(rising) == pytest.approx(0.15)
    assert ratios(arm([0.0, 0.15, 0.2]), rising, "iterations", 1)["ratio"] == pytest.approx(10 / 15, abs=1e-4)


def test_stratified_standard_error() -> None:
    """Two prompts, three samples each: sqrt(3 * 1/3 + 3 * 0) / 6."""
    values, strata = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), np.array(["a", "a", "a", "b", "b", "b"])
    assert standard_error(values, strata) == pytest.approx(math.sqrt(3 * (1 / 3)) / 6)
    single = standard_error(np.array([0.0, 1.0]), np.array(["a", "b"]))
    assert single == pytest.approx(np.std([0, 1], ddof=1) / math.sqrt(2))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_search_prompts_touch_neither_training_nor_held_out_prompts(task: Any, tmp_path: Path) -> None:
    everything = load_prompts(task.source)
    found = load_prompts(str(search_prompts(task, tmp_path)))
    searched = {p.prompt_id for prompts in found.values() for p in prompts}
    trained = {p.prompt_id for p in thinned(everything["train"], task.settings["prompts"]["limit"])}
    assert len(found["train"]) == 96
    assert len(found["held_out"]) == 64
    assert len(searched) == 160
    assert not searched & (trained | {p.prompt_id for p in everything["held_out"]})


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("task", TASKS)
def test_every_arm_is_a_valid_configuration(name: str, task: str) -> None:
    own = {"name": "arm", "iterations": 1, "train": {"lr": 1e-4}}
    config = build_config(merged(BASE, TASKS[task].settings, ARMS[name].settings, own), name)
    assert config.rollout.num_steps == 10
    if name != "fresh_4x":
        assert config.rollout.prompts_per_iteration * config.rollout.group_size == 64


def test_merged_goes_deep_and_leaves_its_layers_alone() -> None:
    low, high = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "e": 5}
    assert merged(low, high) == {"a": {"b": 4, "c": 2}, "d": 3, "e": 5}
    assert low == {"a": {"b": 1, "c": 2}, "d": 3}


def picture(rows: slice, columns: slice) -> NDArray[np.uint8]:
    """The ground with a white rectangle."""
    image = np.tile(np.array(scenes.GROUND, np.uint8), (24, 24, 1))
    image[rows, columns] = 255
    return image


def test_balance_of_rectangles() -> None:
    """A centred rectangle is balanced; one whose centre lies d pixels off scores exp(-(d / 6)^2)."""
    assert preference.balance(picture(slice(8, 16), slice(8, 16))) == pytest.approx(1.0)
    assert preference.balance(picture(slice(8, 16), slice(11, 19))) == pytest.approx(math.exp(-((3 / 6) ** 2)))
    assert preference.balance(picture(slice(0, 0), slice(0, 0))) == pytest.approx(math.exp(-8))


def test_one_run_of_the_benchmark(tmp_path: Path) -> None:
    spec = Spec("compositional", "op_grpo", "main", 0, 1e-4, 2, (0, 1, 2), 64)
    rows = runner.run(spec, {"prompts": {"limit": 8}}, tmp_path)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert [row["generated"] for row in rows] == [0, 64, 128]
    drawn, trained = 64 * 10, rows[1]["model_evaluations"] - 64 * 10
    assert drawn > 0
    assert trained % (5 * 3) == 0  # five denoising steps of some members, a forward and a backward pass each
    assert 0 < trained <= 64 * 5 * 3
    assert rows[2]["cpu_seconds"] > rows[1]["cpu_seconds"] > rows[1]["rollout_seconds"] > 0
    assert not any(tmp_path.iterdir())  # its store is gone


def test_runs_are_added_once_and_failures_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "runs.parquet"
    good = Spec("compositional", "flow_grpo", "main", 0, 1e-4, 1, (0, 1), 16)
    bad = Spec("compositional", "flow_grpo", "main", 1, -1.0, 1, (0, 1), 16)
    with pytest.raises(RuntimeError, match="1 of 2 runs failed, the others are kept"):
        grid.execute([(good, {}), (bad, {})], tmp_path / "work", 1, path)
    assert grid.load(path).height == 2
    grid.execute([(good, {})], tmp_path / "work", 1, path)
    assert grid.load(path).height == 2
    slower = Spec("compositional", "flow_grpo", "main", 0, 5e-5, 1, (0, 1), 16)  # the same run with another learning rate
    grid.execute([(slower, {})], tmp_path / "work", 1, path)
    assert grid.load(path)["lr"].to_list() == [5e-5, 5e-5]
    assert "train.lr" in capsys.readouterr().out


# -- committed results -----------------------------------------------------------------------------------------------------


def test_summary_prints_one_object_from_the_committed_results() -> None:
    done = Running("--summary", "--samples=20", "--json", module="benchmarks.steps_to_target").wait()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "compositional" in told
    for arms in told.values():
        assert {arms["flow_grpo"]["iterations"][name] for name in ("ratio", "low", "high")} == {1.0}
        for costs in arms.values():
            assert {"iterations", "generated", "wall"} <= set(costs)


def test_committed_results_are_of_the_runs_as_they_are_defined_now() -> None:
    """A change of an arm makes its results void: they would have to be measured again."""
    results = grid.load()
    wanted = {
        runner.definition(spec, extra)
        for phase in grid.PHASES
        for task in TASKS
        if not results.filter(phase="search", task=task).is_empty()
        for spec, extra in grid.specs(phase, task, results, max(grid.SEEDS.values()))
    }
    assert set(results["definition"]) <= wanted


def test_committed_evaluations_are_as_precise_as_the_page_says() -> None:
    main = grid.load().filter(phase="main")
    assert main["standard_error"].max() <= 0.0105  # type: ignore[operator]


def test_committed_law_holds_within_ten_percent() -> None:
    found = pl.read_parquet(conditioning.RESULTS)
    assert set(found["lag"]) == {1, 5, 20}
    assert found["standardised_variance"].is_between(0.9, 1.1).all()
    assert found["standardised_mean"].abs().max() < 0.1  # type: ignore[operator]
