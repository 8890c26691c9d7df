"""The stream: batches are what the plan says, in its order, verified; its thread neither hangs nor stays behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from opgrpo_data.schema import PLANS, table_of
from opgrpo_data.shards import LatentLocation, read_latents, write_shard
from opgrpo_data.store import Store
from opgrpo_data.stream import PREFETCHED_BATCHES, Batch, stream
from tests.opgrpo_data import factories
from tests.opgrpo_data.factories import folder, plan_rule, records, rewards, shard_rows, trajectories

COUNT, STEPS = 12, 4
TWO_LATENTS = st.tuples(st.integers(0, STEPS), st.integers(0, STEPS))


def readers() -> list[threading.Thread]:
    """Reader threads that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == "opgrpo-stream"]


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
def test_batches_are_the_plan_in_its_order(store: Store, window: int | None) -> None:
    plan = plan_for(store, window=window)
    batches = list(stream(store.directory, plan))
    assert [(batch.optimizer_step, batch.microstep) for batch in batches] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row for batch in batches for row in batch.rows] == plan.to_pylist()
    assert [len(batch.rows) for batch in batches] == [4, 2, 4, 2]
    for batch in batches:
        assert agrees(batch, batch.rows, store.directory)
        needed = [(0, max(row["train_steps"]) + 1) for row in batch.rows]
        assert [(row["first_latent"], row["last_latent"]) for row in batch.rows] == needed
        assert {latents.shape for latents in batch.latents} == {((window or STEPS) + 1, 2, 2, 2)}


@settings(max_examples=20, deadline=None)
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
        batches = list(stream(store.directory, table_of(rows, PLANS), rank))
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
    asked: list[int] = []

    class Counting(Directory):
        def read_range(self, relative: str, offset: int, length: int) -> bytes:
            asked.append(length)
            return super().read_range(relative, offset, length)

    list(stream(Counting(store.directory.url), plan))
    assert asked == [3 * 2 * 2 * 2 * 4] * COUNT  # x_0, x_1 and the successor x_2


def damage(store: Store, trajectory_id: str, latent: int) -> None:
    """Flip a bit of one latent on disk."""
    [row] = [row for row in shard_rows(store) if row["trajectory_id"] == trajectory_id]
    location = LatentLocation.of(row)
    path = Path(store.directory.path(location.file))
    content = bytearray(path.read_bytes())
    content[location.offset + location.header + latent * location.latent_bytes] ^= 1
    path.write_bytes(content)


def test_damaged_rows_are_reported_and_left_out_and_the_others_stay(store: Store) -> None:
    for trajectory_id, latent in (("t3", 0), ("t9", STEPS)):
        damage(store, trajectory_id, latent)
    plan = plan_for(store)
    batches = list(stream(store.directory, plan))
    damaged = [found for batch in batches for found in batch.damaged]
    assert sorted(name for name, _ in damaged) == ["t3", "t9"]
    for name, error in damaged:
        [row] = [row for row in plan.to_pylist() if row["trajectory_id"] == name]
        k = 0 if name == "t3" else STEPS
        assert (error.file, error.member) == (row["latents_file"], f"{name}.latents.npy latent {k}")
        assert error.expected == row["latents_crc32"][k] != error.found
    kept = [row for batch in batches for row in batch.rows]
    assert kept == [row for row in plan.to_pylist() if row["trajectory_id"] not in ("t3", "t9")]
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


def test_errors_of_the_reader_are_raised_in_the_consumer(store: Store) -> None:
    plan = plan_for(store)
    rows = plan.to_pylist()
    lost = [row | {"latents_file": "trajectories/lost.tar"} if i == 7 else row for i, row in enumerate(rows)]
    seen: list[Batch] = []
    with pytest.raises(FileNotFoundError, match=r"lost\.tar"):
        seen.extend(stream(store.directory, table_of(lost, PLANS)))
    assert readers() == []
    contradicting = [row | {"latents_length": 1} for row in rows]
    with pytest.raises(StoreError, match="contradicts itself"):
        list(stream(store.directory, table_of(contradicting, PLANS)))
    with pytest.raises(IndexError, match=r"latents 0\.\.10 of t\d+: it has 5"):
        list(stream(store.directory, table_of([row | {"last_latent": 10} for row in rows], PLANS)))
    assert readers() == []


def test_batches_before_an_error_arrive(store: Store) -> None:
    rows = plan_for(store).to_pylist()
    lost = [row | {"latents_file": "lost.tar"} if row["optimizer_step"] == 1 else row for row in rows]
    batches = stream(store.directory, table_of(lost, PLANS))
    assert [next(batches).microstep for _ in range(2)] == [0, 1]
    with pytest.raises(FileNotFoundError, match=r"lost\.tar"):
        next(batches)


@pytest.mark.parametrize("taken", [1, 2])
def test_an_abandoned_stream_leaves_no_thread_behind(store: Store, taken: int) -> None:
    plan = plan_for(store, microbatch=1)  # twelve batches: the reader is blocked on a full queue when we leave
    batches = stream(store.directory, plan)
    for _ in range(taken):
        next(batches)
    assert len(readers()) == 1
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


def test_the_reader_stays_at_most_the_queue_ahead(store: Store) -> None:
    """Memory is bounded: with one batch taken, the queue's worth is ready and one more waits to enter it."""
    read: list[str] = []

    class Counting(Directory):
        def read_range(self, relative: str, offset: int, length: int) -> bytes:
            read.append(relative)
            return super().read_range(relative, offset, length)

    batches = stream(Counting(store.directory.url), plan_for(store, microbatch=1))
    next(batches)
    deadline = time.perf_counter() + 5
    while len(read) < 1 + PREFETCHED_BATCHES + 1 and time.perf_counter() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(read) == 1 + PREFETCHED_BATCHES + 1
    assert len(list(batches)) == COUNT - 1
    assert len(read) == COUNT
