"""Another reward for stored trajectories, against drawing them anew: an iteration of the embedded world, models loaded."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from statistics import median

from benchmarks.store.machine import Measure, measured
from pipelines.config import RunConfig, load_config
from pipelines.experiment import Experiment
from pipelines.policies.loading import quiet_libraries
from pipelines.progress import Progress
from pipelines.rescore import rescore
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.settings import RewardConfig

CONFIG = Path(__file__).parents[2] / "examples/quickstart.yaml"
REWARD = "sharpness"
QUICK = ("prompts.limit=2", "rollout.prompts_per_iteration=2", "rollout.group_size=4", "rollout.num_steps=4")


def measure(work: Path, quick: bool) -> dict[str, Measure]:
    """rescore_speedup: seconds of `rollout` and `score` of an iteration over those of `score --reward` of the same."""
    quiet_libraries()
    config = load_config(CONFIG, QUICK if quick else ())
    if not quick:
        _once(work / "store", config)  # loads what is loaded once
    drawn, scored = zip(*(_once(work / "store", config) for _ in range(1 if quick else 5)), strict=True)
    count = config.rollout.prompts_per_iteration * config.rollout.group_size
    told = (
        f"{count} trajectories of {config.rollout.num_steps} steps drawn and scored in {median(drawn):.2f} s, "
        f"scored again with `{REWARD}` in {median(scored) * 1e3:,.0f} ms"
    )
    ratios = [slow / fast for slow, fast in zip(drawn, scored, strict=True)]
    return {"rescore_speedup": measured(ratios, ">=", 10, "x the speed of drawing and scoring them again", told)}


def _once(store: Path, config: RunConfig) -> tuple[float, float]:
    """Seconds to draw and score an iteration of a new run, and to score it again with REWARD."""
    progress = Progress(quiet=True)
    experiment = Experiment.init(str(store), config, progress)
    experiment.learner(0)
    began = time.perf_counter()
    rollout(experiment, 0)
    score(experiment, 0)
    between = time.perf_counter()
    rescore(experiment.store, RewardConfig(name=REWARD), run=None, dry_run=False, progress=progress)
    end = time.perf_counter()
    shutil.rmtree(store)
    return between - began, end - between
