"""Stage `train`: the loss of ALGORITHM section 4, evaluated here in NumPy from stored numbers, and its gradient.

G = 4 members, T = 5 steps of which the first three are trained, D = 72. The first iteration is on-policy: every ratio is 1
to 1e-6. To see other ratios, a test writes another `old_logprob` into the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from opgrpo_data.errors import StoreError
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents
from opgrpo_data.schema import PLANS, table_of
from opgrpo_data.store import iteration_folder
from pipelines import weights
from pipelines.experiment import Experiment
from pipelines.train import train
from pipelines.trajectories import to_tensor
from tests.pipelines.helpers import flipped, forked, reopened, rows_of

Rows = list[dict[str, Any]]
D = 72


def _replan(experiment: Experiment, change: Callable[[int, dict[str, Any]], dict[str, Any]], iteration: int = 0) -> Rows:
    """Replace the plan: `change` maps each row's position and columns to the columns that become others."""
    path = f"{iteration_folder('plans', experiment.run_id, iteration)}.parquet"
    rows = [{**row, **change(i, row)} for i, row in enumerate(experiment.store.read_tables("plans", [path]).to_pylist())]
    Path(experiment.store.directory.path(path)).unlink()
    experiment.store.publish_table(path, table_of(rows, PLANS))
    return rows


def _updates(experiment: Experiment, iteration: int = 0) -> dict[str, dict[str, Any]]:
    return {row["trajectory_id"]: row for row in rows_of(experiment, "updates", iteration)}


def _gradient(experiment: Experiment) -> dict[str, Tensor]:
    """The gradient of the one optimizer step that was taken, from Adam's first moment: exp_avg = (1 - beta1) g."""
    learner = experiment.learner(experiment.iteration)
    return {
        name: learner.optimizer.state[parameter]["exp_avg"] / (1 - learner.config.betas[0])
        for name, parameter in learner.parameters.items()
    }


def _flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten().double() for name in sorted(gradient)])


def _close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the gradient's norm."""
    a, b = _flat(ours), _flat(theirs)
    assert float(b.norm()) > 0
    assert float((a - b).norm() / b.norm()) <= tolerance


def _step_weights(experiment: Experiment) -> NDArray[np.float64]:
    std = np.array(rows_of(experiment, "trajectories")[0]["transition_std"][:3])
    return np.asarray(std / std.sum())


def _latents(experiment: Experiment, row: dict[str, Any]) -> Tensor:
    return to_tensor(read_latents(experiment.store.directory, LatentLocation.of(row), 0, 5), row["latent_dtype"])


def _velocities(experiment: Experiment, rows: Rows) -> NDArray[np.float64]:
    """Of the policy as it is, one forward pass a transition: (rows, 3, D)."""
    policy = experiment.policy
    found = []
    for row in rows:
        condition, latents = policy.encode([experiment.prompt_of[row["prompt_id"]].text]), _latents(experiment, row)
        with torch.no_grad():
            each = [policy.velocity(latents[k : k + 1], torch.tensor([row["sigmas"][k]]).double(), condition) for k in range(3)]
        found.append(torch.cat(each).flatten(1).double().numpy())
    return np.stack(found)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_weight", ["transition_std", "uniform"])
def test_on_policy_loss_is_minus_weight_times_advantage(planned: Path, tmp_path: Path, step_weight: str) -> None:
    experiment = forked(planned, tmp_path, train={"step_weight": step_weight})
    plan = _replan(experiment, lambda i, _: {"importance_weight": [1.0, 0.5, 2.0][i % 3]})
    train(experiment, 0)
    updates = _updates(experiment)
    assert len(updates) == 8
    for row in plan:
        update = updates[row["trajectory_id"]]
        assert update["loss"] == pytest.approx(-row["importance_weight"] * row["advantage"], abs=1e-5)
        np.testing.assert_allclose(update["ratio"], 1, atol=1e-6)
        assert update["clipped"] == [False] * 3
        assert update["kl"] == [0.0] * 3
        assert (update["role"], update["train_steps"]) == ("fresh", [0, 1, 2])
        assert update["grad_norm"] == pytest.approx(float(_flat(_gradient(experiment)).norm()), rel=1e-4)


@pytest.mark.parametrize("step_weight", ["transition_std", "uniform"])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", D), ("sum", 1)])
def test_loss_off_policy(planned: Path, tmp_path: Path, step_weight: str, reduction: str, scale: int) -> None:
    """L of section 4 with ratios exp(delta), some inside the clip range and some outside, on either side."""
    settings = {"step_weight": step_weight, "ratio_reduction": reduction, "clip_low": 0.01, "clip_high": 0.02}
    experiment = forked(planned, tmp_path, train=settings)
    deltas = np.random.default_rng(0).choice([-0.05, -0.008, 0.0, 0.015, 0.03], (8, 3))

    def change(i: int, row: dict[str, Any]) -> dict[str, Any]:
        shifted = [row["behaviour_logprob"][k] - deltas[i, k] * scale for k in range(3)]
        return {"old_logprob": shifted + row["old_logprob"][3:], "importance_weight": 1 + 0.1 * i}

    plan = _replan(experiment, change)
    train(experiment, 0)
    updates = _updates(experiment)
    omega = _step_weights(experiment) if step_weight == "transition_std" else np.full(3, 1 / 3)
    tolerance = 1e-6 * D / scale + 1e-9
    clipped = []
    for row, delta in zip(plan, deltas, strict=True):
        advantage, ratio = row["advantage"], np.exp(delta)
        surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.99, 1.02) * advantage)
        golden = -row["importance_weight"] * (omega * surrogate).sum()
        update = updates[row["trajectory_id"]]
        assert update["loss"] == pytest.approx(golden, abs=10 * tolerance)
        np.testing.assert_allclose(update["ratio"], ratio, atol=2 * tolerance)
        stopped = (ratio > 1.02) & (advantage > 0) | (ratio < 0.99) & (advantage < 0)
        assert update["clipped"] == stopped.tolist()
        clipped += stopped.tolist()
    assert 0 < sum(clipped) < len(clipped)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_term_is_added_in_closed_form(replayed: Path, tmp_path: Path, reduction: str) -> None:
    """Iteration 2: the policy has left the base, continuations have weights other than 1, and L has all of its terms."""
    beta = 0.3
    experiment = forked(replayed, tmp_path, train={"kl_beta": beta, "ratio_reduction": reduction})
    plan = _replan(experiment, lambda *_: {}, 2)
    reference = _velocities(experiment, plan)
    experiment.learner(2)
    ours = _velocities(experiment, plan)
    grid = {row["trajectory_id"]: row for row in rows_of(experiment, "trajectories", 2)}
    omega = _step_weights(experiment)
    train(reopened(experiment), 2)
    updates = _updates(experiment, 2)
    for i, row in enumerate(plan):
        sigma, std = np.array(row["sigmas"]), np.array(grid[row["trajectory_id"]]["transition_std"])
        step, at = sigma[:3] - sigma[1:4], sigma[:3]
        g = std[:3] / np.sqrt(step)
        mean_moves = -step * (1 + g**2 / (2 * at) * (1 - at))  # d mean / d v
        squares = ((ours[i] - reference[i]) * mean_moves[:, None]) ** 2
        kl = (squares.sum(1) if reduction == "sum" else squares.mean(1)) / (2 * std[:3] ** 2)
        update = updates[row["trajectory_id"]]
        np.testing.assert_allclose(update["kl"], kl, rtol=1e-3)
        surrogate = -row["importance_weight"] * row["advantage"]
        assert update["loss"] == pytest.approx(surrogate + beta * (omega * kl).sum(), abs=1e-3 if reduction == "sum" else 1e-5)
        assert kl.min() > 0
    assert {row["role"] for row in plan} == {"fresh", "continuation"}


# -- the gradient -----------------------------------------------------------------------------------------------------


def test_on_policy_gradient_is_the_policy_gradient(planned: Path, tmp_path: Path) -> None:
    """- 1/N sum_i w_i A_i sum_k omega_k grad l_ik / D, with the Gaussian l written out, one transition at a time."""
    experiment = forked(planned, tmp_path)
    plan = _replan(experiment, lambda i, _: {"importance_weight": 1 + 0.25 * i})
    policy, omega = experiment.policy, _step_weights(experiment)
    std = rows_of(experiment, "trajectories")[0]["transition_std"]
    for row in plan:
        latents, sigmas = _latents(experiment, row), row["sigmas"]
        condition = policy.encode([experiment.prompt_of[row["prompt_id"]].text])
        for k in range(3):
            x, following, step = latents[k : k + 1], latents[k + 1 : k + 2], sigmas[k] - sigmas[k + 1]
            v = policy.velocity(x, torch.tensor([sigmas[k]]).double(), condition)
            correction = std[k] ** 2 / step / (2 * sigmas[k])
            mean = x - step * (v + correction * (x + (1 - sigmas[k]) * v))
            log_density = -((following - mean).double() ** 2).sum() / (2 * std[k] ** 2)
            (-row["importance_weight"] * row["advantage"] * omega[k] * log_density / D / len(plan)).backward()
    golden = {name: p.grad.clone() for name, p in weights.trainable(policy.trainable).items() if p.grad is not None}
    policy.trainable.zero_grad()
    train(experiment, 0)
    _close(_gradient(experiment), golden, 1e-4)


def test_microbatches_add_up_to_one_batch(planned: Path, tmp_path: Path) -> None:
    gradients = []
    for size in (1, 4, 64):
        experiment = forked(planned, tmp_path / str(size))
        _replan(experiment, lambda i, _, size=size: {"microstep": i // size})  # type: ignore[misc]
        train(experiment, 0)
        gradients.append(_gradient(experiment))
    _close(gradients[0], gradients[2], 1e-5)
    _close(gradients[1], gradients[2], 1e-5)


def test_rows_without_advantage_are_counted_and_cost_nothing(planned: Path, tmp_path: Path) -> None:
    """The mean is over all planned trajectories: without the idle ones it would be N / moving times as large."""
    experiment = forked(planned, tmp_path / "some")
    plan = _replan(experiment, lambda i, row: {"advantage": row["advantage"] if i < 3 else 0.0})
    train(experiment, 0)
    updates = _updates(experiment)
    assert len(updates) == 8
    for row in plan[3:]:
        update = updates[row["trajectory_id"]]
        assert (update["loss"], update["ratio"], update["clipped"], update["kl"]) == (0.0, [], [], [])
    few = forked(planned, tmp_path / "few")
    path = f"{iteration_folder('plans', few.run_id, 0)}.parquet"
    Path(few.store.directory.path(path)).unlink()
    few.store.publish_table(path, table_of(plan[:3], PLANS))
    train(few, 0)
    scaled = {name: gradient * (3 / 8) for name, gradient in _gradient(few).items()}
    _close(_gradient(experiment), scaled, 1e-5)


def test_gradient_is_cut_at_the_configured_norm(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path, train={"max_grad_norm": 1e-6})
    train(experiment, 0)
    assert float(_flat(_gradient(experiment)).norm()) == pytest.approx(1e-6, rel=1e-3)
    assert next(iter(_updates(experiment).values()))["grad_norm"] > 1e-5


def test_several_optimizer_steps_leave_the_policy_that_drew(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path, train={"lr": 1e-3})
    plan = _replan(experiment, lambda i, _: {"optimizer_step": i // 4, "microstep": 0})
    train(experiment, 0)
    updates = _updates(experiment)
    assert [updates[row["trajectory_id"]]["optimizer_step"] for row in plan] == [0] * 4 + [1] * 4
    first, second = (np.array([updates[row["trajectory_id"]]["ratio"] for row in part]) for part in (plan[:4], plan[4:]))
    np.testing.assert_allclose(first, 1, atol=1e-6)
    assert np.abs(second - 1).max() > 1e-4
    learner = experiment.learner(1)
    assert {int(learner.optimizer.state[p]["step"]) for p in learner.parameters.values()} == {2}


# -- what it leaves behind --------------------------------------------------------------------------------------------


def test_the_new_policy_is_committed(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path)
    old_id = experiment.learner(0).policy_id
    outcome = train(experiment, 0)
    assert (outcome.done, outcome.detail["trajectories"]) == (1, 8)
    new_id = outcome.detail["policy_id"]
    assert new_id != old_id
    assert experiment.learner(1).policy_id == reopened(experiment).learner(1).policy_id == new_id
    documents = {d["policy_id"]: d for d in experiment.store.documents("policies/*/policy.json")}
    assert documents[new_id]["parent_id"] == old_id
    assert (documents[new_id]["iteration"], documents[new_id]["kind"]) == (1, "trained")
    assert experiment.iteration == 1


def test_the_same_plan_gives_the_same_policy_bit_for_bit(replayed: Path, tmp_path: Path) -> None:
    states: list[Path] = []
    ids: list[str] = []
    for name in ("one", "two"):
        experiment = forked(replayed, tmp_path / name, train={"optimizer_steps": 2})
        _replan(experiment, lambda i, _: {"optimizer_step": i // 4}, 2)
        ids.append(train(experiment, 2).detail["policy_id"])
        states += Path(experiment.store.directory.path(f"states/run={experiment.run_id}/iter=000003")).glob("*.safetensors")
    assert ids[0] == ids[1]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_from_memory_and_from_disk_it_goes_on_alike(planned: Path, tmp_path: Path) -> None:
    """Also through an optimizer step in which nothing has an advantage: Adam's momentum moves the weights in both."""
    ids = []
    for name in ("memory", "disk"):
        experiment = forked(planned, tmp_path / name)
        train(experiment, 0)
        plans = [f"{iteration_folder('plans', experiment.run_id, i)}.parquet" for i in (0, 1)]
        rows = experiment.store.read_tables("plans", plans[:1]).to_pylist()
        idle = [{**row, "iteration": 1, "advantage": 0.0} for row in rows]
        experiment.store.publish_table(plans[1], table_of(idle, PLANS))
        before = experiment.learner(1).policy_id
        ids.append(train(experiment if name == "memory" else reopened(experiment), 1).detail["policy_id"])
        assert ids[-1] != before
    assert ids[0] == ids[1]


def test_an_iteration_in_which_nothing_has_an_advantage(planned: Path, tmp_path: Path) -> None:
    """All rewards alike, at the very start: the policy stays, and the run goes on."""
    experiment = forked(planned, tmp_path)
    _replan(experiment, lambda *_: {"advantage": 0.0})
    before = experiment.learner(0).policy_id
    assert train(experiment, 0).detail["policy_id"] == before
    assert reopened(experiment).learner(1).policy_id == before
    assert next(iter(_updates(experiment).values()))["grad_norm"] == 0


def test_training_again_does_nothing_and_a_dry_run_writes_nothing(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path)
    assert train(experiment, 0, dry_run=True).detail == {"trajectories": 8}
    assert rows_of(experiment, "updates") == []
    train(experiment, 0)
    outcome = train(experiment, 0)
    assert (outcome.done, outcome.skipped) == (0, 1)


# -- what it refuses and survives -------------------------------------------------------------------------------------


def test_without_a_plan(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path)
    with pytest.raises(StoreError, match=f"iteration 1 of run {experiment.run_id} has no plan: run `opgrpo select` first"):
        train(experiment, 1)


def test_damaged_latents_are_quarantined_and_left_out(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = forked(planned, tmp_path)
    plan = _replan(experiment, lambda *_: {})
    location = LatentLocation.of(plan[5])
    file = Path(experiment.store.directory.path(location.file))
    flipped(file, location.offset + location.header + 2 * location.latent_bytes)
    train(experiment, 0)
    assert experiment.store.quarantined() == {location.trajectory_id}
    updates = _updates(experiment)
    assert set(updates) == {row["trajectory_id"] for row in plan} - {location.trajectory_id}
    for row in plan[:5] + plan[6:]:
        assert updates[row["trajectory_id"]]["loss"] == pytest.approx(-row["advantage"], abs=1e-5)
    told = capsys.readouterr().err
    assert f"{location.trajectory_id}.latents.npy latent 2: expected crc32" in told
    assert "quarantined and left out of this update" in told


def test_damage_behind_the_window_is_not_read(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path)
    location = LatentLocation.of(_replan(experiment, lambda *_: {})[0])
    file = Path(experiment.store.directory.path(location.file))
    flipped(file, location.offset + location.header + 4 * location.latent_bytes)
    assert train(experiment, 0).detail["trajectories"] == 8
    assert experiment.store.quarantined() == set()


def test_latents_of_another_model_are_refused(planned: Path, tmp_path: Path) -> None:
    experiment = forked(planned, tmp_path)
    _replan(experiment, lambda *_: {"latent_shape": [2, 6, 6]})
    message = r"has latents of shape \(2, 6, 6\), the policy 'embedded' works on \(8, 3, 3\): this store belongs to another"
    with pytest.raises(StoreError, match=message):
        train(experiment, 0)


@pytest.mark.parametrize("weight", [math.inf, 1e200])
def test_a_gradient_that_is_not_finite_stops_before_it_harms(planned: Path, tmp_path: Path, weight: float) -> None:
    experiment = forked(planned, tmp_path)
    before = experiment.learner(0).policy_id
    plan = _replan(experiment, lambda i, _: {"importance_weight": weight if i == 0 else 1.0})
    with pytest.raises(ValueError, match=r"the gradient is (nan|inf): lower train\.lr or replay\.weight_max"):
        train(experiment, 0)
    assert rows_of(experiment, "updates") == []
    assert experiment.iteration == 0
    _replan(experiment, lambda *_: {"importance_weight": 1.0})
    assert experiment.learner(0).policy_id == before
    train(experiment, 0)
    assert len(_updates(experiment)) == len(plan)


def test_a_failed_update_is_forgotten(planned: Path, tmp_path: Path) -> None:
    """The second optimizer step fails after the first has moved the weights: the next attempt starts from the state."""
    experiment = forked(planned, tmp_path / "failed")
    bad = {"importance_weight": math.inf}
    _replan(experiment, lambda i, _: {"optimizer_step": i // 4} | (bad if i == 7 else {}))
    with pytest.raises(ValueError, match="the gradient is"):
        train(experiment, 0)
    _replan(experiment, lambda *_: {"importance_weight": 1.0})
    other = forked(planned, tmp_path / "clean")
    after_failure = train(experiment, 0).detail["policy_id"]
    _replan(other, lambda i, _: {"optimizer_step": i // 4})
    assert train(reopened(other), 0).detail["policy_id"] == after_failure
