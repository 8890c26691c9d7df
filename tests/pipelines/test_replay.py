"""Replay, from the rules on numbers to whole iterations: prefixes, composition, regret, chains, and group reuse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opgrpo_data.errors import StoreError
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents
from opgrpo_data.store import iteration_folder
from pipelines import sampler, weights
from pipelines.config import ConfigError
from pipelines.experiment import Experiment
from pipelines.groups import prompts_of, regret_weights, replayed_entries, shard_tasks
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.prompts import Prompt
from pipelines.replay import prefix_length
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.settings import ReplayConfig
from pipelines.train import train
from pipelines.trajectories import Stored, draw_continuations, draw_fresh, evaluate, read_prefix, to_tensor
from tests.pipelines.helpers import (
    created,
    elements,
    flipped,
    grid_of,
    members_of,
    perturbed,
    reopened,
    rows_of,
    small,
)

Row = dict[str, Any]

# Newest first, and of an iteration the continuation, whose noise has several seeds.
CHAIN = "SELECT trajectory_id FROM entries ORDER BY born_iteration DESC, len(list_distinct(noise_seeds)) DESC, reward LIMIT 1"


def iterate(experiment: Experiment, iteration: int, *, trained: bool = True) -> None:
    """The stages of one iteration."""
    rollout(experiment, iteration)
    score(experiment, iteration)
    select(experiment, iteration)
    if trained:
        train(experiment, iteration)


def by_id(rows: list[Row]) -> dict[str, Row]:
    """trajectory_id to its row."""
    return {row["trajectory_id"]: row for row in rows}


def policy_of(experiment: Experiment, iteration: int) -> PipelinePolicy:
    """The old policy of an iteration."""
    found = experiment.learner(iteration).policy
    assert isinstance(found, PipelinePolicy)
    return found


def latents_of(experiment: Experiment, row: Row) -> Tensor:
    """x_0..x_T as stored."""
    found = read_latents(experiment.store.directory, LatentLocation.of(row), 0, row["num_steps"])
    return to_tensor(found, row["latent_dtype"])


def velocities(policy: PipelinePolicy, states: Tensor, sigmas: Tensor, text: str) -> Tensor:
    """Of the policy as it is, one state at a time."""
    with torch.no_grad():
        each = [policy.velocity(x[None], s[None], policy.encode([text])) for x, s in zip(states, sigmas, strict=True)]
    return torch.cat(each)


# -- how long a prefix is ------------------------------------------------------------------------------------------------


def _replay(**changes: Any) -> ReplayConfig:
    return small(replay={"prefix_steps": 3, "ess_floor": 0.5, **changes}).replay


@pytest.mark.parametrize(
    ("variances", "truncation", "always", "ess"),
    [  # exp(-0.6) = 0.55 and exp(-0.9) = 0.41: two steps leave half the sample
        ([0.3, 0.3, 0.3], "fixed", 3, 0),
        ([0.3, 0.3, 0.3], "adaptive", 2, 2),
        ([0.3, 0.3, 0.3], "none", 3, 0),
        ([0.1, 0.1, 0.1], "fixed", 3, 3),
        ([0.1, 0.1, 0.1], "adaptive", 3, 3),
        ([0.1, 0.1, 0.1], "none", 3, 3),
        ([0.9, 0.0, 0.0], "fixed", 3, 0),
        ([0.9, 0.0, 0.0], "adaptive", 1, 0),  # prefix_min
        ([0.9, 0.0, 0.0], "none", 3, 0),
        ([0.0, 0.0, 0.9], "adaptive", 2, 2),
        ([0.1] * 5, "none", 5, 5),
        ([0.1] * 4 + [0.5], "none", 5, 0),
    ],
)
def test_prefix_length_by_hand(variances: list[float], truncation: str, always: int, ess: int) -> None:
    assert prefix_length(variances, _replay(truncation=truncation, admission="always")) == always
    assert prefix_length(variances, _replay(truncation=truncation, admission="ess")) == ess


@pytest.mark.parametrize(("shortest", "always", "ess"), [(1, 2, 2), (2, 2, 2), (3, 3, 0)])
def test_adaptive_prefixes_have_a_least_length(shortest: int, always: int, ess: int) -> None:
    replay = {"truncation": "adaptive", "prefix_min": shortest}
    assert prefix_length([0.3, 0.3, 0.3], _replay(**replay)) == always
    assert prefix_length([0.3, 0.3, 0.3], _replay(**replay, admission="ess")) == ess


@given(
    lambdas=st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=3, max_size=3),
    floor=st.floats(0.01, 0.99),
    shortest=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_prefix_lengths_against_the_definition(lambdas: list[float], floor: float, shortest: int) -> None:
    predicted = [math.exp(-sum(lambdas[:k])) for k in range(4)]
    good = [k for k in range(shortest, 4) if predicted[k] >= floor]
    adaptive = {"truncation": "adaptive", "prefix_min": shortest, "ess_floor": floor}
    assert prefix_length(lambdas, _replay(**adaptive, admission="ess")) == max(good, default=0)
    assert prefix_length(lambdas, _replay(**adaptive)) == max(good, default=shortest)
    whole = 3 if predicted[3] >= floor else 0
    assert prefix_length(lambdas, _replay(ess_floor=floor, admission="ess")) == whole


# -- which entries, which prompts ----------------------------------------------------------------------------------------


def entry(reward: float, mean: float | None = None, std: float | None = None, name: str = "e") -> Row:
    """A buffer entry as far as these rules read it."""
    return {"trajectory_id": name, "reward": reward, "fresh_mean": mean, "fresh_std": std}


@pytest.mark.parametrize(
    ("found", "signal"),
    [
        (entry(1.0, 0.5, 0.25), True),
        (entry(0.0, 0.5, 0.25), True),  # a failure tells as much
        (entry(0.75, 0.5, 0.25), False),  # not by more than their std
        (entry(0.6, 0.5, 0.25), False),
        (entry(0.5, 0.5, 0.0), False),
        (entry(0.625, 0.5, 0.0), True),
        (entry(0.5), True),  # nothing known of fresh members
    ],
)
def test_signal_replays_what_differs_from_fresh_members(found: Row, signal: bool) -> None:
    assert replayed_entries(small(replay={"proportion": "signal"}), [found]) == ([found] if signal else [])
    assert replayed_entries(small(), [found]) == [found]


def test_signal_keeps_the_order_and_never_goes_beyond_the_first_members() -> None:
    entries = [entry(reward, 0.5, 0.25, str(i)) for i, reward in enumerate([0.5, 1.0, 0.0, 0.9])]
    kept = {
        members: [
            e["trajectory_id"] for e in replayed_entries(small(replay={"proportion": "signal", "members": members}), entries)
        ]
        for members in range(4)
    }
    assert kept == {0: [], 1: [], 2: ["1"], 3: ["1", "2"]}


def prompts(count: int) -> list[Prompt]:
    """Made-up prompts."""
    return [Prompt(f"prompt {i}", {"index": i}) for i in range(count)]


def test_regret_weights_by_hand() -> None:
    a, b, c, d, e = some = prompts(5)
    buffer = {
        a.prompt_id: [entry(1.0, 0.2)],  # regret 0.8, the largest
        b.prompt_id: [entry(0.1, 0.3), entry(0.5, 0.3)],  # best 0.5: regret 0.2
        c.prompt_id: [entry(0.1, 0.9)],  # fresh members do better now: none
        d.prompt_id: [entry(1.0)],  # nothing known of fresh members: like never visited
    }
    assert regret_weights(some, buffer, 0.1) == pytest.approx([1.0, 0.1 + 0.9 / 4, 0.1, 1.0, 1.0])
    assert regret_weights(some, buffer, 1.0) == pytest.approx([1.0] * 5)
    assert regret_weights(some, {}, 0.1) == pytest.approx([1.0] * 5)
    assert regret_weights([c, e], buffer, 0.25) == pytest.approx([0.25, 1.0])  # no regret anywhere
    assert regret_weights([a, c], {a.prompt_id: []}, 0.1) == pytest.approx([1.0, 1.0])


@given(st.lists(st.none() | st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=8), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_regret_weights_lie_between_floor_and_1(known: list[tuple[float, float] | None], floor: float) -> None:
    some = prompts(len(known))
    buffer = {p.prompt_id: [entry(*pair)] for p, pair in zip(some, known, strict=True) if pair is not None}
    found = regret_weights(some, buffer, floor)
    regrets = [None if pair is None else max(pair[0] - pair[1], 0.0) for pair in known]
    largest = max((r for r in regrets if r is not None), default=0.0)
    for weight, regret in zip(found, regrets, strict=True):
        share = 1.0 if regret is None else regret / largest if largest > 0 else 0.0
        assert weight == pytest.approx(floor + (1 - floor) * share)


def test_regret_draws_prompts_by_their_weights_without_repeating_any() -> None:
    config = small(prompts={"order": "regret", "regret_floor": 0.1})
    some = prompts(6)
    # Of prompts 0 and 1 replay knows much better; the rest has no regret: weights 1, 1, 0.1, 0.1, 0.1, 0.1.
    buffer = {p.prompt_id: [entry(1.0 if i < 2 else 0.0, 0.0)] for i, p in enumerate(some)}
    drawn = [prompts_of(config, some, iteration, buffer) for iteration in range(600)]
    assert all(len({p.prompt_id for p in chosen}) == 2 for chosen in drawn)
    assert drawn == [prompts_of(config, some, iteration, buffer) for iteration in range(600)]
    counts = Counter(p.metadata["index"] for chosen in drawn for p in chosen)
    # Drawn first: 1 / 2.4. Second, after the other: 1 / 2.4 * 1 / 1.4; after one of four: 4 * 0.1 / 2.4 * 1 / 2.3.
    share = 1 / 2.4 + 1 / 2.4 / 1.4 + 0.4 / 2.4 / 2.3
    for i in range(2):
        assert counts[i] / 600 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 600))
    assert set(counts) == set(range(6))  # nothing is forgotten
    other = small(prompts={"order": "regret"}, seed=1)
    assert drawn != [prompts_of(other, some, iteration, buffer) for iteration in range(600)]


def test_regret_without_a_buffer_is_uniform() -> None:
    config = small(prompts={"order": "regret"}, rollout={"prompts_per_iteration": 1})
    counts = Counter(prompts_of(config, prompts(4), iteration, {})[0].text for iteration in range(800))
    assert len(counts) == 4
    assert all(abs(count - 200) < 4 * math.sqrt(800 * 3 / 16) for count in counts.values())
    with pytest.raises(ValueError, match="prompts_per_iteration is 1, but there are only 0 training prompts"):
        prompts_of(config, [], 0, {})


@given(held=st.lists(st.integers(0, 5), min_size=3, max_size=3), size=st.integers(2, 5), members=st.integers(0, 4))
@settings(deadline=None, max_examples=40)
def test_composition_is_exact(held: list[int], size: int, members: int) -> None:
    """`members` continuations where the buffer holds so many, best first, at the end of the group; the rest is fresh."""
    members = min(members, size - 1)
    some = prompts(3)
    config = small(replay={"members": members}, rollout={"prompts_per_iteration": 3, "group_size": size})
    buffer = {p.prompt_id: [entry(1.0, name=f"{p.text}/{i}") for i in range(n)] for p, n in zip(some, held, strict=True)}
    drawn = [m for task in shard_tasks(config, "run", some, 0, buffer) for m in task.members]
    assert len({m.trajectory_id for m in drawn}) == len({m.seed for m in drawn}) == 3 * size
    for prompt, count in zip(some, held, strict=True):
        group = [m for m in drawn if m.prompt == prompt]
        assert [m.member_index for m in group] == list(range(size))
        replayed = min(count, members)
        assert [m.parent for m in group[: size - replayed]] == [None] * (size - replayed)
        assert [m.parent for m in group[size - replayed :]] == buffer[prompt.prompt_id][:replayed]


# -- settings that make no sense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replay": {"members": 4}}, "replay.members 4 leaves no fresh member in a group of 4: at most 3"),
        ({"replay": {"prefix_steps": 5}}, "replay.prefix_steps 5 must be smaller than rollout.num_steps 5"),
        ({"replay": {"truncation": "adaptive", "prefix_min": 3}}, "replay.prefix_min 3 is above replay.prefix_steps 2"),
        ({"replay": {"weight_min": 3.0}}, "replay.weight_min 3.0 is above replay.weight_max 2.0"),
        ({"replay": {"decay": 1.5}}, r"replay.decay 1.5 must lie in \(0, 1\]"),
        ({"replay": {"correction": "step", "weight_normalised": True}}, "replay.correction step has no importance weights"),
        ({"replay": {"correction": "none", "variance_budget": 1.0}}, "replay.correction none has no importance weights"),
        ({"replay": {"correction": "step"}, "train": {"ratio_norm": True}}, "train.ratio_norm centres the ratio on the old"),
        ({"replay": {"selection": "newest"}}, "choose one of .*got 'newest'"),
        ({"replay": {"selection": "DROP TABLE entries"}}, "or give SQL, one SELECT over the table entries"),
        ({"algorithm": "flow_grpo", "replay": {"reuse_iterations": 1}}, "replay.reuse_iterations is off-policy"),
        ({"algorithm": "flow_grpo", "prompts": {"order": "regret"}}, "prompts.order regret reads the replay buffer"),
        ({"algorithm": "flow_grpo", "replay": {"import_buffer": "x"}}, "replay.import_buffer fills the replay buffer"),
    ],
)
def test_replay_that_makes_no_sense_is_refused(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(**changes)


def test_replay_that_makes_sense_though_it_looks_odd() -> None:
    assert small(replay={"truncation": "none", "prefix_steps": 9}).replay.truncation == "none"
    assert small(replay={"members": 0, "reuse_iterations": 2}).buffer_rule.members == 1
    assert small(replay={"selection": f"  {CHAIN}"}).buffer_rule.selection.strip() == CHAIN


# -- whole trajectories replayed -----------------------------------------------------------------------------------------


def test_untruncated_replay_brings_back_every_bit(tmp_path: Path) -> None:
    """With truncation `none` nothing is drawn anew: latents, densities and seeds are the parent's, lambda is of all T steps."""
    config = small(prompts={"limit": 2}, replay={"truncation": "none", "members": 2}, train={"lr": 1e-3})
    experiment = created(tmp_path, config)
    iterate(experiment, 0)
    iterate(experiment, 1)
    rows = by_id(rows_of(experiment, "trajectories"))
    continued = [row for row in rows.values() if row["prefix_steps"]]
    assert len(continued) == 4
    entries = {row["trajectory_id"] for row in rows_of(experiment, "buffers", 0)}
    values = by_id(rows_of(experiment, "rewards"))
    for row in continued:
        parent = rows[row["parent_id"]]
        assert parent["trajectory_id"] in entries
        assert row["prefix_steps"] == row["num_steps"] == len(row["path_variance"]) == 5
        assert torch.equal(latents_of(experiment, row), latents_of(experiment, parent))
        assert row["latents_crc32"] == parent["latents_crc32"]
        assert row["behaviour_logprob"] == parent["behaviour_logprob"]
        assert row["noise_seeds"] == parent["noise_seeds"]
        assert row["old_logprob"] != parent["old_logprob"]
        assert all(value > 0 for value in row["path_variance"])
        assert values[row["trajectory_id"]]["value"] == values[parent["trajectory_id"]]["value"]
    plan = by_id(rows_of(experiment, "plans", 1))
    for row in continued:
        gained = np.sum(row["old_logprob"]) - np.sum(row["behaviour_logprob"])
        found = plan[row["trajectory_id"]]
        assert found["importance_weight"] == pytest.approx(min(math.exp(gained), 2.0), rel=1e-6)
        assert found["train_steps"] == [0, 1, 2]


@pytest.mark.parametrize(("floor", "continuations"), [(0.999999, 0), (1e-9, 2)])
def test_entries_below_the_floor_give_their_place_to_fresh_members(floor: float, continuations: int, tmp_path: Path) -> None:
    config = small(prompts={"limit": 2}, replay={"admission": "ess", "ess_floor": floor}, train={"lr": 1e-3})
    experiment = created(tmp_path, config)
    iterate(experiment, 0)
    outcome = rollout(experiment, 1)
    assert outcome.detail == {"trajectories": 8, "continuations": 2}  # asked for
    rows = rows_of(experiment, "trajectories", 1)
    assert sum(row["parent_id"] is not None for row in rows) == continuations
    assert sum(row["prefix_steps"] > 0 for row in rows) == continuations
    assert sorted(row["member_index"] for row in rows) == sorted([*range(4)] * 2)
    for row in rows:
        if row["prefix_steps"] == 0:
            assert row["noise_seeds"] == [row["seed"]] * 5
            assert row["old_logprob"] == row["behaviour_logprob"]


# -- chains of continuations ---------------------------------------------------------------------------------------------


@given(kept=st.lists(st.integers(1, 5), min_size=5, max_size=5))
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chains_remember_who_drew_what(policy: PipelinePolicy, kept: list[int]) -> None:
    """Depth 5, another policy at each: transition k was drawn by the last depth that began at or before k."""
    config = small(rollout={"prompts_per_iteration": 4, "group_size": 2})
    grid = grid_of(policy, config)
    shipped = {name: tensor.detach().clone() for name, tensor in weights.trainable(policy.trainable).items()}
    policies = [{name: tensor.clone() for name, tensor in perturbed(policy, 0.03, seed).items()} for seed in range(6)]
    texts = [m.prompt.text for m in members_of(config)[::2]]
    sigmas = torch.as_tensor(grid.sigmas[:-1])
    ids = set()
    authors = [0] * 5
    logprobs: list[list[list[float]]] = []  # by depth: of the transitions it drew
    seeds: list[list[int]] = []
    drawn = None
    for depth, parameters in enumerate(policies):
        weights.copy_into(policy.trainable, parameters)
        members = members_of(config, depth)[::2]
        ids |= {m.trajectory_id for m in members}
        seeds.append([m.seed for m in members])
        if drawn is None:
            drawn = draw_fresh(policy, members, grid, "float32")
        else:
            keep = kept[depth - 1]
            stored = Stored(texts, drawn.latents[:, : keep + 1], drawn.behaviour_logprob.tolist(), drawn.noise_seeds)
            judged = evaluate(policy, stored, grid)
            before, drawn = drawn, draw_continuations(policy, members, stored, judged, grid, "float32")
            assert drawn.prefix_steps == keep
            assert torch.equal(drawn.latents[:, : keep + 1], before.latents[:, : keep + 1])
            assert torch.equal(drawn.old_logprob[:, :keep], judged.logprob)
            assert torch.equal(drawn.old_logprob[:, keep:], drawn.behaviour_logprob[:, keep:])
            for i, text in enumerate(texts):
                ours = velocities(policy, drawn.latents[i, :keep], sigmas[:keep], text).double()
                for k in range(keep):
                    weights.copy_into(policy.trainable, policies[authors[k]])
                    theirs = velocities(policy, drawn.latents[i, k : k + 1], sigmas[k : k + 1], text).double()
                    golden = float(grid.velocity_coef[k] ** 2 * (ours[k] - theirs[0]).square().sum() / grid.std[k] ** 2)
                    # The very noise is regenerated, so what is left is the distance of two means, 0 of one policy.
                    assert float(drawn.path_variance[i, k]) == pytest.approx(golden, rel=1e-2, abs=1e-5)
                weights.copy_into(policy.trainable, parameters)
            authors[keep:] = [depth] * (5 - keep)
        logprobs.append(drawn.behaviour_logprob.tolist())
        for i in range(len(texts)):
            assert drawn.behaviour_logprob[i].tolist() == [logprobs[author][i][k] for k, author in enumerate(authors)]
            assert drawn.noise_seeds[i] == [seeds[author][i] for author in authors]
    assert len(ids) == 6 * 4
    weights.copy_into(policy.trainable, shipped)


def test_a_chain_through_the_store(tmp_path: Path) -> None:
    """Five iterations continue one trajectory again and again, picked by SQL; each of them trains."""
    config = small(
        iterations=6,
        prompts={"limit": 1},
        rollout={"prompts_per_iteration": 1, "group_size": 3},
        replay={"selection": CHAIN, "prefix_steps": 3, "weight_max": 1e9},
        train={"lr": 1e-3, "keep_states": 10},
    )
    experiment = created(tmp_path, config)
    for iteration in range(6):
        iterate(experiment, iteration)
    rows = by_id(rows_of(experiment, "trajectories"))
    assert len(rows) == 18
    chain = sorted((row for row in rows.values() if row["parent_id"]), key=lambda row: int(row["iteration"]))
    assert [row["iteration"] for row in chain] == [1, 2, 3, 4, 5]
    ancestor = rows[chain[0]["parent_id"]]
    assert (ancestor["iteration"], ancestor["prefix_steps"]) == (0, 0)
    grid = grid_of(policy_of(experiment, 0), config)
    text = experiment.prompt_of[ancestor["prompt_id"]].text
    first = latents_of(experiment, ancestor)
    states, sigmas = first[:3], torch.as_tensor(grid.sigmas[:3])
    by_policy = [velocities(policy_of(experiment, i), states, sigmas, text).double() for i in range(6)]
    parent = ancestor
    for row in chain:
        assert row["parent_id"] == parent["trajectory_id"]
        # The ancestor drew the prefix: its latents, densities and seeds stay, however deep.
        assert torch.equal(latents_of(experiment, row)[:4], first[:4])
        assert row["behaviour_logprob"][:3] == ancestor["behaviour_logprob"][:3]
        assert row["noise_seeds"] == [ancestor["seed"]] * 3 + [row["seed"]] * 2
        assert row["behaviour_logprob"][3:] == row["old_logprob"][3:] != parent["behaviour_logprob"][3:]
        moved = (by_policy[row["iteration"]] - by_policy[0]).square().sum((1, 2, 3)).numpy()
        golden = moved * grid.velocity_coef[:3] ** 2 / grid.std[:3] ** 2
        np.testing.assert_allclose(row["path_variance"], golden, rtol=2e-2, atol=1e-6)
        planned = by_id(rows_of(experiment, "plans", row["iteration"]))[row["trajectory_id"]]
        log_w = np.sum(row["old_logprob"][:3]) - np.sum(ancestor["behaviour_logprob"][:3])
        assert planned["importance_weight"] == pytest.approx(math.exp(log_w), rel=1e-6)
        parent = row


# -- group reuse ---------------------------------------------------------------------------------------------------------

REUSE: dict[str, Any] = {
    "prompts": {"limit": 2},
    "replay": {"reuse_iterations": 1, "reuse_ess": 0.0, "weight_max": 1e9},
    "train": {"lr": 1e-3, "keep_states": 10},
}


@pytest.fixture(scope="module")
def reusing(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Three iterations that each train on the groups of the one before as well. Do not change it."""
    experiment = created(tmp_path_factory.mktemp("reusing"), small(**REUSE))
    for iteration in range(3):
        iterate(experiment, iteration)
    return experiment


def test_reuse_brings_back_the_groups_of_the_iteration_before(reusing: Experiment) -> None:
    for iteration in range(3):
        plan = rows_of(reusing, "plans", iteration)
        back = by_id([row for row in plan if row["role"] == "reused"])
        earlier = rows_of(reusing, "plans", iteration - 1) if iteration else []
        owed = by_id([row for row in earlier if row["role"] != "reused" and row["advantage"] != 0])
        assert back.keys() == owed.keys()
        assert len(plan) == 8 + len(owed)
        for name, row in back.items():
            assert row["age"] == 1
            for column in (
                "reward",
                "advantage",
                "group_id",
                "prompt_id",
                "behaviour_logprob",
                "noise_seeds",
                "latents_offset",
            ):
                assert row[column] == owed[name][column], column
    assert any(row["prefix_steps"] for row in rows_of(reusing, "plans", 2) if row["role"] == "reused")  # a continuation again


def test_reuse_judges_by_the_present_old_policy(reusing: Experiment) -> None:
    """`densities` and the plan hold what evaluating the stored latents directly, one trajectory at a time, gives."""
    experiment = reopened(reusing)  # its weights lie in a policy that tests share
    for iteration in (1, 2):
        judged = by_id(rows_of(reusing, "densities", iteration))
        policy = policy_of(experiment, iteration)
        grid = grid_of(policy, reusing.config)
        back = [row for row in rows_of(reusing, "plans", iteration) if row["role"] == "reused"]
        assert {row["trajectory_id"] for row in back} == set(judged)
        for row in back:
            states = read_prefix(reusing.store.directory, row, 3)[None]
            text = reusing.prompt_of[row["prompt_id"]].text
            stored = Stored([text], states, [row["behaviour_logprob"]], [row["noise_seeds"]])
            golden = evaluate(policy, stored, grid)
            tolerance = 2e-6 * elements(policy)
            assert judged[row["trajectory_id"]]["old_logprob"] == row["old_logprob"]
            np.testing.assert_allclose(row["old_logprob"], golden.logprob[0].numpy(), atol=tolerance)
            np.testing.assert_allclose(row["path_variance"], golden.path_variance[0].numpy(), rtol=1e-3, atol=1e-6)
            # The policy has moved since: by much more than rounding.
            moved = np.abs(np.array(row["old_logprob"]) - row["behaviour_logprob"][:3])
            assert moved.max() > 100 * tolerance
            log_w = np.sum(row["old_logprob"]) - np.sum(row["behaviour_logprob"][:3])
            assert row["importance_weight"] == pytest.approx(math.exp(log_w), rel=1e-6)
            assert row["train_steps"] == [0, 1, 2]


def test_reused_members_are_trained_and_told_of(reusing: Experiment) -> None:
    plan, told = by_id(rows_of(reusing, "plans", 2)), by_id(rows_of(reusing, "updates", 2))
    back = [row for row in told.values() if row["role"] == "reused"]
    assert back
    for row in back:
        assert row["path_variance"] == plan[row["trajectory_id"]]["path_variance"]
        assert (row["age"], row["train_steps"]) == (1, [0, 1, 2])
        assert row["loss"] != 0
        # One optimizer step, hence at the old policy itself: its own density stands in the denominator.
        assert row["ratio"] == pytest.approx([1.0] * 3, abs=1e-5)


def test_reuse_is_done_once_and_the_first_iteration_has_nothing_to_reuse(reusing: Experiment) -> None:
    assert rows_of(reusing, "densities", 0) == []
    assert len(reusing.store.files("densities")) == 3
    files = {str(p): p.read_bytes() for p in Path(reusing.store.directory.url).rglob("*") if p.is_file()}
    for iteration in range(3):
        assert rollout(reusing, iteration).detail == {"trajectories": 0, "continuations": 0, "reused": 0}
        assert select(reusing, iteration).done == 0
    assert {str(p): p.read_bytes() for p in Path(reusing.store.directory.url).rglob("*") if p.is_file()} == files


def test_reuse_of_two_iterations_with_a_floor_damage_and_without_densities(tmp_path: Path) -> None:
    changes = REUSE | {"replay": {"reuse_iterations": 2, "members": 0, "reuse_ess": 0.0}}
    experiment = created(tmp_path, small(**changes))
    iterate(experiment, 0)
    iterate(experiment, 1)
    [victim] = [row for row in rows_of(experiment, "plans", 0) if row["advantage"] != 0][:1]
    location = LatentLocation.of(victim)
    flipped(Path(experiment.store.directory.path(location.file)), location.offset + location.header + 3)
    experiment = reopened(experiment)
    rollout(experiment, 2)
    score(experiment, 2)
    assert experiment.store.quarantined() == {victim["trajectory_id"]}
    densities = Path(experiment.store.directory.path(f"{iteration_folder('densities', experiment.run_id, 2)}.parquet"))
    aside = densities.rename(tmp_path / "aside")
    with pytest.raises(StoreError, match="iteration 2 has not judged the groups it reuses: run `opgrpo rollout` first"):
        select(experiment, 2)
    assert not experiment.store.files("plans", iteration=2)
    aside.rename(densities)
    select(experiment, 2)
    back = by_id([row for row in rows_of(experiment, "plans", 2) if row["role"] == "reused"])
    assert victim["trajectory_id"] not in back
    assert {row["age"] for row in back.values()} == {1, 2}
    fresh = [
        row for i in (0, 1) for row in rows_of(experiment, "plans", i) if row["role"] != "reused" and row["advantage"] != 0
    ]
    assert sorted(back) == sorted({row["trajectory_id"] for row in fresh} - {victim["trajectory_id"]})
    # Each age is judged by the same policy, further from the older one.
    variance = {age: np.mean([sum(r["path_variance"]) for r in back.values() if r["age"] == age]) for age in (1, 2)}
    assert variance[2] > variance[1] > 0


def test_reuse_with_a_floor_trains_only_what_is_trusted(tmp_path: Path) -> None:
    changes = REUSE | {"replay": {"reuse_iterations": 1, "members": 0, "reuse_ess": 0.4}, "train": {}}
    experiment = created(tmp_path, small(**changes))
    iterate(experiment, 0)
    iterate(experiment, 1, trained=False)
    judged = by_id(rows_of(experiment, "densities", 1))
    back = by_id([row for row in rows_of(experiment, "plans", 1) if row["role"] == "reused"])
    lengths = {}
    for name, row in judged.items():
        total = np.cumsum(row["path_variance"])
        lengths[name] = int((np.exp(-total) >= 0.4).sum())
    assert set(back) == {name for name, length in lengths.items() if length}
    assert len(set(lengths.values())) > 1  # else this would say little
    for name, row in back.items():
        kept = lengths[name]
        assert row["train_steps"] == list(range(kept))
        assert row["path_variance"] == judged[name]["path_variance"][:kept]
        log_w = np.sum(row["old_logprob"][:kept]) - np.sum(row["behaviour_logprob"][:kept])
        assert row["importance_weight"] == pytest.approx(min(math.exp(log_w), 2.0), rel=1e-6)


def test_prefixes_are_read_back_as_they_were(reusing: Experiment) -> None:
    """Judged by the very policy that drew it, from its stored seeds, a trajectory has lambda 0 and its own densities."""
    row = next(row for row in rows_of(reusing, "trajectories", 2) if row["prefix_steps"] == 0)
    policy = policy_of(reopened(reusing), 2)
    grid = grid_of(policy, reusing.config)
    text = reusing.prompt_of[row["prompt_id"]].text
    stored = Stored([text], latents_of(reusing, row)[None], [row["behaviour_logprob"]], [row["noise_seeds"]])
    found = evaluate(policy, stored, grid)
    assert float(found.path_variance.max()) < 1e-4
    np.testing.assert_allclose(found.logprob[0].numpy(), row["behaviour_logprob"], atol=2e-6 * 72)
    assert sampler.noise(row["seed"], 0, policy.latent_shape).shape == policy.latent_shape
