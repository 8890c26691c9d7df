"""The golden curve: what three iterations on the embedded world come to.

`python -m tests.integration.golden_curve` writes it anew. Do so only when the numbers are meant to change, and say why in
the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from opgrpo_data.catalog import Catalog
from pipelines.config import build_config
from pipelines.evaluation import evaluate
from pipelines.experiment import Experiment
from pipelines.loop import STAGES
from pipelines.progress import Progress

GOLDEN = Path(__file__).with_name("golden_curve.json")
ITERATIONS = 3
CONFIG: dict[str, Any] = {
    "name": "golden",
    "seed": 7,
    "iterations": ITERATIONS,
    "prompts": {"limit": 8},  # all of them in each iteration: from the second on, every group has a continuation
    "train": {"lr": 1e-4},
    "replay": {"reuse_iterations": 1},
    "eval": {"samples": 128},
}
# Sums of many float32 operations: the last digits differ between CPUs.
PER_ITERATION = """
SELECT u.iteration, u.role, count(*) AS rows, avg(u.reward) AS reward, avg(u.importance_weight) AS weight, avg(u.loss) AS loss,
       avg(u.grad_norm) AS grad_norm, avg(list_sum(u.path_variance)) AS path_variance
FROM updates u GROUP BY ALL ORDER BY ALL
"""


def curve(folder: Path) -> dict[str, Any]:
    """Run it: per iteration and role what was trained on, and the held-out reward before and after."""
    torch.set_num_threads(1)
    experiment = Experiment.init(str(folder), build_config(CONFIG, "golden"), Progress(quiet=True))
    for iteration in range(ITERATIONS):
        for stage in STAGES:
            stage(experiment, iteration)
    held_out = [evaluate(experiment, iteration).detail["mean"] for iteration in (0, ITERATIONS)]
    return {"updates": Catalog(experiment.store).query(PER_ITERATION).to_pylist(), "held_out": held_out}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store:
        GOLDEN.write_text(json.dumps(curve(Path(store)), indent=1) + "\n")
    print(GOLDEN.read_text())
