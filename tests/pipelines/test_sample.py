"""Pictures for people: the same seed gives the same picture, whatever else is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from opgrpo_data.errors import StoreError
from pipelines import media
from pipelines.evaluation import Sample, draw_samples
from pipelines.prompts import Prompt
from pipelines.sample import sample
from tests.integration.harness import opgrpo, opgrpo_json
from tests.pipelines.helpers import forked

TEXTS = ["a red circle", "two blue squares"]


def test_a_sample_is_a_function_of_seed_prompt_and_number(replayed: Path, tmp_path: Path) -> None:
    experiment = forked(replayed, tmp_path)
    policy_id, store = experiment.keep_average(2), experiment.store
    both = sample(store, policy_id, TEXTS, tmp_path / "a", count=2, num_steps=3, seed=5)
    assert [path.name for path in both] == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    pictures = [path.read_bytes() for path in both]
    assert len(set(pictures)) == 4
    [alone] = sample(store, policy_id, TEXTS[1:], tmp_path / "b", count=1, num_steps=3, seed=5)
    assert alone.read_bytes() == pictures[2]
    [other] = sample(store, policy_id, TEXTS[1:], tmp_path / "b", count=1, num_steps=3, seed=6)
    assert other.read_bytes() != pictures[2]


def test_it_draws_with_the_policy_that_was_asked_for(replayed: Path, tmp_path: Path) -> None:
    experiment = forked(replayed, tmp_path)
    average, base = experiment.keep_average(2), experiment.document["base_policy_id"]
    drawn = {
        policy_id: sample(experiment.store, policy_id, TEXTS[:1], tmp_path / policy_id, count=1, num_steps=3, seed=0)[0]
        for policy_id in (average, base)
    }
    assert drawn[average].read_bytes() != drawn[base].read_bytes()
    learner = experiment.learner(2)
    with learner.averaged():
        from opgrpo_data.ids import derived_seed

        wanted = Sample(Prompt(TEXTS[0], {}), 0, derived_seed(0, "sample", TEXTS[0], 0))
        [picture] = draw_samples(experiment.policy, [wanted], 3)
    assert media.encode(picture, "png") == drawn[average].read_bytes()


def test_through_the_command_line(finished: tuple[Path, object], tmp_path: Path) -> None:
    told = opgrpo_json("sample", *TEXTS, "--policy", "last", "--store", finished[0], "--to", tmp_path / "out", "--steps", "2")
    assert told == [str(tmp_path / "out" / "0-0.png"), str(tmp_path / "out" / "1-0.png")]
    assert all(media.decode(Path(path).read_bytes()).shape == (24, 24, 3) for path in told)
    failed = opgrpo("sample", "x", "--policy", "00ff", "--store", finished[0], check=False)
    assert (failed.returncode, failed.stderr) == (
        1,
        "error: the store has no policy 00ff: see the view policies of `opgrpo sql`\n",
    )


def test_an_unknown_policy_draws_nothing(replayed: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the store has no policy"):
        sample(forked(replayed, tmp_path).store, "00ff", TEXTS, tmp_path / "out", count=1, num_steps=2, seed=0)
    assert not (tmp_path / "out").exists()
