"""Samples for people: the same noise for every policy, files by prompt and number, clear words for what is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opgrpo_data.errors import StoreError
from opgrpo_data.ids import derived_seed
from pipelines.evaluation import Sample, draw_samples
from pipelines.experiment import Experiment
from pipelines.prompts import Prompt
from pipelines.restore import restore
from pipelines.sample import sample
from tests.integration.harness import opgrpo, opgrpo_json

pytestmark = pytest.mark.usefixtures("on_cpu")

Trained = Callable[[str], Experiment]
TEXTS = ["two blue squares", "a red circle"]


def _drawn(experiment: Experiment, folder: Path, policy_id: str = "last", **options: Any) -> dict[str, bytes]:
    settings = {"count": 2, "num_steps": 3, "seed": 0} | options
    paths = sample(experiment.store, policy_id, TEXTS, folder, **settings)
    assert sorted(paths) == sorted(folder.iterdir())
    return {path.name: path.read_bytes() for path in paths}


def test_the_same_seed_draws_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    experiment = trained("adapter")
    first = _drawn(experiment, tmp_path / "deep" / "first")
    assert list(first) == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    assert len(set(first.values())) == 4
    assert _drawn(experiment, tmp_path / "again") == first
    assert set(_drawn(experiment, tmp_path / "seed", seed=1).values()).isdisjoint(first.values())
    base = experiment.document["base_policy_id"]
    assert set(_drawn(experiment, tmp_path / "base", base).values()).isdisjoint(first.values())
    more = _drawn(experiment, tmp_path / "more", count=3)
    assert {name: more[name] for name in first} == first  # however many are asked for


def test_a_sample_is_the_policys(trained: Trained, tmp_path: Path) -> None:
    """Of its own seed, prompt and number: drawn here once more, and written without loss."""
    experiment = trained("whole")
    _drawn(experiment, tmp_path / "out", seed=7)
    policy = restore(experiment.store, "last").policy
    wanted = Sample(Prompt(TEXTS[1], {}), 1, derived_seed(7, "sample", TEXTS[1], 1))
    (golden,) = draw_samples(policy, [wanted], 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "1-1.png")), golden)


def test_the_command(trained: Trained, tmp_path: Path) -> None:
    store, folder = trained("adapter").store.directory.url, tmp_path / "out"
    words: tuple[str | Path, ...] = ("sample", *TEXTS, "--policy", "last", "--store", store, "--to", folder, "--steps", "3")
    told = opgrpo_json(*words)
    assert told == [str(folder / "0-0.png"), str(folder / "1-0.png")]
    assert Image.open(told[0]).size == (24, 24)
    again = opgrpo(*words, check=False)
    assert (again.returncode, again.stdout) == (1, "")  # pictures of another policy may lie there
    assert "is there already and is no empty folder: choose another one" in again.stderr


def test_no_pictures_go_into_the_store(trained: Trained) -> None:
    experiment = trained("adapter")
    with pytest.raises(StoreError, match=r"mine lies in the store .*: choose a place outside it$"):
        _drawn(experiment, Path(experiment.store.directory.root, "policies", "mine"))


def test_an_unknown_policy_is_exit_code_1(trained: Trained, tmp_path: Path) -> None:
    store, folder = trained("adapter").store.directory.url, tmp_path / "out"
    for policy, told in (("nothing", "the store has no policy nothing"), ("../x", "policy_id '../x' cannot be part of a path")):
        done = opgrpo("sample", "a red circle", "--policy", policy, "--store", store, "--to", folder, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {told}")
        assert done.stderr.count("\n") == 1
        assert not folder.exists()
    nowhere = opgrpo("sample", "a red circle", "--policy", "last", "--store", tmp_path / "none", "--to", folder, check=False)
    assert (nowhere.returncode, folder.exists(), (tmp_path / "none").exists()) == (1, False, False)
