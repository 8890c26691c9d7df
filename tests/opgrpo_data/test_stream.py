"""The stream: batches are what the plan says, in its order, verified; its thread neither hangs nor stays behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from opgrpo_data.places.files import Range
from opgrpo_data.reading import read_latents
from opgrpo_data.schema import PLANS, table_of
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from opgrpo_data.stream import RING, Batch, stream
from tests.opgrpo_data import factories
from tests.opgrpo_data.factories import folder, plan_rule, records, rewards, shard_rows, trajectories

COUNT, STEPS = 12, 4
TWO_LATENTS = st.tuples(st.integers(0, STEPS), st.integers(0, STEPS))


def kept(batches: Iterable[Batch]) -> list[Batch]:
    """All batches, with latents of their own: a stream's lie in buffers that are used again."""
    return [replace(batch, latents=[latents.copy() for latents in batch.latents]) for batch in batches]


class Counting(Directory):
    """Counts the bytes of each range that is asked for."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[int] = []

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> Sequence[int]:
        self.asked += [wanted.length for wanted in ranges]
        return super().read_ranges(ranges, into)


@pytest.fixture(params=[1, 2**24], ids=["a batch a buffer", "many batches a buffer"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are read together: less than any batch, and more than any plan here."""
    monkeypatch.setattr("opgrpo_data.stream.WINDOW_BYTES", request.param)


def readers() -> list[threading.Thread]:
    """Reader threads that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("opgrpo-stream")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Twelve trajectories of four steps in two shards."""
    made = Store.create(str(tmp_path))
    members = records(COUNT, steps=STEPS)
    write_shard(made.directory, folder(), "00000", members[:7])
    write_shard(made.directory, folder(), "00001", members[7:])
    return made


def plan_for(store: Store, **rule: Any) -> pa.Table:
    """A plan over all that the store holds: two optimizer steps, microbatches of four, all steps."""
    rows = shard_rows(store)
    values = rewards({row["trajectory_id"]: float(i) for i, row in enumerate(rows)})
    return factories.plan(trajectories(rows), values, plan_rule(**{"optimizer_steps": 2, "microbatch": 4} | rule))


def agrees(batch: Batch, rows: list[dict[str, Any]], directory: Directory) -> bool:
    """Whether a batch holds these rows, and for each what a direct read of its latents gives."""
    direct = [read_latents(directory, LatentLocation.of(row), row["first_latent"], row["last_latent"]) for row in rows]
    same = [a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(batch.latents, direct, strict=True)]
    return batch.rows == rows and batch.damaged == [] and all(same)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.usefixtures("windows")
def test_batches_are_the_plan_in_its_order(store: Store, window: int | None) -> None:
    plan = plan_for(store, window=window)
    batches = kept(stream(store.directory, plan))
    assert [(batch.optimizer_step, batch.microstep) for batch in batches] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row for batch in batches for row in batch.rows] == plan.to_pylist()
    assert [len(batch.rows) for batch in batches] == [4, 2, 4, 2]
    for batch in batches:
        assert agrees(batch, batch.rows, store.directory)
        needed = [(0, max(row["train_steps"]) + 1) for row in batch.rows]
        assert [(row["first_latent"], row["last_latent"]) for row in batch.rows] == needed
        assert {latents.shape for latents in batch.latents} == {((window or STEPS) + 1, 2, 2, 2)}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_plan_streams_as_its_rows_grouped(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rows in any order, ranks mixed, latents from any to any: each rank gets its own rows, grouped and in order."""
    place = tmp_path_factory.getbasetemp() / "any-plan"
    store = Store.create(str(place))
    write_shard(store.directory, folder(), "00000", records(6, steps=STEPS))
    base = plan_for(store).to_pylist()
    rows = [
        row
        | {
            "optimizer_step": data.draw(st.integers(0, 2)),
            "microstep": data.draw(st.integers(0, 2)),
            "rank": data.draw(st.integers(0, 1)),
            **dict(zip(("first_latent", "last_latent"), sorted(data.draw(TWO_LATENTS)), strict=True)),
        }
        for row in base
    ]
    for rank in (0, 1, 2):
        with patch("opgrpo_data.stream.WINDOW_BYTES", data.draw(st.sampled_from([1, 300, 10**6]))):
            batches = kept(stream(store.directory, table_of(rows, PLANS), rank))
        mine = [row for row in rows if row["rank"] == rank]
        keys = sorted({(row["optimizer_step"], row["microstep"]) for row in mine})
        assert [(batch.optimizer_step, batch.microstep) for batch in batches] == keys
        for batch, key in zip(batches, keys, strict=True):
            expected = [row for row in mine if (row["optimizer_step"], row["microstep"]) == key]
            assert agrees(batch, expected, store.directory)


def test_an_empty_plan_has_no_batches(store: Store) -> None:
    assert list(stream(store.directory, PLANS.empty_table())) == []
    assert list(stream(store.directory, plan_for(store), rank=1)) == []
    assert readers() == []


def test_only_the_bytes_that_training_needs_are_read(store: Store) -> None:
    plan = plan_for(store, window=2)
    counting = Counting(store.directory.url)
    list(stream(counting, plan))
    assert counting.asked == [3 * 2 * 2 * 2 * 4] * COUNT  # x_0, x_1 and the successor x_2


def damage(store: Store, trajectory_id: str, latent: int) -> None:
    """Flip a bit of one latent on disk."""
    [row] = [row for row in shard_rows(store) if row["trajectory_id"] == trajectory_id]
    location = LatentLocation.of(row)
    path = Path(store.directory.path(location.file))
    content = bytearray(path.read_bytes())
    content[location.offset + location.header + latent * location.latent_bytes] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("windows")
def test_damaged_rows_are_reported_and_left_out_and_the_others_stay(store: Store) -> None:
    for trajectory_id, latent in (("t3", 0), ("t9", STEPS)):
        damage(store, trajectory_id, latent)
    plan = plan_for(store)
    batches = kept(stream(store.directory, plan))
    damaged = [found for batch in batches for found in batch.damaged]
    assert sorted(name for name, _ in damaged) == ["t3", "t9"]
    for name, error in damaged:
        [row] = [row for row in plan.to_pylist() if row["trajectory_id"] == name]
        k = 0 if name == "t3" else STEPS
        assert (error.file, error.member) == (row["latents_file"], f"{name}.latents.npy latent {k}")
        assert error.expected == row["latents_crc32"][k] != error.found
    rows = [row for batch in batches for row in batch.rows]
    assert rows == [row for row in plan.to_pylist() if row["trajectory_id"] not in ("t3", "t9")]
    for batch in batches:
        assert len(batch.latents) == len(batch.rows)
        direct = [read_latents(store.directory, LatentLocation.of(row), 0, STEPS) for row in batch.rows]
        assert [array.tobytes() for array in batch.latents] == [array.tobytes() for array in direct]


def test_damage_behind_the_trained_steps_does_not_matter(store: Store) -> None:
    damage(store, "t3", 3)
    assert [batch.damaged for batch in stream(store.directory, plan_for(store, window=2))] == [[]] * 4


def test_a_batch_of_damaged_rows_only_is_still_a_batch(store: Store) -> None:
    for i in range(COUNT):
        damage(store, f"t{i}", 0)
    batches = list(stream(store.directory, plan_for(store)))
    assert [(len(batch.rows), len(batch.latents)) for batch in batches] == [(0, 0)] * 4
    assert sum(len(batch.damaged) for batch in batches) == COUNT


def test_a_missing_file_is_damage_of_its_rows_alone(store: Store) -> None:
    rows = plan_for(store).to_pylist()
    lost = [row | {"latents_file": "lost.tar"} if i == 7 else row for i, row in enumerate(rows)]
    batches = kept(stream(store.directory, table_of(lost, PLANS)))
    [(name, error)] = [found for batch in batches for found in batch.damaged]
    assert (name, error.reason, error.file) == (rows[7]["trajectory_id"], "missing", "lost.tar")
    assert [row for batch in batches for row in batch.rows] == rows[:7] + rows[8:]


def test_a_plan_that_contradicts_itself_or_asks_for_too_much_is_refused_at_once(store: Store) -> None:
    rows = plan_for(store).to_pylist()
    with pytest.raises(StoreError, match="contradicts itself"):
        next(stream(store.directory, table_of([*rows[:-1], rows[-1] | {"latents_length": 1}], PLANS)))
    with pytest.raises(IndexError, match=r"latents 0\.\.10 of t\d+: it has 5"):
        next(stream(store.directory, table_of([*rows[:-1], rows[-1] | {"last_latent": 10}], PLANS)))
    assert readers() == []


def test_an_error_of_the_thread_is_raised_where_its_batch_was_due(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that leads out of the store is an attack, not damage: nothing is left out quietly."""
    monkeypatch.setattr("opgrpo_data.stream.WINDOW_BYTES", 1)
    rows = plan_for(store).to_pylist()
    lost = [row | {"latents_file": "../lost.tar"} if row["optimizer_step"] == 1 else row for row in rows]
    batches = stream(store.directory, table_of(lost, PLANS))
    assert [next(batches).microstep for _ in range(2)] == [0, 1]
    with pytest.raises(StoreError, match=r"path '\.\./lost\.tar' leads out of"):
        next(batches)
    assert readers() == []


def test_the_rest_of_a_plan_is_the_rest_of_its_stream(store: Store) -> None:
    plan = plan_for(store)
    whole = kept(stream(store.directory, plan))
    rest = kept(stream(store.directory, plan.slice(6)))
    assert [batch.optimizer_step for batch in rest] == [1, 1]
    for again, batch in zip(rest, whole[2:], strict=True):
        assert again.rows == batch.rows
        assert agrees(again, batch.rows, store.directory)


@pytest.mark.parametrize("taken", [1, 2])
def test_an_abandoned_stream_leaves_no_thread_behind(store: Store, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opgrpo_data.stream.WINDOW_BYTES", 1)
    batches = stream(store.directory, plan_for(store, microbatch=1))  # twelve buffers: the reader waits when we leave
    for _ in range(taken):
        next(batches)
    assert 1 <= len(readers()) < RING
    began = time.perf_counter()
    batches.close()  # type: ignore[attr-defined]  # what leaving a `for` loop does
    assert time.perf_counter() - began < 5
    assert readers() == []


def test_a_consumer_that_fails_leaves_no_thread_behind(store: Store) -> None:
    def train() -> None:
        for _ in stream(store.directory, plan_for(store, microbatch=1)):
            raise RuntimeError("the loss is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert readers() == []


def test_the_reader_stays_within_the_ring(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: of RING buffers one is being used, and the reader waits when it has filled the others."""
    monkeypatch.setattr("opgrpo_data.stream.WINDOW_BYTES", 1)
    counting = Counting(store.directory.url)
    batches = stream(counting, plan_for(store, microbatch=1))
    for taken in (1, 2, 3):
        next(batches)
        deadline = time.perf_counter() + 5
        while len(counting.asked) < RING - 1 + taken and time.perf_counter() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(counting.asked) == RING - 1 + taken
    assert len(list(batches)) == COUNT - 3
    assert len(counting.asked) == COUNT


def test_the_buffers_are_few_begin_at_a_page_and_are_used_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opgrpo_data.stream.WINDOW_BYTES", 1)
    plan = plan_for(store, microbatch=1)
    places = [batch.latents[0].__array_interface__["data"][0] for batch in stream(store.directory, plan)]
    assert len(places) == COUNT
    assert len(set(places)) == RING
    assert all(place % 4096 == 0 for place in places)


def test_a_batch_stays_as_it_is_while_others_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opgrpo_data.stream.WINDOW_BYTES", 1)
    for batch in stream(store.directory, plan_for(store, microbatch=1)):
        copy = [latents.copy() for latents in batch.latents]
        time.sleep(0.02)  # the reader has filled every other buffer by now
        assert agrees(replace(batch, latents=copy), batch.rows, store.directory)
        assert agrees(batch, batch.rows, store.directory)
