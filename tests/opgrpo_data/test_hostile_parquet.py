"""Parquet made to harm: bombs, lies, mutations. Refused in one line, before memory fills up."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opgrpo_data import bounds, thrift
from opgrpo_data.errors import StoreError
from opgrpo_data.io import Directory
from opgrpo_data.schema import table_of, to_parquet
from opgrpo_data.seal import MARK
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder, overwrite, records, reward_row, rewards
from tests.opgrpo_data.hostile import BOMBS, one_line, parquet, refusal, small_store

ROOT = Path(__file__).parents[2]
MEMORY = 3 * 2**30
MEMORY_STORE = Store.create("memory://hostile")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """See small_store."""
    return small_store(str(tmp_path / "store"))


READ_ALL = f"""
import resource, sys
from pathlib import Path
from opgrpo_data.store import Store
store = Store.create("memory://bombs")
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
for path in sys.argv[1:]:
    try:
        print(store.parse("trajectories", "bomb", Path(path).read_bytes()).num_rows, "rows")
    except ValueError as error:
        print(type(error).__name__, error)
"""


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    for number, make in enumerate(BOMBS.values()):
        Path(tmp_path, f"{number}.parquet").write_bytes(make())
    files = sorted(map(str, tmp_path.iterdir()))
    assert all(Path(file).stat().st_size < 2**21 for file in files)
    done = subprocess.run([sys.executable, "-c", READ_ALL, *files], capture_output=True, text=True, timeout=100, cwd=ROOT)
    said = done.stdout.splitlines()
    assert len(said) == len(BOMBS), done.stderr
    for line in said:
        assert line.startswith("StoreError bomb is damaged (it would decode to "), line
        assert line.endswith(f"bytes, {bounds.DECODED_BYTES} at most are read): restore it from a copy")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_is_harmless_is_read_however_it_was_written(version: str, compression: str, dictionary: bool) -> None:
    """Values, nulls, lists and empty lists over many pages."""
    values = pa.array([[1.0, None, 3.0], [], None, [4.0]] * 200)
    data = parquet(values, data_page_version=version, compression=compression, use_dictionary=dictionary, data_page_size=100)
    assert bounds.read_bounded(data, ["sigmas", "absent"])["sigmas"].to_pylist() == values.to_pylist()
    assert bounds.read_bounded(data, []).num_columns == 0


def test_the_bound_counts_what_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = parquet(pa.array(["x" * 1000, "y"] * 500), "trajectory_id")
    monkeypatch.setattr(bounds, "DECODED_BYTES", 600_000)
    assert bounds.read_bounded(texts, ["trajectory_id"]).num_rows == 1000
    assert bounds.read_bounded(texts, ["iteration"]).num_columns == 0  # what is not read is not counted
    monkeypatch.setattr(bounds, "DECODED_BYTES", 500 * 1001 - 1)
    with pytest.raises(ValueError, match="it would decode to 500500 bytes, 500499 at most are read"):
        bounds.read_bounded(texts, ["trajectory_id"])


def test_odd_tables_are_refused(store: Store) -> None:
    path = "rewards/reward=taste/run=run-0/iter=000000/00001.v1.000.parquet"
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["trajectory_id", "trajectory_id"])
    bad_text = pa.table(
        {
            "trajectory_id": pa.Array.from_buffers(
                pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
            )
        }
    )
    nested = pa.table({"value": [{"a": {"b": [1]}}], "trajectory_id": ["a"]})
    huge = pa.table(
        {"trajectory_id": ["a"], "value": [1e308], "detail": ["[" * 10**5], "version": pa.array([2**63], pa.uint64())}
    )
    for table, message in (
        (twice, "it has a column twice"),
        (bad_text, "Invalid UTF8"),
        (nested, "Unsupported cast|Function 'cast'"),
    ):
        overwrite(store.directory, path, to_parquet(table))
        with pytest.raises(StoreError, match=rf"00001\.v1\.000\.parquet is damaged \(.*({message})") as caught:
            store.read_tables("rewards", [path])
        assert one_line(caught.value)
    overwrite(store.directory, path, to_parquet(huge))
    assert store.read_tables("rewards", [path])["version"].to_pylist() == ["9223372036854775808"]


UNSEALED = to_parquet(table_of([reward_row("t0", 0.5), reward_row("t1", None, error="no")], rewards({}).schema)).replace(
    MARK, bytes(len(MARK))
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(UNSEALED) - 1), st.integers(0, 3), st.binary(min_size=1, max_size=6)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_parquet_is_a_table_or_refused(changes: list[tuple[int, int, bytes]]) -> None:
    """Without its seal, which would find all of this at once."""
    data = bytearray(UNSEALED)
    for place, how, new in changes:
        if how == 0:
            data[place : place + len(new)] = new
        elif how == 1:
            data[place:place] = new
        else:
            del data[place : place + how * len(new)]
    said = refusal(lambda: MEMORY_STORE.parse("rewards", "rewards/x", bytes(data)))
    assert said is None or (said.startswith("rewards/x is damaged (") and one_line(said))


@given(data=st.binary(max_size=200))
def test_thrift_ends_whatever_it_is_given(data: bytes) -> None:
    try:
        _, end = thrift.struct(data, 0, len(data), {number: {1: {1: {}}} for number in range(0, 20, 2)})
    except ValueError:
        return
    assert 0 < end <= len(data)


def _written() -> tuple[bytes, pa.Table]:
    directory = Directory("memory://hostile-shard")
    write_shard(directory, folder(), "00000", records(2))
    data = directory.read(f"{folder()}/00000.parquet")
    return data, MEMORY_STORE.parse("trajectories", "trajectories/x", data)


SEALED, SOUND = _written()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_indexes_reach_no_reader_as_other_data(seed: int) -> None:
    """Sealed indexes: whatever byte changes, nothing is read."""
    rng = random.Random(seed)
    data, changed = bytearray(SEALED), []
    for _ in range(rng.choice([1, 1, 3])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if bytes(data) != SEALED:
        said = refusal(lambda: changed.append(MEMORY_STORE.parse("trajectories", "trajectories/x", bytes(data))))
        assert said is None or one_line(said)
    assert all(table.equals(SOUND) for table in changed)
