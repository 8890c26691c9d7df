"""One run of the benchmark: the stages in turn, with their cost, and the held-out evaluation every few iterations."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.steps_to_target.arms import ARMS, BASE, Settings, merged
from benchmarks.steps_to_target.tasks import ROOT, TASKS, search_prompts
from opgrpo_data import ids
from opgrpo_data.catalog import Catalog
from pipelines.config import RunConfig, build_config
from pipelines.evaluation import evaluate, evaluation_path
from pipelines.experiment import Experiment
from pipelines.loop import STAGES
from pipelines.progress import Progress

BACKWARD = 2
"""What a backward pass costs, in forward passes."""

# Model evaluations per iteration, in forward passes of one latent. A continuation costs a pass per step like a fresh member:
# its prefix is judged, its tail drawn. Judging a reused member costs a pass per step, training a pair one and a backward pass.
EVALUATIONS = """
SELECT iteration, sum(passes) AS passes FROM (
    SELECT iteration, num_steps AS passes FROM trajectories
    UNION ALL SELECT iteration, len(path_variance) FROM densities
    UNION ALL SELECT iteration, {per_row} FROM updates
) GROUP BY iteration ORDER BY iteration
"""


@dataclass(frozen=True)
class Spec:
    """One run. phase: search, main, ablation, lever or map. points: iterations that are evaluated. setting: which cell of the
    map, else empty."""

    task: str
    arm: str
    phase: str
    seed: int
    lr: float
    iterations: int
    points: tuple[int, ...]
    samples: int
    setting: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, float]:
        """What tells this run from every other in the results."""
        return (self.task, self.arm, self.phase, self.setting, self.seed, self.lr)


def settings_of(spec: Spec, extra: Settings) -> dict[str, Any]:
    """All settings of a run, paths relative to the repository. extra: settings of a cell of the map."""
    own: dict[str, Any] = {
        "name": f"{spec.phase}-{spec.task}-{spec.arm}".replace("_", "-"),
        "seed": spec.seed,
        "iterations": spec.iterations,
        "train": {"lr": spec.lr},
        "eval": {"samples": spec.samples},
    }
    return merged(BASE, TASKS[spec.task].settings, ARMS[spec.arm].settings, extra, own)


def definition(spec: Spec, extra: Settings) -> str:
    """Hash of all that defines a run: results of an earlier definition do not count."""
    return f"{ids.derived_seed(ids.canonical_json([settings_of(spec, extra), spec.points])):016x}"


def config_of(spec: Spec, extra: Settings, folder: Path) -> RunConfig:
    """The run's configuration, with paths that lead somewhere from any folder."""
    found = settings_of(spec, extra)
    if spec.phase == "search":
        found["prompts"] = {"source": str(search_prompts(TASKS[spec.task], folder))}
    elif found["prompts"]["source"] != "embedded":
        found["prompts"]["source"] = str(ROOT / found["prompts"]["source"])
    if "policy" in found:
        found["policy"]["model"] = str(ROOT / found["policy"]["model"])
    return build_config(found, spec.arm)


def run(spec: Spec, extra: Settings, folder: Path) -> list[dict[str, Any]]:
    """All evaluations of one run as rows of the results; its store is made in `folder` and removed."""
    torch.set_num_threads(1)
    url = folder / "-".join(str(part) for part in spec.key if part != "")
    shutil.rmtree(url, ignore_errors=True)
    experiment = Experiment.init(str(url), config_of(spec, extra, folder), Progress(quiet=True))
    spent: dict[str, float] = defaultdict(float)
    points = []
    for iteration in range(spec.iterations + 1):
        if iteration in spec.points:
            costs = {"cpu_seconds": sum(spent.values()), "rollout_seconds": spent["rollout"]}
            points.append({"iteration": iteration, **_quality(experiment, iteration, TASKS[spec.task].check), **costs})
        if iteration < spec.iterations:
            for stage in STAGES:
                began = time.process_time()
                stage(experiment, iteration)
                spent[stage.__name__] += time.process_time() - began
    evaluations = _model_evaluations(experiment)
    rows = [_row(spec, experiment, point, evaluations) | {"definition": definition(spec, extra)} for point in points]
    shutil.rmtree(url)
    return rows


def _quality(experiment: Experiment, iteration: int, check: str) -> dict[str, Any]:
    """Held-out reward with its standard error, and the mean of the check that is never trained on."""
    evaluate(experiment, iteration)
    table = experiment.store.read_tables("evals", [evaluation_path(experiment, iteration)])
    values = table["value"].to_numpy()
    return {
        "reward": float(values.mean()),
        "standard_error": standard_error(values, np.array(table["prompt_id"].to_pylist())),
        "check": float(np.mean([float(json.loads(detail)[check]) for detail in table["detail"].to_pylist()])),
        "samples": len(values),
    }


def standard_error(values: NDArray[np.float64], strata: NDArray[Any]) -> float:
    """Of the mean over fixed, equally drawn strata (prompts): sqrt(sum of n_j var_j) / n, var_j with ddof 1.

    A prompt with one sample has no variance of its own: then the plain standard error, which is larger, is returned.
    """
    groups = [values[strata == stratum] for stratum in np.unique(strata)]
    if min(len(group) for group in groups) < 2:
        return float(values.std(ddof=1) / np.sqrt(len(values)))
    return float(np.sqrt(sum(len(group) * group.var(ddof=1) for group in groups)) / len(values))


def _row(spec: Spec, experiment: Experiment, point: dict[str, Any], evaluations: dict[int, int]) -> dict[str, Any]:
    done = point["iteration"]
    rollout_config = experiment.config.rollout
    return {
        **{name: value for name, value in asdict(spec).items() if name != "points"},
        **point,
        "run_id": experiment.run_id,
        "generated": done * rollout_config.prompts_per_iteration * rollout_config.group_size,
        "model_evaluations": sum(passes for iteration, passes in evaluations.items() if iteration < done),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread",
    }


def _model_evaluations(experiment: Experiment) -> dict[int, int]:
    forward = experiment.config.train.objective == "forward"
    passes = 1 + BACKWARD  # the forward objective asks the old policy, too
    per_row = f"{experiment.config.train.forward.draws * (passes + 1)}" if forward else f"len(ratio) * {passes}"
    table = Catalog(experiment.store).query(EVALUATIONS.format(per_row=per_row))
    return {row["iteration"]: int(row["passes"]) for row in table.to_pylist()}
