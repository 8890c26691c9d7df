"""Passes: a batch cut into parts has the gradient of the whole, and so has one whose activations are computed again."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.train import train
from tests.pipelines.helpers import created, merged, rows_of, small

EMBEDDED = {"family": "sd3", "model": "embedded", "options": {"device": "cpu"}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clipped": {"train": {"kl_beta": 0.05, "clip_low": 0.2, "clip_high": 0.2}},
    "ratio norm": {"train": {"ratio_norm": True, "step_weight": "inverse_step", "clip_low": 0.2, "clip_high": 0.2}},
    "forward": {"train": {"objective": "forward", "forward": {"draws": 3}}},
}


def _trained(folder: Path, objective: str, **changes: Any) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """Gradient of the last optimizer step of iteration 2, whose groups hold continuations, and its rows of `updates`.

    The first iterations are trained without passes, whatever `changes` says: all runs come to iteration 2 alike.
    """
    settings = merged({"policy": EMBEDDED, "prompts": {"limit": 2}}, OBJECTIVES[objective])
    experiment = created(folder, small(**settings))
    for iteration in (0, 1):
        for stage in (rollout, score, select, train):
            if (iteration, stage) != (1, train):
                stage(experiment, iteration)
    own = dict(changes.get("train", {}))
    experiment.config = experiment.config.model_copy(update={"train": experiment.config.train.model_copy(update=own)})
    learner = experiment.learner(1)
    before = {p: {k: v.clone() for k, v in learner.optimizer.state[p].items()} for p in learner.parameters.values()}
    if changes.get("checkpointing"):
        experiment.policy.trainable.enable_gradient_checkpointing()  # type: ignore[operator]
    train(experiment, 1)
    beta = learner.config.betas[0]
    moments = [(learner.optimizer.state[p]["exp_avg"], before[p]["exp_avg"]) for p in learner.parameters.values()]
    gradient = torch.cat([((now - beta * then) / (1 - beta)).flatten().double() for now, then in moments])
    return gradient, {row["trajectory_id"]: row for row in rows_of(experiment, "updates", 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same without passes, by objective."""
    return cache(lambda objective: _trained(tmp_path_factory.mktemp("whole"), objective))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pairs", [1, 7])
def test_passes_add_up(objective: str, pairs: int, whole: Any, tmp_path: Path) -> None:
    golden, rows = whole(objective)
    gradient, found = _trained(tmp_path, objective, train={"pairs_per_pass": pairs})
    assert float(golden.norm()) > 0
    assert float((gradient - golden).norm() / golden.norm()) <= 2e-5
    assert "continuation" in {row["role"] for row in rows.values()}
    for name, row in rows.items():
        for column in ("loss", "ratio", "kl"):
            assert found[name][column] == pytest.approx(row[column], rel=1e-3, abs=1e-7)
        assert found[name]["clipped"] == row["clipped"]


def test_checkpointing_is_the_same_gradient(whole: Any, tmp_path: Path) -> None:
    golden, _ = whole("clipped")
    gradient, _ = _trained(tmp_path, "clipped", checkpointing=True)
    assert float((gradient - golden).norm() / golden.norm()) <= 1e-6
