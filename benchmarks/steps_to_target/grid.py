"""Which runs the benchmark consists of, and their execution: what the results lack is run, in parallel, and added to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import polars as pl

from benchmarks.steps_to_target.arms import ABLATIONS, ARMS, LEVERS, MAIN, RATES, Arm, Settings
from benchmarks.steps_to_target.runner import Spec, definition, run
from benchmarks.steps_to_target.tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "runs.parquet"
PHASES = ("search", "main", "lever", "ablation", "map")
SEEDS: Mapping[str, int] = {"main": 5, "lever": 3, "ablation": 3, "map": 3}
SEARCH_POINTS = (20, 30)
MAP_ARMS = ("flow_grpo", "op_grpo", "forward_replay")
MAP_ITERATIONS = 40

# Cells of the map: what is varied, on the compositional task. An entry is replayed at the lag at which its prompt is revisited.
MAP: Mapping[str, Settings] = {
    "group of 4": {"rollout": {"group_size": 4, "prompts_per_iteration": 16}},
    "group of 16": {"rollout": {"group_size": 16, "prompts_per_iteration": 4}},
    "revisit after 2": {"prompts": {"limit": 16}},
    "revisit after 48": {"prompts": {"limit": 384}},
    "partial credit": {"reward": {"name": "scene_soft"}},
    "rare success": {"reward": {"name": "benchmarks.steps_to_target.preference:rare"}},
}


def load(path: Path = RESULTS) -> pl.DataFrame:
    """All results so far: a row per evaluation."""
    return pl.read_parquet(path) if path.exists() else pl.DataFrame()


def specs(phase: str, task: str, results: pl.DataFrame, seeds: int) -> Iterator[tuple[Spec, Settings]]:
    """The runs of one phase on one task, in the order in which they are worth having."""
    if phase == "search":
        for arm in MAIN:
            for rate in RATES:
                yield Spec(task, arm.name, phase, 0, rate, max(SEARCH_POINTS), SEARCH_POINTS, 1024), {}
        return
    if phase == "map":
        for setting, extra in MAP.items() if task == "compositional" else ():
            for seed in range(min(SEEDS[phase], seeds)):
                for name in MAP_ARMS:
                    rate = chosen_rate(results, task, ARMS[name])
                    yield Spec(task, name, phase, seed, rate, MAP_ITERATIONS, points(MAP_ITERATIONS), 1280, setting), extra
        return
    if phase != "main" and task != "compositional":
        return
    arms = {"main": MAIN, "lever": LEVERS, "ablation": ABLATIONS}[phase]
    for seed in range(min(SEEDS[phase], seeds)):
        for arm in arms:
            rate, last = chosen_rate(results, task, arm), min(arm.iterations, TASKS[task].iterations)
            yield Spec(task, arm.name, phase, seed, rate, last, points(last), TASKS[task].samples), {}


def points(iterations: int) -> tuple[int, ...]:
    """Iterations that are evaluated: every fifth up to 30, where curves are steep, then every tenth, and the last."""
    return (*(i for i in range(0, iterations, 5) if i <= 30 or i % 10 == 0), iterations)


def chosen_rate(results: pl.DataFrame, task: str, arm: Arm) -> float:
    """The learning rate that ends highest on the search prompts: mean reward of the last evaluations; of equals the lower."""
    found = results.filter(phase="search", task=task, arm=arm.like or arm.name).filter(pl.col("iteration").is_in(SEARCH_POINTS))
    ranked = found.group_by("lr").agg(pl.col("reward").mean()).sort("reward", "lr", descending=[True, False])
    if ranked.is_empty():
        raise ValueError(f"no learning rate of {arm.like or arm.name} on {task} has been searched: run the phase search first")
    return float(ranked["lr"][0])


def execute(wanted: Sequence[tuple[Spec, Settings]], folder: Path, workers: int, path: Path = RESULTS) -> None:
    """Run what the results at `path` lack. Each run is added when it is whole: stop at any time, and start again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(spec, extra) for spec, extra in wanted if not _done(load(path), spec, extra)]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: equal conditions, and the same numbers anywhere
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        futures = {pool.submit(run, spec, extra, folder): spec for spec, extra in missing}
        for number, future in enumerate(as_completed(futures), 1):
            if error := future.exception():
                print(f"[{number}/{len(missing)}] {futures[future]}: {type(error).__name__}: {error}", flush=True)
                continue
            rows = pl.DataFrame(future.result())
            kept = _without(load(path), futures[future])
            _replace(path, pl.concat([kept, rows], how="diagonal"))
            told = " ".join(f"{iteration}:{reward:.3f}" for iteration, reward in rows.select("iteration", "reward").iter_rows())
            print(f"[{number}/{len(missing)}] {futures[future]}: {told}", flush=True)
    if failed := [spec for future, spec in futures.items() if future.exception()]:
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed, the others are kept: first {failed[0]}")


def _done(results: pl.DataFrame, spec: Spec, extra: Settings) -> bool:
    """Whether the results hold this run, as the present settings define it."""
    return not results.is_empty() and definition(spec, extra) in results["definition"]


def _without(results: pl.DataFrame, spec: Spec) -> pl.DataFrame:
    """The results without an earlier definition of this run; the search has a run for each learning rate."""
    if results.is_empty():
        return results
    told = {"task": spec.task, "arm": spec.arm, "phase": spec.phase, "setting": spec.setting, "seed": spec.seed}
    same = pl.all_horizontal(*(pl.col(name) == value for name, value in told.items()))
    return results.filter(~(same & (pl.col("lr") == spec.lr) if spec.phase == "search" else same))


def _replace(path: Path, table: pl.DataFrame) -> None:
    """Write the table beside the old one, then take its place: a kill in between loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    table.write_parquet(beside)
    beside.replace(path)


def everything(tasks: Sequence[str], phases: Sequence[str], seeds: int, folder: Path, workers: int) -> None:
    """All phases of the tasks in turn; the search first, since the others take their learning rates from it."""
    for phase in PHASES:
        if phase in phases:
            for task in tasks:
                execute(list(specs(phase, task, load(), seeds)), folder, workers)
