"""Many trajectories at once: each is what was written, or told to be damaged, whatever happened to the others."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opgrpo_data import reading
from opgrpo_data.checksum import crc32
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import LARGEST_LATENT, NUMPY_DTYPES, LatentLocation, Locations, Spans
from opgrpo_data.reading import memory, read_latents, read_many
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder, located_row, random_latents, record, shard_rows, trajectories

Kind = tuple[tuple[int, ...], str]
KINDS: list[Kind] = [((2, 2, 2), "float32"), ((3, 5, 1), "float16"), ((2, 4, 4), "bfloat16"), ((7,), "float32")]
COUNT, STEPS = 24, 4


class Filled:
    """A store of COUNT trajectories t0, t1, ... of several shapes and dtypes in four shards; written: their latents."""

    def __init__(self, path: Path) -> None:
        self.directory = Store.create(str(path)).directory
        self.written: dict[str, NDArray[Any]] = {}
        for shard in range(4):
            records = []
            for i in range(shard * 6, shard * 6 + 6):
                shape, dtype = KINDS[i % len(KINDS)]
                self.written[f"t{i}"] = random_latents(i, STEPS, shape, dtype)
                records.append(record(f"t{i}", self.written[f"t{i}"], dtype=dtype))
            write_shard(self.directory, folder(), f"{shard:05d}", records)
        self.rows = shard_rows(Store(self.directory))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Read by all, changed by none."""
    return Filled(tmp_path_factory.mktemp("reading"))


def spans_of(rows: list[dict[str, Any]], first: list[int], last: list[int]) -> Spans:
    """Of rows."""
    return Spans.of(Locations.of_rows(rows), np.array(first, np.int64), np.array(last, np.int64))


def judged(directory: Directory, row: dict[str, Any], first: int, last: int) -> NDArray[Any] | tuple[str, int]:
    """What `read_many` should say, from a plain read of the whole file: latents, or reason and the first bad latent."""
    at = LatentLocation.of(row)
    path = Path(directory.path(at.file))
    if not path.exists():
        return "missing", first
    content = path.read_bytes()
    for k in range(first, last + 1):
        begin = at.offset + at.header + k * at.latent_bytes
        piece = content[begin : begin + at.latent_bytes]
        if len(piece) < at.latent_bytes:
            return "truncated", k
        if zlib.crc32(piece) != at.checksums[k]:
            return "checksum", k
    begin, end = (at.offset + at.header + k * at.latent_bytes for k in (first, last + 1))
    return np.frombuffer(content[begin:end], NUMPY_DTYPES[at.dtype]).reshape(-1, *at.shape)


def check(directory: Directory, rows: list[dict[str, Any]], spans: Spans) -> int:
    """That every trajectory is judged right; returns how many are damaged."""
    found = read_many(directory, spans)
    damaged = 0
    for row, read, first, last in zip(rows, found, spans.first.tolist(), spans.last.tolist(), strict=True):
        expected = judged(directory, row, first, last)
        if isinstance(expected, tuple):
            assert isinstance(read, CorruptionError)
            reason, k = expected
            assert (read.reason, read.file) == (reason, row["latents_file"])
            assert read.member == f"{row['trajectory_id']}.latents.npy latent {k}"
            assert read.expected == row["latents_crc32"][k]
            damaged += 1
        else:
            assert not isinstance(read, CorruptionError)
            assert (read.dtype, read.shape, read.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    return damaged


@st.composite
def any_spans(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Trajectories, all of one kind or not, some of them twice, and of each the first and last latent."""
    step = draw(st.sampled_from([1, len(KINDS)]))  # all of one kind are judged together
    which = [step * i for i in draw(st.lists(st.integers(0, COUNT // step - 1), max_size=30))]
    pairs = [sorted(draw(st.tuples(st.integers(0, STEPS), st.integers(0, STEPS)))) for _ in which]
    return which, [first for first, _ in pairs], [last for _, last in pairs]


PARTS = st.fixed_dictionaries(
    {
        "PART_BYTES": st.sampled_from([1, 200, 10**6]),
        "LARGE_BYTES": st.sampled_from([1, 10**6]),
        "MANY": st.sampled_from([1, 8]),
    }
)


@settings(max_examples=60, deadline=None)
@given(asked=any_spans(), parts=PARTS)
def test_any_trajectories_are_what_was_written(
    filled: Filled, asked: tuple[list[int], list[int], list[int]], parts: dict[str, int]
) -> None:
    """Whatever their order, shapes and dtypes, and however many threads share the work."""
    which, first, last = asked
    rows = [filled.rows[i] for i in which]
    with patch.dict(reading.__dict__, parts):
        found = read_many(filled.directory, spans_of(rows, first, last))
    for row, read, a, b in zip(rows, found, first, last, strict=True):
        assert not isinstance(read, CorruptionError)
        expected = filled.written[row["trajectory_id"]][a : b + 1]
        assert (read.dtype, read.shape, read.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), asked=any_spans(), parts=PARTS)
def test_damage_of_some_is_told_and_the_others_are_read(
    filled: Filled,
    data: st.DataObject,
    asked: tuple[list[int], list[int], list[int]],
    parts: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    copy = tmp_path_factory.mktemp("damaged")
    shutil.copytree(filled.directory.root, copy, dirs_exist_ok=True)
    directory = Directory(str(copy))
    for file in sorted({row["latents_file"] for row in filled.rows}):
        path = Path(directory.path(file))
        content = bytearray(path.read_bytes())
        match data.draw(st.sampled_from(["whole", "flipped", "truncated", "missing"])):
            case "flipped":
                for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=20)):
                    content[place] ^= 1
                path.write_bytes(content)
            case "truncated":
                path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
            case "missing":
                path.unlink()
    which, first, last = asked
    rows = [filled.rows[i] for i in which]
    with patch.dict(reading.__dict__, parts):
        check(directory, rows, spans_of(rows, first, last))
    shutil.rmtree(copy)


def test_every_flipped_bit_of_the_latents_is_found(tmp_path: Path) -> None:
    filled = Filled(tmp_path)
    row = filled.rows[0]
    at = LatentLocation.of(row)
    path = Path(filled.directory.path(at.file))
    begin = at.offset + at.header
    for bit in range(0, at.latent_bytes * len(at.checksums) * 8, 23):
        content = bytearray(path.read_bytes())
        content[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert check(filled.directory, [row], spans_of([row], [0], [STEPS])) == 1
        content[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    assert check(filled.directory, filled.rows, spans_of(filled.rows, [0] * COUNT, [STEPS] * COUNT)) == 0


def test_the_arrays_lie_in_the_memory_given(filled: Filled) -> None:
    spans = spans_of(filled.rows, [1] * COUNT, [STEPS] * COUNT)
    into = memory(spans.total + 10)
    into[:] = 0xA5
    for read in read_many(filled.directory, spans, into):
        assert not isinstance(read, CorruptionError)
        assert np.shares_memory(read, into)
    assert (into[spans.total :] == 0xA5).all()
    assert into.ctypes.data % 4096 == 0


def test_latents_that_a_trajectory_has_not(filled: Filled) -> None:
    for first, last in ((-1, 0), (0, STEPS + 1), (2, 1)):
        with pytest.raises(IndexError, match=rf"latents {first}\.\.{last} of t1: it has {STEPS + 1}"):
            spans_of(filled.rows[:3], [0, first, 0], [0, last, 0])


def test_memory_that_there_is_not() -> None:
    with pytest.raises(StoreError, match="1152921504606846976 bytes of latents do not fit into memory: make the"):
        memory(2**60)


LIES = st.fixed_dictionaries(
    {},
    optional={
        "latents_offset": st.sampled_from([-1, 0, 512, 2**62, 2**63 - 1]),
        "latents_header": st.sampled_from([-128, 0, 128, 2**62]),
        "latents_length": st.sampled_from([-1, 0, 128 + 4 * 32, 2**62, 2**63 - 1]),
        "latent_dtype": st.sampled_from(["float64", "", "float16", "x:y"]),
        "latent_shape": st.sampled_from([[], [8], [-2, -4], [0], [2**31 - 1] * 3, [2**20, 2**20], [2, 2, 2, 1]]),
        "latents_crc32": st.sampled_from([[], [7], [7] * 4, [7] * 5]),
        "latents_file": st.none(),
    },
)


@settings(max_examples=200, deadline=None)
@given(lies=st.lists(LIES, min_size=1, max_size=4))
def test_many_locations_are_judged_as_one_is(lies: list[dict[str, Any]]) -> None:
    rows = [located_row(f"t{i}") | lie for i, lie in enumerate(lies)]
    judged: list[LatentLocation | str] = []
    for row in rows:
        try:
            judged.append(LatentLocation.of(row))
        except StoreError as error:
            judged.append(str(error))
    if refused := [it for it in judged if isinstance(it, str)]:
        with pytest.raises(StoreError) as raised:
            Locations.of(trajectories(rows))
        assert str(raised.value) in refused
        return
    many = Locations.of(trajectories(rows))
    for i, at in enumerate(judged):
        assert isinstance(at, LatentLocation)
        one = Locations.single(at)
        assert at.latent_bytes <= LARGEST_LATENT
        for where, k in ((many, i), (one, 0)):
            assert where.ids[k].as_py() == at.trajectory_id
            assert where.files[where.file[k]] == at.file
            assert where.kinds[where.kind[k]] == (at.dtype, at.shape)
            assert (where.start[k], where.size[k]) == (at.offset + at.header, at.latent_bytes)
            checksums = where.checksums[where.checksum_at[k] :][: where.count[k]]
            assert tuple(checksums.tolist()) == at.checksums


def test_one_is_many_of_one(filled: Filled) -> None:
    at = LatentLocation.of(filled.rows[2])
    read = read_latents(filled.directory, at, 1, 3)
    assert read.tobytes() == filled.written["t2"][1:4].tobytes()
    with pytest.raises(CorruptionError, match=r"no\.tar: member t2\.latents\.npy latent 1: .* found no such file"):
        read_latents(filled.directory, LatentLocation.of(filled.rows[2] | {"latents_file": "no.tar"}), 1, 3)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_the_checksum_is_that_of_zlib(data: bytes, more: bytes) -> None:
    assert crc32(b"123456789") == 0xCBF43926  # the check value of CRC-32/ISO-HDLC
    assert crc32(data) == zlib.crc32(data)
    assert crc32(more, crc32(data)) == zlib.crc32(data + more)
