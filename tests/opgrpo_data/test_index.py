"""The narrow table: whatever the order of commits, compactions and polls, it holds what the index files hold."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opgrpo_data import index, pieces, watch
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.ids import trajectory_id
from opgrpo_data.index import Index
from opgrpo_data.schema import DROPPED, table_of
from opgrpo_data.store import Store
from opgrpo_data.upkeep import compaction
from opgrpo_data.upkeep.compaction import compact
from opgrpo_data.watch import Watch
from tests.opgrpo_data.factories import RUN, folder, located_row, overwrite, reward_row, rewards, trajectories

EVERYTHING = 1_000_000
ODD_NAMES = ["short", "eleven-char", "twelve-chars", "UPPERCASE0123456789ABCDE", "a" * 24, "g" * 24, "é" * 6]


@contextmanager
def few_are_many() -> Iterator[None]:
    """So that small stores are worth a generation, and are read in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (compaction, pieces):
            patch.setattr(module, "MANY_FILES", 2)
        for module in (index, pieces):
            patch.setattr(module, "BATCH_ROWS", 3)
        patch.setattr(watch, "SETTLED_SECONDS", 0.01)
        yield


def commit(store: Store, shard: int, names: list[str], **changes: Any) -> str:
    """An index file of the trajectories `names`; returns its path."""
    iteration = changes.pop("iteration", shard // 2)
    prompts = changes.pop("prompts", ["p0"] * len(names))
    rows = [
        located_row(name, iteration=iteration, prompt_id=prompt, member_index=k, **changes)
        for k, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    ]
    path = f"{folder(iteration)}/{shard:05d}.parquet"
    store.publish_table(path, trajectories(rows))
    return path


def score(store: Store, shard: int, values: dict[str, float | None], reward: str = "taste", version: str = "1") -> str:
    """A reward file of a shard; returns its path. None: a failed sample."""
    rows = [
        reward_row(name, value, reward=reward, version=version, error="no picture" if value is None else None)
        for name, value in values.items()
    ]
    place = folder(shard // 2).replace("trajectories", f"rewards/reward={reward}")
    path = f"{place}/{shard:05d}.v{version}.000.parquet"
    store.publish_table(path, rewards(rows))
    return path


def drop(store: Store, index_file: str) -> str:
    path = f"dropped/{index_file.removeprefix('trajectories/')}"
    store.publish_table(path, table_of([{"index_file": index_file}], DROPPED))
    return path


def damaged(name: str) -> CorruptionError:
    return CorruptionError("x.tar", f"{name}.latents.npy latent 0", 5, None)


def taste(store: Store) -> Index:
    return Index(store, reward="taste", version="1")


def chosen(found: Index, **options: Any) -> list[str]:
    names: list[str] = found.best(**options)["trajectory_id"].to_pylist()
    return names


# -- by plain Python -----------------------------------------------------------------------------------------------------


def plain_entries(store: Store) -> list[dict[str, Any]]:
    """What may be chosen, by reading every index file."""
    values = {
        row["trajectory_id"]: row["value"]
        for row in store.read_tables("rewards", store.files("rewards")).to_pylist()
        if row["reward"] == "taste" and row["version"] == "1" and row["error"] is None and math.isfinite(row["value"])
    }
    entries = []
    for path in store.files("trajectories"):
        for row in store.read_tables("trajectories", [path]).to_pylist():
            name = row["trajectory_id"]
            if name in values and name not in store.quarantined() and path not in store.dropped_shards():
                picked = {key: row[key] for key in index.TRAJECTORY_COLUMNS}
                entries.append(picked | {"value": values[name], "index_file": path})
    return entries


def plain_best(
    entries: list[dict[str, Any]], members: int, iteration: int, decay: float, decay_form: str
) -> list[dict[str, Any]]:
    def decayed(entry: dict[str, Any]) -> float:
        age, value = iteration - entry["iteration"], entry["value"]
        if decay_form == "linear":
            return float(value - decay * age)
        return float(value * decay ** (-age if value < 0 else age))

    best: list[dict[str, Any]] = []
    for prompt in sorted({entry["prompt_id"] for entry in entries}):
        mine = [entry | {"decayed_reward": decayed(entry)} for entry in entries if entry["prompt_id"] == prompt]
        mine.sort(key=lambda e: (-e["decayed_reward"], -e["iteration"], e["member_index"], e["trajectory_id"]))
        best += mine[:members]
    return best


# -- best ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["disk", "memory://index-golden"])
def test_best_by_hand(url: str, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store") if url == "disk" else url)
    commit(store, 0, ["a", "b", "c"], iteration=0, prompts=["p0", "p0", "p1"])
    path = commit(store, 1, ["d", "e"], iteration=2, prompts=["p0", "p1"], prefix_steps=2)
    score(store, 0, {"a": 1.0, "b": 0.75, "c": -0.5})
    score(store, 1, {"d": 0.5, "e": -0.625})
    found = taste(store)
    assert len(found) == 5
    # Age 2 at decay 0.5: 1.0 -> 0.25, and -0.5 -> -2.
    assert found.best(iteration=2, decay=0.5).to_pylist() == [
        {"trajectory_id": "d", "prompt_id": "p0", "run_id": RUN, "iteration": 2, "member_index": 0, "prefix_steps": 2,
         "value": 0.5, "decayed_reward": 0.5, "index_file": path},
        {"trajectory_id": "e", "prompt_id": "p1", "run_id": RUN, "iteration": 2, "member_index": 1, "prefix_steps": 2,
         "value": -0.625, "decayed_reward": -0.625, "index_file": path},
    ]  # fmt: skip
    assert chosen(found, members=2, iteration=2, decay=0.5) == ["d", "a", "e", "c"]
    assert chosen(found) == ["a", "c"]
    assert found.best(iteration=2, decay=0.125, decay_form="linear")["decayed_reward"].to_pylist() == [0.75, -0.625]


def test_equals_are_ordered_as_the_replay_buffer_orders_them(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    commit(store, 0, ["y", "x"], iteration=0)
    commit(store, 1, ["z", "w", *ODD_NAMES], iteration=1)
    score(store, 0, dict.fromkeys(["y", "x", "z", "w", *ODD_NAMES], 1.0))
    assert chosen(taste(store), members=EVERYTHING) == ["z", "w", *ODD_NAMES, "y", "x"]


def test_ids_of_every_form_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    names = [*ODD_NAMES, *(trajectory_id("g", k) for k in range(20)), "0" * 24, "f" * 24]
    commit(store, 0, names)
    score(store, 0, {name: float(k) for k, name in enumerate(reversed(names))})
    found = taste(store)
    assert chosen(found, members=EVERYTHING) == names
    for name in names:
        store.quarantine(name, damaged(name)) if name.isascii() else None
    found.poll()
    assert chosen(found, members=EVERYTHING) == [name for name in names if not name.isascii()]


def test_values_that_are_no_numbers_never_win(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    names = ["nan", "inf", "-inf", "failed", "good", "unscored"]
    commit(store, 0, names)
    score(store, 0, {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "failed": None, "good": -3.0})
    score(store, 1, {"nan": 9.0}, version="2")
    score(store, 2, {"inf": 9.0}, reward="colour")
    assert chosen(taste(store), members=EVERYTHING) == ["good"]
    assert chosen(Index(store, reward="taste", version="2")) == ["nan"]
    assert chosen(Index(store, reward="colour", version="1")) == ["inf"]


def test_a_sample_that_is_scored_after_all_is_in(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    commit(store, 0, ["a"])
    score(store, 0, {"a": None})
    found = taste(store)
    assert (len(found), found.best().num_rows) == (0, 0)
    score(store, 1, {"a": 0.5})
    assert found.poll() == 1
    assert chosen(found) == ["a"]


def test_one_trajectory_counts_once(tmp_path: Path) -> None:
    """Two imports of one store at once, or two scorers."""
    store = Store.create(str(tmp_path / "store"))
    commit(store, 0, ["a", "b"])
    score(store, 0, {"a": 2.0, "b": 1.0})
    found = taste(store)
    commit(store, 1, ["a"])
    score(store, 1, {"a": 2.0})
    found.poll()
    for each in (found, taste(store)):
        assert chosen(each, members=2) == ["a", "b"]


def test_dropped_shards_and_quarantine_are_left_out_and_may_come_back(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    paths = [commit(store, k, [f"t{k}"]) for k in range(3)]
    score(store, 0, {"t0": 0.0, "t1": 1.0, "t2": 2.0})
    found = taste(store)
    announced = drop(store, paths[2])
    store.quarantine("t1", damaged("t1"))
    assert chosen(found) == ["t2"]  # until the next poll
    assert found.poll() == 0
    assert chosen(found, members=3) == chosen(taste(store), members=3) == ["t0"]
    store.directory.remove(announced)  # as `opgrpo gc` does where it was needed after all
    found.poll()
    assert chosen(found, members=3) == ["t2", "t0"]


def test_what_best_names_leads_to_whole_rows(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    for k in range(4):
        commit(store, k, [f"t{k}"], prompts=[f"p{k}"])
        score(store, k, {f"t{k}": 1.0})
    found = taste(store).best().slice(1, 2)
    rows = store.read_tables("trajectories", sorted(set(found["index_file"].to_pylist())))
    assert rows["trajectory_id"].to_pylist() == found["trajectory_id"].to_pylist() == ["t1", "t2"]


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    with pytest.raises(ValueError, match="members is 0: choose at least 1"):
        taste(store).best(members=0)
    with pytest.raises(ValueError, match="decay_form is 'cubic': choose multiplicative or linear"):
        taste(store).best(decay_form="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reward '\.\./\*' cannot be part of a path"):
        Index(store, reward="../*", version="1")


def test_a_damaged_index_fails_the_poll_and_loses_nothing(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    commit(store, 0, ["a"])
    score(store, 0, {"a": 1.0})
    found = taste(store)
    commit(store, 1, ["b"])
    path = score(store, 1, {"b": 2.0})
    whole = store.directory.read(path)
    overwrite(store.directory, path, whole[:-1])
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"{path} is damaged"):
            found.poll()
    assert chosen(found) == ["a"]
    overwrite(store.directory, path, whole)
    assert found.poll() == 2
    assert chosen(found) == ["b"]


# -- any interleaving ----------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, math.nan, math.inf, None])
STEPS = st.one_of(
    st.tuples(st.just("commit"), st.integers(0, 7)),
    st.tuples(st.just("score"), st.integers(0, 7), st.lists(VALUES, min_size=3, max_size=3)),
    st.tuples(st.just("other"), st.integers(0, 7)),
    st.tuples(st.sampled_from(["poll", "compact", "open"])),
    st.tuples(st.sampled_from(["quarantine", "drop", "keep"]), st.integers(0, 7)),
)


def apply(store: Store, found: Index, step: Any) -> Index:
    """One step of a history; returns the index that goes on."""
    kind, shard = step[0], step[1] if len(step) > 1 else 0
    names = [trajectory_id(str(shard), 0), f"t{shard}-1", f"t{shard}-2"]
    path = f"{folder(shard // 2)}/{shard:05d}.parquet"
    if kind == "commit":
        commit(store, shard, names, prompts=[f"p{shard % 2}", "p0", "p3"], prefix_steps=shard)
    elif kind == "score":
        score(store, shard, dict(zip(names, step[2], strict=True)))
    elif kind == "other":
        score(store, shard, dict.fromkeys(names, 7.0), version="2")
        score(store, shard, dict.fromkeys(names, 7.0), reward="colour")
    elif kind == "poll":
        found.poll()
    elif kind == "compact":
        compact(store)
    elif kind == "open":
        return taste(store)
    elif kind == "quarantine":
        store.quarantine(names[1], damaged(names[1]))
    elif kind == "drop":
        drop(store, path)
    else:
        store.directory.remove(f"dropped/{path.removeprefix('trajectories/')}")
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, max_size=25),
    members=st.sampled_from([1, 2, EVERYTHING]),
    decay=st.sampled_from([1.0, 0.5]),
    decay_form=st.sampled_from(["multiplicative", "linear"]),
)
def test_any_history_gives_what_all_index_files_give(steps: list[Any], members: int, decay: float, decay_form: Any) -> None:
    with few_are_many(), TemporaryDirectory() as place:
        store = Store.create(f"{place}/store")
        found = taste(store)
        for step in steps:
            found = apply(store, found, step)
        found.poll()
        entries = plain_entries(store)
        for each in (found, taste(store)):
            best = each.best(members, iteration=4, decay=decay, decay_form=decay_form)
            assert best.to_pylist() == plain_best(entries, members, 4, decay, decay_form)


# -- watching ------------------------------------------------------------------------------------------------------------


def test_a_settled_folder_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("opgrpo_data.watch.time.monotonic", lambda: clock[0])
    listed: list[str] = []
    real = os.listdir

    def listdir(path: str) -> list[str]:
        listed.append(path)
        return real(path)

    monkeypatch.setattr("opgrpo_data.watch.os.listdir", listdir)
    store = Store.create(str(tmp_path / "store"))
    first = commit(store, 0, ["a"])
    second = commit(store, 2, ["b"])
    seen = Watch(store, "trajectories")
    assert seen.pending() == [first, second]
    seen.take([first])
    assert seen.pending() == [second]
    assert len(listed) == 2 * 4  # trajectories/, the run, two iterations: not settled yet
    clock[0] += watch.SETTLED_SECONDS
    assert seen.pending() == [second]
    listed.clear()
    assert seen.pending() == [second]
    assert listed == []
    third = commit(store, 3, ["c"])
    assert seen.pending() == [second, third]
    assert listed == [store.directory.path(folder(1))]


def test_a_commit_within_the_tick_of_the_folders_clock_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits, one time of the folder: the listing between them must not count as complete."""
    clock = [1000.0]
    monkeypatch.setattr("opgrpo_data.watch.time.monotonic", lambda: clock[0])
    store = Store.create(str(tmp_path / "store"))
    place = Path(store.directory.path(folder(0)))
    first = commit(store, 0, ["a"])
    os.utime(place, ns=(0, 0))
    seen = Watch(store, "trajectories")
    assert seen.pending() == [first]
    second = commit(store, 1, ["b"])
    os.utime(place, ns=(0, 0))
    clock[0] += watch.SETTLED_SECONDS / 2
    assert seen.pending() == [first, second]


def test_a_filesystem_that_tells_no_times_is_listed_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("opgrpo_data.watch.time.monotonic", lambda: clock[0])
    store = Store.create(str(tmp_path / "store"))
    place = Path(store.directory.path(folder(0)))
    first = commit(store, 0, ["a"])
    os.utime(place, ns=(0, 0))
    seen = Watch(store, "trajectories")
    for _ in range(2):
        assert seen.pending() == [first]
        clock[0] += watch.SETTLED_SECONDS
    second = commit(store, 1, ["b"])
    os.utime(place, ns=(0, 0))
    assert seen.pending() == [first]
    clock[0] += watch.RELIST_SECONDS
    assert seen.pending() == [first, second]


def test_unfinished_files_and_strangers_are_passed_over(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    path = commit(store, 0, ["a"])
    place = Path(store.directory.path(folder(0)))
    for name in (".tmp-0.parquet", "00000.latents.tar", "note.txt"):
        (place / name).touch()
    (place.parent / "note.txt").touch()
    (place.parent / "iter=x").touch()
    assert Watch(store, "trajectories").pending() == [path]
    assert Watch(store, "rewards").pending() == []
