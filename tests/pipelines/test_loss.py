"""Parts of a batch: however few pairs go through the model at a time, gradient and report are those of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opgrpo_data.store import iteration_folder
from opgrpo_data.stream import stream
from pipelines.experiment import Experiment
from pipelines.learner import Learner
from pipelines.policies.family import Condition
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from pipelines.train import OBJECTIVES, train
from tests.pipelines.helpers import each, forked, perturbed, rows_of, small

SIZES = (1, 3, 7, 1000)
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "clipped, by inverse step": {"step_weight": "inverse_step", "ratio_reduction": "sum", "clip_low": 0.5, "clip_high": 0.5},
    "clipped, with KL and RatioNorm": {"kl_beta": 0.3, "ratio_norm": True, "step_weight": [1.0, 3.0, 2.0, 1.0, 1.0]},
    "forward": {"objective": "forward", "forward": {"draws": 2}},
}
Found = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]


class Double(PipelinePolicy):
    """The policy in float64, but for the velocities it gives."""

    def encode(self, prompts: Any) -> Condition:
        """The same conditions, rounded to nothing."""
        return {name: tensor.double() for name, tensor in super().encode(prompts).items()}


def _double() -> PipelinePolicy:
    policy = load("embedded", device="cpu")
    policy.trainable.double()
    whole = Double(**{name: value for name, value in vars(policy).items() if not name.startswith("_")})
    whole.dtype = torch.float64
    return whole


def _backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def _found(experiment: Experiment, learner: Learner) -> Found:
    """Of iteration 2: the gradient of the model's own parameters in their own dtype, and what `updates` is told."""
    path = f"{iteration_folder('plans', experiment.run_id, 2)}.parquet"
    plan = experiment.store.read_tables("plans", [path])
    name = experiment.config.train.objective
    told: dict[str, dict[str, Any]] = {}
    for batch in stream(experiment.store.directory, plan):
        # The forward objective knows one latent of a trajectory; which one does not matter here.
        latents = [states[-1:] for states in batch.latents] if name == "forward" else batch.latents
        told |= OBJECTIVES[name](experiment, learner, batch.rows, latents, _backward)
    gradient = {name: p.grad for name, p in learner.model.items() if p.grad is not None}
    for parameter in learner.model.values():
        parameter.grad = None
    return gradient, told


def _move(learner: Learner, policy: PipelinePolicy) -> None:
    """Leave the old policy, so that ratios and divergences are not trivial."""
    learner.remember_old()
    with torch.no_grad():
        for name, tensor in perturbed(policy, 1e-3, 0).items():
            learner.model[name].copy_(tensor)


@pytest.mark.parametrize(
    ("settings", "precision"), [*((name, "float64") for name in SETTINGS), ("clipped", "float32"), ("forward", "float32")]
)
def test_parts_add_up_to_the_batch(replayed: Path, tmp_path: Path, settings: str, precision: str) -> None:
    """Iteration 2, which has continuations. In float64 nothing but the order of additions is left."""
    experiment = forked(replayed, tmp_path)
    policy = experiment.policy if precision == "float32" else _double()
    assert isinstance(policy, PipelinePolicy)
    policy.prepare(experiment.store.directory, [])
    experiment.policy = policy
    learner = Learner(policy, experiment.config.train)
    _move(learner, policy)
    found: dict[int | None, Found] = {}
    for size in (None, *SIZES):
        experiment.config = small(train={**SETTINGS[settings], "pairs_per_pass": size})
        found[size] = _found(experiment, learner)
    whole, rows = found[None]
    assert {tensor.dtype for tensor in whole.values()} == {getattr(torch, precision)}
    assert {row["role"] for row in rows_of(experiment, "plans", 2)} == {"fresh", "continuation"}
    _check_that_something_happened(rows, settings)
    for size in SIZES:
        gradient, told = found[size]
        assert _difference(gradient, whole) <= (1e-5 if precision == "float32" else 1e-12)
        assert list(told) == list(rows)
        for name, row in rows.items():
            for column, value in row.items():
                assert told[name][column] == pytest.approx(value, rel=1e-3, abs=1e-5)


def _check_that_something_happened(rows: Mapping[str, Mapping[str, Any]], settings: str) -> None:
    assert len({row["loss"] for row in rows.values()}) > 4
    if settings == "forward":
        return
    ratios = [ratio for row in rows.values() for ratio in row["ratio"]]
    assert len(ratios) == 3 * len(rows)
    assert max(abs(ratio - 1) for ratio in ratios) > 1e-4
    assert any(kl > 0 for row in rows.values() for kl in row["kl"]) == ("KL" in settings)


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Relative to the norm of all of it."""
    pairs = [(a.double(), b.double()) for _, a, b in each(ours, theirs)]
    norms = [sum(float(x.square().sum()) for x in xs) ** 0.5 for xs in ([a - b for a, b in pairs], [b for _, b in pairs])]
    return float(norms[0] / norms[1])


def test_no_pass_is_larger_than_it_may_be(replayed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 pairs: seven at a time, the last three alone. The forward objective takes whole rows, at least one."""
    passes: list[int] = []
    velocity = PipelinePolicy.velocity

    def counted(self: PipelinePolicy, latents: Tensor, *rest: Any, **more: Any) -> Tensor:
        passes.append(len(latents))
        return velocity(self, latents, *rest, **more)

    monkeypatch.setattr(PipelinePolicy, "velocity", counted)
    for settings, size, golden in (
        ("clipped", 7, [7, 7, 7, 3]),
        ("clipped", None, [24]),
        ("forward", 7, [6, 6, 6, 6, 4, 4]),  # each part twice: old and current
        ("forward", 1, [2] * 16),
    ):
        experiment = forked(replayed, tmp_path / f"{settings} {size}", train={**SETTINGS[settings], "pairs_per_pass": size})
        experiment.learner(2).remember_old()
        passes.clear()
        _found(experiment, experiment.learner(2))
        assert passes == golden


def test_a_whole_update_is_the_same_policy_nearly(replayed: Path, tmp_path: Path) -> None:
    """Through `train`: the same rows, ratios of exactly the same pairs, and weights that differ by rounding."""
    ends = []
    for size in (None, 5):
        experiment = forked(replayed, tmp_path / str(size), train={"pairs_per_pass": size, "lr": 1e-4})
        train(experiment, 2)
        rows = {row["trajectory_id"]: row for row in rows_of(experiment, "updates", 2)}
        ends.append((rows, {name: p.detach().clone() for name, p in experiment.learner(3).parameters.items()}))
    (rows, weights), (others, other_weights) = ends
    assert rows.keys() == others.keys()
    for name, row in rows.items():
        assert others[name]["ratio"] == pytest.approx(row["ratio"], abs=1e-6)
        assert others[name]["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert others[name]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    assert 0 < max(float((a - b).abs().max()) for _, a, b in each(weights, other_weights)) < 2e-4  # of a step of 1e-4


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_gives_the_same_gradient(
    replayed: Path, tmp_path: Path, lora: dict[str, int] | None, dtype: str
) -> None:
    """To the last bit: what is computed twice is computed alike."""
    gradients = []
    for checkpointing in (False, True):
        experiment = forked(replayed, tmp_path / str(checkpointing))
        policy = load("embedded", device="cpu", lora=lora, dtype=dtype, gradient_checkpointing=checkpointing)
        assert policy.trainable.is_gradient_checkpointing == checkpointing
        policy.prepare(experiment.store.directory, [])
        experiment.policy = policy
        gradients.append(_found(experiment, Learner(policy, experiment.config.train))[0])
    assert len(gradients[0]) > 20
    assert all(torch.equal(ours, theirs) for _, ours, theirs in each(*gradients))
