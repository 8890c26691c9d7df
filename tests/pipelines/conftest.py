"""Fixtures of the compute plane's tests: one policy in memory, and stores at the start of each stage, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from opgrpo_data.io import Directory
from pipelines.experiment import Experiment
from pipelines.loop import STAGES
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.train import train
from tests.pipelines import bad_rewards
from tests.pipelines.helpers import TRAINED, created, forked, shared_policy, small


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Runs are compared bit for bit, and tests share the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies come to the CPU also where there is CUDA: for tests that compare with what was computed there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def mood(monkeypatch: pytest.MonkeyPatch) -> bad_rewards.Mood:
    """The mood of the test reward: good, until the test changes it."""
    fresh = bad_rewards.Mood()
    monkeypatch.setattr(bad_rewards, "MOOD", fresh)
    return fresh


@pytest.fixture
def policy() -> Iterator[PipelinePolicy]:
    """The embedded policy as shipped. Shared: it is loaded once, and gets its weights back after each test."""
    yield shared_policy()
    shared_policy()


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """An empty place for shards."""
    return Directory(str(tmp_path / "directory"))


@pytest.fixture(scope="session")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after `rollout` of iteration 0 of the small configuration. Do not change it: fork it."""
    folder = tmp_path_factory.mktemp("rolled")
    rollout(created(folder, small()), 0)
    return folder / "store"


@pytest.fixture(scope="session")
def planned(rolled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after `score` and `select`: ready to train iteration 0."""
    folder = tmp_path_factory.mktemp("planned")
    experiment = forked(rolled, folder)
    score(experiment, 0)
    select(experiment, 0)
    return folder / "store"


@pytest.fixture(scope="session")
def replayed(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at iteration 2, which visits the prompts of a second lap: its groups hold continuations."""
    folder = tmp_path_factory.mktemp("replayed")
    experiment = forked(planned, folder)
    train(experiment, 0)
    for iteration in (1, 2):
        rollout(experiment, iteration)
        score(experiment, iteration)
        select(experiment, iteration)
        if iteration < 2:
            train(experiment, iteration)
    return folder / "store"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Experiment]:
    """A run of one iteration of each of TRAINED, with its average kept as a policy. Shared: do not change it."""

    @cache
    def made(kind: str) -> Experiment:
        policy = {"family": "sd3", "options": {"device": "cpu", **TRAINED[kind]}}
        experiment = created(tmp_path_factory.mktemp("trained"), small(policy=policy, train={"lr": 1e-2, "ema_decay": 0.5}))
        for stage in STAGES:
            stage(experiment, 0)
        experiment.keep_average(1)
        return experiment

    return made
