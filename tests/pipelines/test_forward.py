"""The forward-process objective end to end: stored samples, noised anew, move the policy; nothing else is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opgrpo_data.ids import derived_seed
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents
from opgrpo_data.schema import PLANS, table_of
from opgrpo_data.store import iteration_folder
from pipelines import sampler, weights
from pipelines.config import ConfigError
from pipelines.experiment import Experiment
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.progress import Progress
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.train import train
from pipelines.trajectories import to_tensor
from tests.pipelines.helpers import created, each, flipped, merged, reopened, rows_of, small

Row = dict[str, Any]
D = 72
FORWARD: dict[str, Any] = {"prompts": {"limit": 2}, "train": {"objective": "forward", "forward": {"draws": 2}, "lr": 1e-3}}


def ready(folder: Path, **changes: Any) -> Experiment:
    """An experiment whose iteration 0 is planned, for the forward objective."""
    experiment = created(folder, small(**merged(FORWARD, changes)))
    rollout(experiment, 0)
    score(experiment, 0)
    select(experiment, 0)
    return experiment


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `ready` without changes. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    ready(folder)
    return folder / "store"


def copied(prepared: Path, folder: Path) -> Experiment:
    """What `ready` gives without changes, as another process would open it."""
    shutil.copytree(prepared, folder / "store")
    return Experiment.open(str(folder / "store"), small(**FORWARD), Progress(quiet=True))


def replan(experiment: Experiment, change: Callable[[Row], Row]) -> None:
    """Replace columns of the plan of iteration 0."""
    path = f"{iteration_folder('plans', experiment.run_id, 0)}.parquet"
    rows = [row | change(row) for row in experiment.store.read_tables("plans", [path]).to_pylist()]
    Path(experiment.store.directory.path(path)).unlink()
    experiment.store.publish_table(path, table_of(rows, PLANS))


def updates(experiment: Experiment, iteration: int = 0) -> dict[str, Row]:
    """By trajectory_id."""
    return {row["trajectory_id"]: row for row in rows_of(experiment, "updates", iteration)}


def gradient(experiment: Experiment) -> dict[str, Tensor]:
    """Of the one optimizer step that was taken, from Adam's first moment: exp_avg = (1 - beta1) g."""
    learner = experiment.learner(1)
    return {
        name: learner.optimizer.state[parameter]["exp_avg"].clone() / (1 - learner.config.betas[0])
        for name, parameter in learner.parameters.items()
    }


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """Relative to the norm of all of it."""
    difference = math.sqrt(sum(float((a - b).double().square().sum()) for _, a, b in each(ours, theirs)))
    norm = math.sqrt(sum(float(b.double().square().sum()) for b in theirs.values()))
    assert norm > 0
    assert difference / norm <= tolerance


def test_two_iterations_train_the_same_policy_twice(tmp_path: Path) -> None:
    ends = []
    for name in ("one", "other"):
        experiment = ready(tmp_path / name)
        base = experiment.learner(0).policy_id
        train(experiment, 0)
        rollout(experiment, 1)
        score(experiment, 1)
        select(experiment, 1)
        if name == "other":  # in another process, as it were
            experiment = reopened(experiment)
        train(experiment, 1)
        ids = [base] + [rows_of(experiment, "updates", i)[0]["new_policy_id"] for i in (0, 1)]
        assert len(set(ids)) == 3
        assert experiment.learner(2).policy_id == ids[-1]
        losses = {name: row["loss"] for i in (0, 1) for name, row in updates(experiment, i).items()}
        assert all(loss > 0 for loss in losses.values())
        ends.append((ids, losses))
    assert ends[0] == ends[1]


def test_rows_say_that_only_the_sample_is_read(prepared: Path, tmp_path: Path) -> None:
    experiment = copied(prepared, tmp_path)
    plan = rows_of(experiment, "plans", 0)
    assert len(plan) == 8
    assert {(row["first_latent"], row["last_latent"]) for row in plan} == {(5, 5)}
    train(experiment, 0)
    assert all(row["ratio"] == row["clipped"] == row["kl"] == [] for row in updates(experiment).values())


def test_every_other_latent_may_be_gone(prepared: Path, tmp_path: Path) -> None:
    """A byte of each of x_0..x_4 damaged: the same policy, and nobody notices. A byte of x_5: quarantine."""
    whole = copied(prepared, tmp_path / "whole")
    train(whole, 0)
    experiment = copied(prepared, tmp_path / "damaged")
    rows = rows_of(experiment, "trajectories", 0)
    for row in rows:
        location = LatentLocation.of(row)
        size = (location.length - location.header) // 6
        for k in range(5):
            file = Path(experiment.store.directory.path(location.file))
            flipped(file, location.offset + location.header + k * size + 7)
    train(experiment, 0)
    assert rows_of(experiment, "updates", 0)[0]["new_policy_id"] == rows_of(whole, "updates", 0)[0]["new_policy_id"]
    assert experiment.store.quarantined() == set()
    other = copied(prepared, tmp_path / "sample")
    location = LatentLocation.of(next(row for row in rows_of(other, "trajectories", 0)))
    size = (location.length - location.header) // 6
    flipped(Path(other.store.directory.path(location.file)), location.offset + location.header + 5 * size + 7)
    train(other, 0)
    assert len(other.store.quarantined()) == 1
    assert len(updates(other)) == 7


def noised(experiment: Experiment, row: Row, draw: int) -> tuple[Tensor, float, Tensor]:
    """x_sigma, sigma and the target eps - x of one draw: logit(sigma) ~ N(shift, 1), noise of its own."""
    stored = read_latents(experiment.store.directory, LatentLocation.of(row), 5, 5)
    sample = to_tensor(stored, row["latent_dtype"])
    member = (row["born_iteration"], row["prompt_id"], row["member_index"])
    seed = derived_seed(experiment.config.seed, "forward", row["iteration"], row["optimizer_step"], *member, draw)
    eps = sampler.noise(seed, 0, tuple(sample.shape[1:]))[None]
    logit = experiment.config.train.forward.sigma_shift + sampler.noise(seed, 1, (1,)).item()
    sigma = 1 / (1 + math.exp(-logit))
    return (1 - sigma) * sample + sigma * eps, sigma, eps - sample


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_loss_and_gradient_of_the_first_step(strength: float, tmp_path: Path) -> None:
    """At theta = old: loss |v - t|^2 / (beta D), gradient 2 (2r - 1) (v - t) / D; t = eps - x, r = (1 + clip(A/2)) / 2."""
    experiment = ready(tmp_path, train={"forward": {"strength": strength, "draws": 3}}, replay={"reuse_ess": 0.0})
    replan(experiment, lambda row: {"importance_weight": 0.25 + (row["advantage"] > 0)})
    plan = rows_of(experiment, "plans", 0)
    policy = experiment.learner(0).policy
    assert isinstance(policy, PipelinePolicy)
    golden, total = {}, torch.zeros((), dtype=torch.float64)
    for row in plan:
        if row["advantage"] == 0:
            continue
        losses = []
        for draw in range(3):
            x, sigma, target = noised(experiment, row, draw)
            text = experiment.prompt_of[row["prompt_id"]].text
            v = policy.velocity(x, torch.tensor([sigma], dtype=torch.float64), policy.encode([text]))
            losses.append(float((v - target).detach().double().square().sum()) / D / strength)
            r = (1 + np.clip(row["advantage"] / 2, -1, 1)) / 2
            slope = 2 * (2 * r - 1) * (v - target).detach() / D
            total = total + row["importance_weight"] * (slope * v).sum().double() / 3 / len(plan)
        golden[row["trajectory_id"]] = row["importance_weight"] * float(np.mean(losses))
    parameters = weights.trainable(policy.trainable)
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    expected = {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
    train(experiment, 0)
    found = {name: row["loss"] for name, row in updates(experiment).items() if row["advantage"] != 0}
    assert found == pytest.approx(golden, rel=1e-4)
    close(gradient(experiment), expected, 1e-3)


def test_weights_multiply_the_loss(prepared: Path, tmp_path: Path) -> None:
    """Twice the weight: twice the loss of that trajectory. All weights 3: three times the gradient. Weight 0: none."""
    found = {}
    for name, weight in {
        "one": [1.0] * 8,
        "some": [1.0, 2.0] * 4,
        "all": [3.0] * 8,
        "none": [0.0] * 8,
    }.items():
        experiment = copied(prepared, tmp_path / name)
        order = {row["trajectory_id"]: i for i, row in enumerate(rows_of(experiment, "plans", 0))}
        given = {t: {"importance_weight": weight[i]} for t, i in order.items()}
        replan(experiment, lambda row, given=given: given[row["trajectory_id"]])  # type: ignore[misc]
        train(experiment, 0)
        losses = {order[t]: row["loss"] for t, row in updates(experiment).items()}
        found[name] = (losses, gradient(experiment))
    one = found["one"][0]
    assert found["some"][0] == pytest.approx({i: loss * (1 + i % 2) for i, loss in one.items()}, rel=1e-6)
    assert found["all"][0] == pytest.approx({i: 3 * loss for i, loss in one.items()}, rel=1e-6)
    close(found["all"][1], {name: 3 * g for name, g in found["one"][1].items()}, 1e-5)
    assert set(found["none"][0].values()) == {0.0}
    assert all(not g.any() for g in found["none"][1].values())


def test_every_use_of_a_sample_draws_new_noise(tmp_path: Path) -> None:
    """Two epochs at a step too small to matter: the same sample at other noise has another loss."""
    experiment = ready(tmp_path, train={"epochs": 2, "lr": 1e-12})
    train(experiment, 0)
    rows = rows_of(experiment, "updates", 0)
    assert [row["optimizer_step"] for row in rows] == [0] * 8 + [1] * 8
    first, second = ({row["trajectory_id"]: row["loss"] for row in rows if row["optimizer_step"] == step} for step in (0, 1))
    assert first.keys() == second.keys()
    assert all(first[name] != pytest.approx(second[name], rel=1e-3) for name in first)


def test_it_learns_from_the_difference_of_good_and_bad(prepared: Path, tmp_path: Path) -> None:
    """With the signs of all advantages turned the gradient turns: 2r - 1 is odd in A."""
    gradients = []
    for sign in (1, -1):
        experiment = copied(prepared, tmp_path / str(sign))
        replan(experiment, lambda row, sign=sign: {"advantage": sign * row["advantage"]})  # type: ignore[misc]
        train(experiment, 0)
        gradients.append(gradient(experiment))
    close(gradients[0], {name: -g for name, g in gradients[1].items()}, 1e-5)


def test_continuations_and_reused_groups_train_too(tmp_path: Path) -> None:
    experiment = ready(tmp_path, replay={"reuse_iterations": 1, "reuse_ess": 0.0}, train={"lr": 2e-4})
    train(experiment, 0)
    rollout(experiment, 1)
    score(experiment, 1)
    select(experiment, 1)
    train(experiment, 1)
    plan = rows_of(experiment, "plans", 1)
    assert {row["role"] for row in plan} == {"fresh", "continuation", "reused"}
    assert {(row["first_latent"], row["last_latent"]) for row in plan} == {(5, 5)}
    told = updates(experiment, 1)
    assert all(told[row["trajectory_id"]]["loss"] > 0 for row in plan)  # also without an advantage


@pytest.mark.parametrize(
    "changes",
    [{"ratio_norm": True}, {"kl_beta": 0.1}, {"step_fraction": 0.5}],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.objective forward has no ratios and no denoising steps: leave train.ratio_norm"
    ):
        small(train={"objective": "forward", **changes})
    assert small(train={"objective": "clipped", **changes}).train.objective == "clipped"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draws": 0}, "train.forward.draws: Input should be greater than or equal to 1, got 0"),
        ({"strength": 0.0}, "train.forward.strength: Input should be greater than 0"),
        ({"advantage_scale": -1.0}, "train.forward.advantage_scale: Input should be greater than 0"),
        ({"sigma_shfit": 1.0}, "unknown key 'train.forward.sigma_shfit'; did you mean 'train.forward.sigma_shift'"),
        ({"draws": True}, "got the truth value True"),
    ],
)
def test_settings_of_the_forward_objective_are_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(train={"forward": changes})
