"""Offline training: what it trains on is fixed once, nothing is drawn, and stored samples move the policy to better ones."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.schema import REWARDS, table_of
from opgrpo_data.upkeep.garbage import collect
from pipelines.config import ConfigError, RunConfig
from pipelines.evaluation import evaluate
from pipelines.experiment import Experiment
from pipelines.loop import OFFLINE_STAGES, run
from pipelines.offline import members, regrouped
from pipelines.progress import Progress
from pipelines.rescore import rescore
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.settings import RewardConfig
from tests.pipelines.bad_rewards import Mood, brightness
from tests.pipelines.helpers import doubled, each, merged, pictures_of, rows_of, shared_policy, small

Row = dict[str, Any]
FORWARD: Mapping[str, Any] = {"train": {"objective": "forward", "forward": {"draws": 2, "strength": 0.1}}}
Begin = Callable[..., Experiment]


def offline(**changes: Any) -> RunConfig:
    """The small configuration as an offline run."""
    return small(**merged({"name": "off", "algorithm": "offline", "iterations": 2}, changes))


def opened(store: Path, config: RunConfig) -> Experiment:
    """The run of a configuration in a store, registered if it is not."""
    return Experiment.init(str(store), config, Progress(quiet=True))


@pytest.fixture
def begin(replayed: Path, tmp_path: Path) -> Begin:
    """An offline run in a store of 24 scored trajectories of three iterations, in six groups."""
    shutil.copytree(replayed, tmp_path / "store")
    return lambda **changes: opened(tmp_path / "store", offline(**changes))


def source(experiment: Experiment) -> dict[str, Row]:
    """All trajectories of the store."""
    return {row["trajectory_id"]: row for row in rows_of(experiment, "trajectories")}


def frozen(experiment: Experiment) -> dict[str, Row]:
    """What the run may train on."""
    return {row["trajectory_id"]: row for row in experiment.offline_selection.to_pylist()}


def plan_of(experiment: Experiment, iteration: int) -> dict[str, Row]:
    """The run's plan of an iteration."""
    files = experiment.store.files("plans", run=experiment.run_id, iteration=iteration)
    return {row["trajectory_id"]: row for row in experiment.store.read_tables("plans", files).to_pylist()}


def iterate(experiment: Experiment, iterations: Iterable[int]) -> None:
    """All stages of some iterations."""
    for iteration in iterations:
        for stage in OFFLINE_STAGES:
            stage(experiment, iteration)


def contents(experiment: Experiment, *folders: str) -> dict[str, str]:
    """Digest of every file below some folders of the store."""
    files = [path for folder in folders for path in Path(experiment.store.directory.url, folder).rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prune(experiment: Experiment, kind: str) -> None:
    """Remove every file of one kind of table."""
    for path in experiment.store.files(kind):
        Path(experiment.store.directory.path(path)).unlink()


# -- what is trained on --------------------------------------------------------------------------------------------------


def test_all_that_fits_is_taken_in_the_groups_it_was_drawn_in(begin: Begin) -> None:
    experiment = begin()
    rows, stored, pictures = frozen(experiment), source(experiment), pictures_of(experiment)
    assert set(rows) == set(stored)
    for name, row in rows.items():
        theirs = stored[name]
        assert (row["run_id"], row["iteration"], row["role"]) == (experiment.run_id, -1, "stored")
        assert row["reward"] == brightness(pictures[name])
        assert (row["born_iteration"], row["age"]) == (theirs["iteration"] - 3, 2 - theirs["iteration"])
        same = ("group_id", "prompt_id", "member_index", "behaviour_logprob", "noise_seeds", "latents_file", "latents_offset")
        assert all(row[column] == theirs[column] for column in same)
        assert [row[column] for column in ("advantage", "old_logprob", "path_variance", "importance_weight")] == [None] * 4
    assert any(row["prefix_steps"] for row in rows.values())


def test_it_is_fixed_when_the_run_begins(begin: Begin) -> None:
    """The run that drew the trajectories goes on; the offline run does not notice."""
    experiment = begin()
    before = [
        frozen(experiment),
        [members(experiment.store, experiment.config, experiment.offline_selection, i).to_pylist() for i in range(4)],
    ]
    other = Experiment.init(experiment.store.directory.url, small(name="later"), Progress(quiet=True))
    rollout(other, 0)
    score(other, 0)
    again = begin()
    assert [
        frozen(again),
        [members(again.store, again.config, again.offline_selection, i).to_pylist() for i in range(4)],
    ] == before
    assert len(frozen(begin(name="newer"))) == 32


def test_a_selection_in_sql(begin: Begin) -> None:
    experiment = begin(offline={"selection": "SELECT trajectory_id FROM entries WHERE age = 1 AND reward > 0"})
    assert {row["born_iteration"] for row in frozen(experiment).values()} == {-2}
    assert len(frozen(experiment)) == 8
    assert experiment.run_id != offline().run_id
    with pytest.raises(StoreError, match=r"offline.selection named trajectories that are no entries: \['nobody'\]"):
        begin(offline={"selection": "SELECT 'nobody' AS trajectory_id FROM entries"})


@pytest.mark.parametrize("selection", ["best", "DROP TABLE entries", "SELECT 1; SELECT 2", "SELECT prompt FROM entries"])
def test_a_selection_that_is_none_is_refused(selection: str) -> None:
    with pytest.raises(ConfigError, match=r"offline.selection: "):
        offline(offline={"selection": selection})


def test_unusable_trajectories_are_left_out(begin: Begin) -> None:
    experiment = begin(name="all")
    rows = list(source(experiment).values())
    experiment.store.quarantine(rows[0]["trajectory_id"], CorruptionError("a.tar", "member", 1, 2))
    reward = next(path for path in experiment.store.files("rewards") if f"iter={rows[-1]['iteration']:06d}" in path)
    scored = set(experiment.store.read_tables("rewards", [reward])["trajectory_id"].to_pylist())
    Path(experiment.store.directory.path(reward)).unlink()
    assert set(frozen(begin())) == {row["trajectory_id"] for row in rows[1:]} - scored


def test_trajectories_that_two_shards_hold_count_once(begin: Begin) -> None:
    before = begin(name="before")
    expected = {name: row["group_id"] for name, row in frozen(before).items()}
    doubled(before.store)
    rows = begin().offline_selection.to_pylist()
    assert len(rows) == 24
    assert {row["trajectory_id"]: row["group_id"] for row in rows} == expected
    with pytest.raises(StoreError, match=r"small-\w+ has 24 trajectories for these prompts, 24 of them scored"):
        begin(rollout={"prompts_per_iteration": 7})


def test_other_prompts_and_versions_do_not_count(begin: Begin, mood: Mood) -> None:
    experiment = begin(prompts={"limit": 2}, rollout={"prompts_per_iteration": 1})
    trained = {prompt.prompt_id for prompt in experiment.prompts["train"]}
    assert {row["prompt_id"] for row in frozen(experiment).values()} == trained
    mood.version = "2"
    with pytest.raises(StoreError, match=r"rewards \(moody, version 2\) differ: small-\w+ has 24 trajectories .* 0 of them"):
        begin(name="strict")


def test_groups_without_a_signal_are_left_out(begin: Begin, mood: Mood) -> None:
    experiment = begin(name="first")
    dead = next(iter(frozen(experiment).values()))["group_id"]
    files = experiment.store.files("rewards")
    tables = {path: experiment.store.read_tables("rewards", [path]).to_pylist() for path in files}
    mine = {name for name, row in source(experiment).items() if row["group_id"] == dead}
    for path, rows in tables.items():
        Path(experiment.store.directory.path(path)).unlink()
        changed = [row | {"value": 0.5} if row["trajectory_id"] in mine else row for row in rows]
        experiment.store.publish_table(path, table_of(changed, REWARDS))
    assert set(frozen(begin())) == set(source(experiment)) - mine


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout": {"num_steps": 4}, "train": {"window": 3}}, "rollout.num_steps, the sigma grid"),
        ({"rollout": {"noise_level": 0.5}}, "rollout.noise_level"),
        ({"rollout": {"sampler": "dance_sde"}}, "rollout.sampler"),
        ({"rollout": {"storage_dtype": "float16"}}, "rollout.storage_dtype"),
    ],
)
def test_where_nothing_fits_every_run_is_told_why(begin: Begin, changes: Row, reason: str) -> None:
    before = begin(name="other").store.files("prompts")
    with pytest.raises(StoreError, match=rf"takes 2 groups .* has 0 whose .* differ: small-\w+ differs in {reason}\. To"):
        begin(**changes)
    assert begin(name="other").store.files("prompts") == before


def test_another_model_does_not_fit(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_policy(), "model_id", "another")
    with pytest.raises(StoreError, match=r"small-\w+ differs in the model\. To"):
        begin()


def test_too_few_groups_are_refused(begin: Begin) -> None:
    with pytest.raises(StoreError, match=r"iteration takes 7 groups \(rollout.prompts_per_iteration\), .* has 6 whose"):
        begin(rollout={"prompts_per_iteration": 7})


def test_a_store_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"algorithm offline draws nothing, it needs a store with trajectories \(no store at"):
        opened(tmp_path / "nothing", offline())
    assert not (tmp_path / "nothing").exists()


def table(*groups: tuple[str, str, int, int]) -> pl.DataFrame:
    """Members of (group, prompt, iteration, how many), with rewards that differ."""
    rows = [
        {"trajectory_id": f"{group}{i}", "group_id": group, "prompt_id": prompt, "run_id": "r", "iteration": iteration}
        | {"born_iteration": iteration - 9, "member_index": i, "prefix_steps": 0, "reward": float(i)}
        | {"path_variance": [0.1], "old_logprob": [1.0]}
        for group, prompt, iteration, count in groups
        for i in range(count)
    ]
    return pl.DataFrame(rows)


def grouped(found: pl.DataFrame) -> list[list[str]]:
    """Members of each group, in order."""
    return [group["trajectory_id"].to_list() for _, group in found.group_by("group_id", maintain_order=True)]


def test_partial_groups_join_their_neighbours_in_age() -> None:
    found = regrouped(table(("a", "p", 0, 3), ("b", "p", 1, 4), ("c", "p", 2, 2), ("d", "p", 3, 3), ("e", "q", 1, 2)), 4, "run")
    assert sorted(grouped(found)) == [
        ["a0", "a1", "a2", "c0"],
        ["b0", "b1", "b2", "b3"],
        ["c1", "d0", "d1", "d2"],
        ["e0", "e1"],
    ]
    assert found.filter(pl.col("trajectory_id") == "b0")["group_id"].item() == "b"
    assert len(set(found["group_id"])) == 4


def test_large_groups_are_cut_and_single_members_have_no_group() -> None:
    assert sorted(grouped(regrouped(table(("a", "p", 0, 8), ("b", "q", 0, 5)), 4, "run"))) == [
        ["a0", "a1", "a2", "a3"],
        ["a4", "a5", "a6", "a7"],
        ["b0", "b1", "b2", "b3"],
    ]


def test_groups_are_put_together_within_one_run() -> None:
    """Run r leaves a2 and d0; the newest of r and the oldest of s are neighbours in the table, not in their policies."""
    first, second = table(("a", "p", 0, 3), ("d", "p", 5, 3)), table(("b", "p", 0, 3), ("c", "p", 1, 3))
    both = pl.concat([first, second.with_columns(run_id=pl.lit("s"))])
    found = regrouped(both, 4, "run")
    assert sorted(grouped(found)) == [["a0", "a1", "a2", "d0"], ["b0", "b1", "b2", "c0"], ["c1", "c2"], ["d1", "d2"]]
    assert found["group_id"].n_unique() == 4
    assert regrouped(both.reverse(), 4, "run").equals(found)


# -- an iteration --------------------------------------------------------------------------------------------------------


def test_a_lap_visits_every_group_once(begin: Begin) -> None:
    experiment = begin()
    laps, others = ([_groups(of, range(3 * lap, 3 * lap + 3)) for lap in range(2)] for of in (experiment, begin(seed=1)))
    for lap in laps:
        assert sorted(name for names in lap for name in names) == sorted({r["group_id"] for r in frozen(experiment).values()})
        assert [len(names) for names in lap] == [2, 2, 2]
    assert laps[0] != laps[1]
    assert laps != others


def _groups(experiment: Experiment, iterations: Iterable[int]) -> list[list[str]]:
    """The groups of some iterations."""
    return [
        members(experiment.store, experiment.config, experiment.offline_selection, iteration)["group_id"].unique().to_pylist()
        for iteration in iterations
    ]


def test_the_plan_of_the_forward_objective_asks_for_no_density(begin: Begin) -> None:
    experiment = begin(**FORWARD)
    assert rollout(experiment, 0).detail == {"trajectories": 0, "continuations": 0}
    assert select(experiment, 0).detail == {"planned": 8}
    assert experiment.store.files("densities", run=experiment.run_id) == []
    plan = plan_of(experiment, 0)
    for group in {row["group_id"] for row in plan.values()}:
        mine = [row for row in plan.values() if row["group_id"] == group]
        rewards = np.array([row["reward"] for row in mine])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        np.testing.assert_allclose([row["advantage"] for row in mine], expected, rtol=1e-9)
    for row in plan.values():
        assert (row["role"], row["importance_weight"], row["predicted_ess"], row["lr_scale"]) == ("stored", 1.0, None, 1.0)
        assert (row["first_latent"], row["last_latent"]) == (5, 5)
    assert (select(experiment, 0).done, select(experiment, 0).skipped) == (0, 1)


def test_the_plan_of_the_clipped_objective_weighs_by_densities(begin: Begin) -> None:
    """Under the base policy what iteration 0 drew has weight 1; the others exp(sum l_old - l_b) over their prefix, cut at 2."""
    experiment = begin(replay={"reuse_ess": 0.0})
    assert rollout(experiment, 0).detail["reused"] == 8
    assert rollout(experiment, 0).detail["reused"] == 0  # they are judged already
    weights = {}
    select(experiment, 0)
    stored = source(experiment)
    for name, row in plan_of(experiment, 0).items():
        kept = len(row["path_variance"])
        assert (row["role"], kept, row["train_steps"]) == ("reused", 3, [0, 1, 2])
        log_w = sum(row["old_logprob"][:kept]) - sum(stored[name]["behaviour_logprob"][:kept])
        assert row["importance_weight"] == pytest.approx(min(np.exp(log_w), 2.0), rel=1e-9)
        weights[name] = row["importance_weight"]
        if stored[name]["iteration"] == 0:
            assert row["importance_weight"] == pytest.approx(1, abs=1e-6)
    assert any(abs(weight - 1) > 1e-4 for weight in weights.values())


def test_a_policy_too_far_from_all_that_is_stored(begin: Begin) -> None:
    experiment = begin(replay={"reuse_ess": 0.99999}, train={"lr": 1e-2})
    iterate(experiment, [0])
    rollout(experiment, 1)
    with pytest.raises(StoreError, match=r"none of the 8 stored trajectories of iteration 1 can be trained on: the policy"):
        select(experiment, 1)


def test_the_plan_waits_for_the_densities(begin: Begin) -> None:
    with pytest.raises(StoreError, match="iteration 0 has not judged the groups it reuses: run `opgrpo rollout` first"):
        select(begin(), 0)


def test_a_damaged_member_leaves_its_group_and_its_baseline(begin: Begin) -> None:
    experiment = begin(**FORWARD)
    mine = members(experiment.store, experiment.config, experiment.offline_selection, 0).to_pylist()
    experiment.store.quarantine(mine[0]["trajectory_id"], CorruptionError("a.tar", "member", 1, 2))
    select(experiment, 0)
    plan = plan_of(experiment, 0)
    assert set(plan) == {row["trajectory_id"] for row in mine[1:]}
    left = [row for row in plan.values() if row["group_id"] == mine[0]["group_id"]]
    rewards = np.array([row["reward"] for row in left])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    np.testing.assert_allclose([row["advantage"] for row in left], expected, rtol=1e-9)


@pytest.mark.parametrize("parts", ["zscore", "gdpo"])
def test_parts_of_a_composite_are_normalised_over_the_batch(begin: Begin, parts: str) -> None:
    """Against NumPy, from the stored values (docs/maths.md, section 4)."""
    reward = {"name": "composite", "options": {"parts": [{"name": "tests.pipelines.bad_rewards:moody", "weight": 1.0}]}}
    store = begin(name="first").store
    assert rescore(store, RewardConfig(**reward), run=None, dry_run=False, progress=Progress(quiet=True)).done == 24
    experiment = begin(**merged(FORWARD, {"reward": reward, "train": {"advantage_parts": parts}}))
    select(experiment, 0)
    plan = list(plan_of(experiment, 0).values())
    groups, values = np.array([row["group_id"] for row in plan]), np.array([row["reward"] for row in plan])
    if parts == "zscore":
        values = (values - values.mean()) / (values.std() + 1e-4)
    mine = [values[groups == group] for group in groups]
    expected = np.array([(value - m.mean()) / (m.std() + 1e-4) for value, m in zip(values, mine, strict=True)])
    if parts == "gdpo":
        expected /= expected.std() + 1e-4
    assert [row["advantage"] for row in plan] == pytest.approx(expected.tolist(), rel=1e-6)


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["forward", "clipped"])
def test_a_whole_run_changes_nothing_that_is_stored(begin: Begin, objective: str) -> None:
    experiment = begin(train={"objective": objective})
    before = contents(experiment, "trajectories", "rewards", "buffers")
    result = run(experiment)
    assert contents(experiment, "trajectories", "rewards", "buffers") == before
    assert result.iterations == experiment.iteration == 2
    assert None not in (result.held_out_before, result.held_out_after, result.gain_error)
    assert len({row["new_policy_id"] for row in rows_of(experiment, "updates") if row["run_id"] == experiment.run_id}) == 2
    assert evaluate(experiment, 2).skipped == 6


@pytest.mark.parametrize("objective", ["forward", "clipped"])
def test_taken_up_after_every_stage_it_ends_alike(begin: Begin, replayed: Path, tmp_path: Path, objective: str) -> None:
    changes = {"train": {"objective": objective, "lr": 1e-3}}
    experiment = begin(**changes)
    iterate(experiment, range(2))
    shutil.copytree(replayed, tmp_path / "other")
    for iteration in range(2):
        for stage in OFFLINE_STAGES:
            resumed = opened(tmp_path / "other", offline(**changes))
            stage(resumed, iteration)
    assert resumed.learner(2).policy_id == experiment.learner(2).policy_id != experiment.learner(0).policy_id


def test_a_renamed_run_trains_alike(begin: Begin) -> None:
    one, other = begin(**FORWARD), begin(name="renamed", **FORWARD)
    iterate(one, range(2))
    iterate(other, range(2))
    assert one.learner(2).policy_id == other.learner(2).policy_id


def test_samples_are_contrasted_with_the_policy_that_the_run_began_with(begin: Begin) -> None:
    """In every iteration: where that moved along, equal samples would push the policy on without end."""
    experiment = begin(**FORWARD)
    base = {name: tensor.clone() for name, tensor in experiment.learner(0).reference.items()}
    iterate(experiment, range(2))
    assert all(torch.equal(old, start) for _, old, start in each(experiment.learner(2).old, base))
    assert any(not torch.equal(now, start) for _, now, start in each(experiment.learner(2).parameters, base))


def test_it_learns(begin: Begin) -> None:
    """Brighter pictures, from two dozen stored ones."""
    experiment = begin(**merged(FORWARD, {"train": {"lr": 1e-3, "ema_decay": 0.0}, "eval": {"samples": 24}}))
    iterate(experiment, range(6))
    before, after = (evaluate(experiment, iteration).detail["mean"] for iteration in (0, 6))
    assert after > before + 0.01


def test_gc_keeps_what_an_offline_run_trains_on(begin: Begin) -> None:
    experiment = begin(offline={"selection": "SELECT trajectory_id FROM entries WHERE age > 0"}, **FORWARD)
    collect(experiment.store, delete=True, grace=timedelta(0), keep_iterations=1)
    iterate(experiment, range(2))
    assert experiment.store.quarantined() == set()
    assert begin(name="later", **FORWARD).run_id  # what is left fits as well


def test_scoring_an_offline_run_is_refused(begin: Begin) -> None:
    experiment = begin()
    with pytest.raises(ValueError, match=r"run off-\w+ is offline: what it trains on was scored before it began. To give"):
        score(experiment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"replay": {"reuse_iterations": 1}},
            "replay.reuse_iterations joins past groups to those drawn now, and algorithm",
        ),
        (
            {"replay": {"import_buffer": "x"}},
            "replay.import_buffer fills a replay buffer, which algorithm offline has not",
        ),
        ({"prompts": {"order": "regret"}}, "prompts.order regret reads the replay buffer, which algorithm offline has not"),
        ({"replay": {"weight_min": 3.0}}, "replay.weight_min 3.0 is above replay.weight_max 2.0"),
        ({"replay": {"correction": "step"}, "train": {"objective": "forward"}}, "replay.correction step puts the behaviour"),
    ],
)
def test_settings_that_make_no_sense_offline(changes: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        offline(**changes)


def test_the_selection_is_part_of_an_offline_run_alone() -> None:
    selection = {"selection": "SELECT trajectory_id FROM entries"}
    assert small(offline=selection).run_id == small().run_id
    assert offline(offline=selection).run_id != offline().run_id
