"""Steps to target: how much each arm needs to reach Flow-GRPO's final quality.

python -m benchmarks.steps_to_target                 run what the committed results lack (resumable), then print the summary
python -m benchmarks.steps_to_target --summary       tables from the committed results; --json: one object; --plots: draw
python -m benchmarks.steps_to_target --quick         one seed of two arms in a few minutes, results not kept
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.steps_to_target import analysis, grid, tables
from benchmarks.steps_to_target.arms import ARMS
from benchmarks.steps_to_target.runner import Spec
from benchmarks.steps_to_target.tasks import TASKS

QUICK_ARMS = ("flow_grpo", "forward_replay")
QUICK_ITERATIONS = 30
SAMPLES = 2000


def quick(workers: int, iterations: int) -> None:
    """One seed of two arms on the compositional task, at the learning rates of the committed search."""
    committed = grid.load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.parquet"
        rates = {name: grid.chosen_rate(committed, "compositional", ARMS[name]) for name in QUICK_ARMS}
        wanted = [
            Spec("compositional", name, "main", 0, rate, iterations, grid.points(iterations), 640)
            for name, rate in rates.items()
        ]
        grid.execute([(spec, {}) for spec in wanted], Path(folder), workers, path)
        print(json.dumps(analysis.summary(grid.load(path), samples=200)))


def main() -> None:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="report from the committed results, run nothing")
    parser.add_argument(
        "--json", action="store_true", help="print one object: {task: {arm: {iterations | generated | wall: ...}}}"
    )
    parser.add_argument("--quick", action="store_true", help="rerun one seed of two arms, in at most five minutes")
    parser.add_argument("--iterations", type=int, default=QUICK_ITERATIONS, help="of --quick")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the bootstrap that gives the intervals")
    parser.add_argument("--plots", type=Path, help="folder to draw pictures into")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--phases", nargs="+", default=list(grid.PHASES), choices=grid.PHASES)
    parser.add_argument("--seeds", type=int, default=max(grid.SEEDS.values()), help="at most so many seeds an arm")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    work = Path(tempfile.gettempdir()) / "steps_to_target"
    parser.add_argument("--work", type=Path, default=work, help="folder for the stores of runs under way")
    arguments = parser.parse_args()
    if (arguments.quick or arguments.summary) and grid.load().is_empty():
        parser.error(f"there are no results in {grid.RESULTS}: run the benchmark first, or take the committed file")
    if arguments.quick:
        quick(arguments.workers, arguments.iterations)
        return
    if not arguments.summary:
        grid.everything(arguments.tasks, arguments.phases, arguments.seeds, arguments.work, arguments.workers)
    results = grid.load()
    if arguments.json:
        print(json.dumps(analysis.summary(results, arguments.samples)))
    else:
        print(tables.report(results, arguments.samples))
    if arguments.plots:
        from benchmarks.steps_to_target import figures

        figures.draw_all(results, arguments.plots)


if __name__ == "__main__":
    main()
