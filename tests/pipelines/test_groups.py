"""Which trajectories an iteration draws: exact composition, no repeats, nothing but a function of its inputs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.groups import prompts_of, shard_tasks
from pipelines.prompts import Prompt
from tests.pipelines.helpers import small


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {i}", {"index": i}) for i in range(count)]


@given(count=st.integers(1, 12), size=st.integers(1, 12), seed=st.integers(0, 5), laps=st.integers(1, 3))
@settings(deadline=None)
def test_a_lap_visits_each_prompt_at_most_once(count: int, size: int, seed: int, laps: int) -> None:
    prompts = _prompts(count)
    config = small(rollout={"prompts_per_iteration": size}, seed=seed)
    if size > count:
        with pytest.raises(ValueError, match=f"prompts_per_iteration is {size}, but there are only {count} training prompts"):
            prompts_of(config, prompts, 0, {})
        return
    per_lap = count // size
    for lap in range(laps):
        visited = [p.text for i in range(per_lap) for p in prompts_of(config, prompts, lap * per_lap + i, {})]
        assert len(visited) == per_lap * size
        assert len(set(visited)) == len(visited)


def test_laps_are_shuffled_anew_and_follow_the_seed() -> None:
    prompts = _prompts(8)
    config = small(rollout={"prompts_per_iteration": 8})
    laps = [[p.text for p in prompts_of(config, prompts, lap, {})] for lap in range(3)]
    assert laps[0] != laps[1] != laps[2]
    assert laps[0] == [p.text for p in prompts_of(config, prompts, 0, {})]
    assert laps[0] != [p.text for p in prompts_of(small(rollout={"prompts_per_iteration": 8}, seed=1), prompts, 0, {})]


@given(
    held=st.sets(st.integers(0, 5)),
    group_size=st.integers(2, 6),
    per_shard=st.integers(1, 4),
    iteration=st.integers(0, 4),
)
@settings(deadline=None)
def test_composition_is_exact(held: set[int], group_size: int, per_shard: int, iteration: int) -> None:
    prompts = _prompts(6)
    config = small(rollout={"prompts_per_iteration": 3, "group_size": group_size, "groups_per_shard": per_shard})
    buffer = {prompts[i].prompt_id: [{"trajectory_id": f"entry {i}"}] for i in held}
    tasks = shard_tasks(config, "run", prompts, iteration, buffer)
    chosen = prompts_of(config, prompts, iteration, buffer)
    assert [task.shard for task in tasks] == [f"{i:05d}" for i in range(-(-3 // per_shard))]
    assert all(len(task.members) == per_shard * group_size for task in tasks[:-1])
    members = [member for task in tasks for member in task.members]
    assert [m.prompt for m in members] == [prompt for prompt in chosen for _ in range(group_size)]
    for prompt in chosen:
        group = [m for m in members if m.prompt == prompt]
        assert [m.member_index for m in group] == list(range(group_size))
        assert len({m.group_id for m in group}) == 1
        parents = [m.parent for m in group if m.parent is not None]
        assert parents == buffer.get(prompt.prompt_id, [])
        assert all(m.parent is None for m in group[:-1])


def test_members_are_a_function_of_the_inputs_and_all_different() -> None:
    prompts, config = _prompts(4), small()
    once = [m for i in range(4) for task in shard_tasks(config, "run", prompts, i, {}) for m in task.members]
    again = [m for i in range(4) for task in shard_tasks(config, "run", prompts, i, {}) for m in task.members]
    assert once == again
    for field in ("trajectory_id", "seed"):
        assert max(Counter(getattr(m, field) for m in once).values()) == 1
    groups = Counter(m.group_id for m in once)
    assert set(groups.values()) == {4}
    assert len(groups) == 8


def test_seeds_follow_the_experiments_seed_and_not_its_name() -> None:
    prompts = _prompts(4)

    def seeds(name: str, seed: int) -> list[int]:
        config = small(name=name, seed=seed)
        return [m.seed for task in shard_tasks(config, config.run_id, prompts, 0, {}) for m in task.members]

    assert seeds("small", 0) == seeds("renamed", 0)
    assert not set(seeds("small", 0)) & set(seeds("small", 1))


def test_ids_follow_the_run() -> None:
    prompts, config = _prompts(4), small()
    one, other = ([m.trajectory_id for t in shard_tasks(config, run, prompts, 0, {}) for m in t.members] for run in ("a", "b"))
    assert not set(one) & set(other)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_initial_noise(shared: bool) -> None:
    config = small(rollout={"shared_initial_noise": shared})
    members = [m for task in shard_tasks(config, "run", _prompts(4), 0, {}) for m in task.members]
    per_group = [{m.initial_seed for m in members[i : i + 4]} for i in (0, 4)]
    assert [len(seeds) for seeds in per_group] == ([1, 1] if shared else [4, 4])
    assert not per_group[0] & per_group[1]
    if not shared:
        assert all(m.initial_seed == m.seed for m in members)
