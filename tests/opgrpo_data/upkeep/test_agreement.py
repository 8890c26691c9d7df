"""Files that are each whole, and yet cannot stand beside each other: gone, swapped, or wrong when they were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from opgrpo_data.io import Directory
from opgrpo_data.schema import table_of, to_parquet
from opgrpo_data.seal import read_json, sealed_json
from opgrpo_data.shards import write_shard
from opgrpo_data.store import TABLES, Store
from opgrpo_data.upkeep.verify import verify
from tests.opgrpo_data.factories import RUN, overwrite, reward_row, rewards
from tests.opgrpo_data.upkeep.whole import files_of, iterate, member, whole_store, with_digest

Row = dict[str, Any]
FIRST, SECOND = (f"run={RUN}/iter={iteration:06d}" for iteration in (0, 1))
INDEX = f"trajectories/{FIRST}/00000.parquet"
REWARDS = f"rewards/reward=taste/{FIRST}/00000.v1.000.parquet"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a whole store of two iterations. Do not change them."""
    return files_of(whole_store(str(tmp_path_factory.mktemp("whole") / "store")))


@pytest.fixture
def store(written: dict[str, bytes], tmp_path: Path) -> Store:
    """A store of one's own, to be spoilt."""
    for path, content in written.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return Store.open(str(tmp_path))


def found(store: Store) -> list[tuple[str, str]]:
    """Path and problem of each finding."""
    return [(finding.path, finding.problem) for finding in verify(store, deep=False).findings]


def rewrite(store: Store, path: str, change: Callable[[Row], Row]) -> None:
    """Replace a table by one with changed rows, sealed as any."""
    kind = path.partition("/")[0]
    rows = store.read_tables(kind, [path]).to_pylist()
    overwrite(store.directory, path, to_parquet(table_of([change(row) for row in rows], TABLES[kind].schema)))


def ids_of(store: Store, path: str = INDEX) -> list[str]:
    """Ids of the trajectories of an index, sorted."""
    names: list[str] = sorted(store.read_tables("trajectories", [path])["trajectory_id"].to_pylist())
    return names


# -- gone ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "where", "problem"),
    [
        (f"updates/{FIRST}.parquet", f"updates/{FIRST}.parquet", f"it is gone: run {RUN} is trained to iteration 1"),
        (f"plans/{FIRST}.parquet", f"plans/{FIRST}.parquet", f"it is gone: run {RUN} is trained to iteration 1"),
        (f"plans/{SECOND}.parquet", f"plans/{SECOND}.parquet", f"it is gone: run {RUN} is trained to iteration 1"),
        (f"buffers/{SECOND}.parquet", f"buffers/{SECOND}.parquet", f"it is gone: run {RUN} is trained to iteration 1"),
        (INDEX, f"trajectories/{FIRST}", f"it is gone: run {RUN} is trained to iteration 1"),
        (INDEX, REWARDS, "the index of its shard is gone"),
        (REWARDS, INDEX, "it holds trajectories without a reward that are planned (2, for example {first})"),
        (
            REWARDS,
            f"plans/{FIRST}.parquet",
            "it has rewards that no file of rewards/ has (of 2 trajectories, for example {first})",
        ),
        (f"runs/{RUN}.json", f"runs/{RUN}.json", "it is gone: there are 6 of its buffers, plans, updates"),
        ("policies/policy-0/policy.json", INDEX, "it names policy policy-0, which is not registered"),
        ("policies/new/policy.json", f"updates/{SECOND}.parquet", "it names policy new, which is not registered"),
    ],
)
def test_a_file_that_is_gone(store: Store, path: str, where: str, problem: str) -> None:
    first = ids_of(store)[0]
    store.directory.remove(path)
    assert (where, problem.format(first=first)) in found(store)


def test_prompts_that_are_gone(store: Store) -> None:
    [path] = store.files("prompts")
    prompt = store.read_tables("prompts", [path])["prompt_id"][0].as_py()
    store.directory.remove(path)
    told = found(store)
    assert (f"runs/{RUN}.json", f"it speaks of {path}, which is not there") in told
    assert (INDEX, f"it holds trajectories of prompts that are not there (2, for example of {prompt})") in told


def test_the_newest_training_state(store: Store) -> None:
    """Gone while an older one is kept. Who removes all of a run's, for the room they take, knows that it ends there."""
    newest = f"states/run={RUN}/iter=000002/new.safetensors"
    older = f"states/run={RUN}/iter=000001/new.safetensors"
    store.directory.remove(newest)
    assert found(store) == [(newest, "it is gone: the run cannot go on without its newest training state")]
    store.directory.remove(older)
    assert found(store) == []


def test_an_offline_run_draws_nothing(store: Store) -> None:
    """It has neither trajectories nor buffers of its own."""
    document = {"config": {"name": "o", "seed": 0, "algorithm": "offline"}, "command": [], "software": {}}
    store.add_run("o", document)
    for kind in ("plans", "updates"):
        rows = store.read_tables(kind, [f"{kind}/{FIRST}.parquet"]).to_pylist()
        table = table_of([row | {"run_id": "o"} for row in rows], TABLES[kind].schema)
        store.publish_table(f"{kind}/run=o/iter=000000.parquet", table)
    assert found(store) == []
    store.directory.remove("plans/run=o/iter=000000.parquet")
    assert found(store) == [("plans/run=o/iter=000000.parquet", "it is gone: run o is trained to iteration 0")]


# -- swapped -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trajectories", "rewards", "buffers", "plans", "updates"])
def test_two_files_of_one_kind_swapped(store: Store, kind: str) -> None:
    paths = store.files(kind)
    contents = [store.directory.read(path) for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        overwrite(store.directory, path, content)
    told = found(store)
    if kind == "rewards":  # that they are of an iteration only their names tell
        problem = f"it judges trajectories that its shard does not have (2, for example {ids_of(store)[0]})"
        assert (paths[1], problem) in told
    else:
        assert (paths[0], "it holds rows of iteration '1' in the place of 0") in told
        assert (paths[1], "it holds rows of iteration '0' in the place of 1") in told


@pytest.mark.parametrize(
    ("path", "column", "problem"),
    [
        (INDEX.replace("/00000", "/00007"), "shard", "it holds rows of shard '00000' in the place of '00007'"),
        (INDEX.replace(RUN, "other"), "run", f"it holds rows of run_id '{RUN}' in the place of 'other'"),
        (REWARDS.replace("taste", "smell"), "reward", "it holds rows of reward 'taste' in the place of 'smell'"),
        (REWARDS.replace(".v1.", ".v2."), "version", "it holds rows of version '1' under the name 00000.v2.000"),
        ("prompts/train-0123456789abcdef.parquet", "prompts", "it holds the prompts of {prompts}"),
    ],
)
def test_a_file_under_another_name(store: Store, path: str, column: str, problem: str) -> None:
    [prompts] = store.files("prompts")
    source = {"shard": INDEX, "run": INDEX, "prompts": prompts}.get(column, REWARDS)
    store.directory.publish(path, store.directory.read(source))
    assert (path, problem.format(prompts=prompts)) in found(store)


def test_a_prompt_that_is_not_what_its_id_says(store: Store) -> None:
    [path] = store.files("prompts")
    rewrite(store, path, lambda row: row | {"text": "a blue square"})
    [(where, problem)] = found(store)
    assert where == path
    assert "is not what its id says" in problem


def test_weights_of_another_policy(store: Store) -> None:
    path, meant = "policies/mean/weights.safetensors", "policies/other/weights.safetensors"
    overwrite(store.directory, path, with_digest({}, meant))
    assert found(store) == [(path, f"it is damaged: it is another file, that of {meant}")]
    overwrite(store.directory, path, with_digest({}, path))
    assert found(store) == []


# -- wrong when written --------------------------------------------------------------------------------------------------


def test_rewards_that_cannot_be(store: Store) -> None:
    names = ids_of(store)
    again = REWARDS.replace(".000.", ".001.")
    store.publish_table(again, rewards([reward_row(names[0], 0.5), reward_row("stranger", 0.5)]))
    assert sorted(found(store)) == [
        (again, f"it judges trajectories that have a value of taste 1 already (1, for example {names[0]})"),
        (again, "it judges trajectories that its shard does not have (1, for example stranger)"),
    ]


def test_a_second_try_after_an_error_is_right(store: Store) -> None:
    names = ids_of(store)
    failed = rewards([reward_row(name, None, version="2", error="no") for name in names])
    store.publish_table(REWARDS.replace(".v1.000.", ".v2.000."), failed)
    judged = rewards([reward_row(name, 1.0, version="2") for name in names])
    store.publish_table(REWARDS.replace(".v1.000.", ".v2.001."), judged)
    assert found(store) == []


def test_a_plan_of_another_reward(store: Store) -> None:
    """Other rewards of its trajectories do not stand in for the one that it was made of."""
    other = rewards([reward_row(name, 7.0, reward="smell") for name in ids_of(store)])
    store.publish_table(REWARDS.replace("taste", "smell"), other)
    assert found(store) == []
    store.directory.remove(REWARDS)
    told = dict(found(store))
    assert told.keys() == {f"plans/{FIRST}.parquet", f"buffers/{FIRST}.parquet", f"buffers/{SECOND}.parquet"}
    assert told[f"plans/{FIRST}.parquet"].startswith("it has rewards that no file of rewards/ has (of 2 trajectories,")


def test_what_a_run_began_with(store: Store) -> None:
    path, lost = f"runs/{RUN}.json", "plans/run=lost-offline/iter=000000.parquet"
    document = read_json(store.directory.read(path)) | {"offline_selection": lost}
    overwrite(store.directory, path, sealed_json(document))
    assert found(store) == [(path, f"it speaks of {lost}, which is not there")]


@pytest.mark.parametrize("kind", ["plans", "buffers"])
def test_latents_that_would_lie_elsewhere(store: Store, kind: str) -> None:
    path = f"{kind}/{FIRST}.parquet"
    rewrite(store, path, lambda row: row | {"latents_offset": row["latents_offset"] + 512})
    [(where, problem)] = found(store)
    assert where == path
    assert problem.startswith("it says that latents lie where their index does not say so (")


def test_updates_of_what_was_not_planned(store: Store) -> None:
    other = ids_of(store, INDEX.replace("000000", "000001"))[0]
    path = f"updates/{FIRST}.parquet"
    rewrite(store, path, lambda row: row | {"trajectory_id": other})
    assert found(store) == [(path, f"it trained trajectories that its plan does not have (1, for example {other})")]


def test_a_continuation_of_nothing(store: Store) -> None:
    rewrite(store, INDEX, lambda row: row | {"parent_id": "lost"})
    assert found(store) == [(INDEX, "it continues trajectories that no index has (2, for example lost)")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"behaviour_logprob": [0.0]}, "it does not have behaviour_logprob for each of its steps"),
        ({"noise_seeds": []}, "it does not have noise_seeds for each of its steps"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "it does not have a sigma before and after each of its steps"),
        ({"sigmas": [1.0, 0.5, 0.5, 0.0]}, "it does not have sigmas that go down to 0"),
        ({"sigmas": [1.0, 0.5, 0.2, 0.1]}, "it does not have sigmas that go down to 0"),
        ({"path_variance": [0.1]}, "it does not have a path_variance for each step of its prefix"),
        ({"prefix_steps": 4, "path_variance": [0.1] * 4}, "it does not have a prefix that is a part of it"),
        ({"old_logprob": [0.0, float("nan"), 0.0]}, "it does not have old_logprob that are numbers"),
        ({"transition_std": [0.0, float("inf"), 0.0]}, "it does not have transition_std that are numbers"),
    ],
)
def test_rows_that_no_sampler_makes(store: Store, change: Row, problem: str) -> None:
    first = store.read_tables("trajectories", [INDEX])["trajectory_id"][0].as_py()
    rewrite(store, INDEX, lambda row: row | change if row["trajectory_id"] == first else row)
    told = verify(store, deep=False).findings
    assert [(finding.path, finding.member, finding.problem) for finding in told] == [(INDEX, first, problem)]


def test_columns_that_an_import_does_not_know(store: Store) -> None:
    unknown = ("noise_seeds", "behaviour_logprob", "old_logprob", "transition_std", "path_variance", "sigmas", "prefix_steps")
    rewrite(store, INDEX, lambda row: row | dict.fromkeys(unknown))
    assert found(store) == []


# -- right ---------------------------------------------------------------------------------------------------------------


def test_what_was_imported_or_chosen_lies_set_apart(store: Store) -> None:
    """Before its run is registered, and with the rows of other runs."""
    buffer = store.read_tables("buffers", [f"buffers/{FIRST}.parquet"]).to_pylist()
    entries = [row | {"run_id": "mine", "iteration": -1} for row in buffer]
    store.publish_table("buffers/run=mine-imported/iter=000000.parquet", table_of(entries, TABLES["buffers"].schema))
    planned = store.read_tables("plans", [f"plans/{FIRST}.parquet"]).to_pylist()
    chosen = [row | {"run_id": "mine", "iteration": -1, "role": "stored"} for row in planned]
    store.publish_table("plans/run=mine-offline/iter=000000.parquet", table_of(chosen, TABLES["plans"].schema))
    write_shard(store.directory, "trajectories/run=imported/iter=000000", "00000", [member("elsewhere", 3, 0)])
    assert found(store) == []


def test_imported_tars_bring_no_policies(store: Store) -> None:
    """Nor prompts that had no note, nor the parents of what continues them."""
    place, drawn = f"trajectories/run={RUN}/iter=000007", member(RUN, 7, 0)
    row = {**drawn.row, "policy_id": "elsewhere", "prompt_id": "lost", "parent_id": "elsewhere"}
    write_shard(store.directory, place, "import-0123", [replace(drawn, row=row)])
    assert found(store) == []
    write_shard(store.directory, place, "00000", [replace(drawn, row=row | {"trajectory_id": "other"})])
    assert {path for path, _ in found(store)} == {f"{place}/00000.parquet"}
    assert len(found(store)) == 3


def test_a_store_that_is_written_meanwhile_agrees(store: Store) -> None:
    """Listings are not of one moment: here a whole iteration is written after each."""
    writer, numbers = Store(Directory(store.directory.root)), iter(range(2, 1000))
    listings = {name: getattr(store.directory, name) for name in ("entries", "list")}

    def listed_meanwhile(name: str) -> Callable[[str], Sequence[Any]]:
        def listed(where: str = "") -> Sequence[Any]:
            found: Sequence[Any] = listings[name](where)
            write()
            return found

        return listed

    def write() -> None:
        iterate(writer, next(numbers))

    place, hooked = store.directory, {name: listed_meanwhile(name) for name in listings}
    with patch.object(place, "entries", hooked["entries"]), patch.object(place, "list", hooked["list"]):
        assert found(store) == []
    assert found(store) == []
    assert len(store.files("updates")) > 20
