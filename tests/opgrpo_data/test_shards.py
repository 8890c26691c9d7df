"""Shards: what is written is read back bit for bit, every damage is found and named, and a crash leaves all or nothing."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from opgrpo_data.places.files import Range
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.seal import read_json
from opgrpo_data.shards import Record, write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import NUMPY, folder, overwrite, random_latents, record, records, shard_rows

ROOT = Path(__file__).parents[2]
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", fullmatch=True)
NOTES = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=20), max_size=3)


def whole(directory: Directory, row: dict[str, Any]) -> Any:
    """All latents of a row."""
    return read_latents(directory, LatentLocation.of(row), 0, len(row["latents_crc32"]) - 1)


def plain_samples(store: Path, row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """What WebDataset alone, knowing nothing of us, makes of the tar that a row names."""
    dataset = webdataset.WebDataset(str(store / row[f"{kind}_file"]), shardshuffle=False, nodesplitter=None)
    return list(dataset)


@st.composite
def shards(draw: st.DrawFn) -> list[Record]:
    """1..8 records of one shape, dtype and media format, with 1..6 steps each."""
    dtype = draw(st.sampled_from(sorted(NUMPY)))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    media_format = draw(st.sampled_from(["png", "webp", "mp4"]))
    return [
        record(
            name,
            random_latents(draw(st.integers(0, 2**32)), draw(st.integers(1, 6)), shape, dtype),
            dtype=dtype,
            media=draw(st.binary(max_size=2000)),
            media_format=media_format,
            note=draw(NOTES),
        )
        for name in draw(st.lists(IDS, min_size=1, max_size=8, unique=True))
    ]


# -- what was written is what is read --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(written=shards(), scheme=st.sampled_from(["file", "memory"]))
def test_round_trip(written: list[Record], scheme: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("round")
    store = Store.create(str(place) if scheme == "file" else f"memory://{place}")
    assert write_shard(store.directory, folder(), "00000", written)
    rows = shard_rows(store)
    assert [row["trajectory_id"] for row in rows] == [record.row["trajectory_id"] for record in written]
    for row, given_record in zip(rows, written, strict=True):
        location, steps = LatentLocation.of(row), len(given_record.latents) - 1
        for first in range(steps + 1):
            for last in range(first, steps + 1):
                read = read_latents(store.directory, location, first, last)
                assert read.dtype == NUMPY[row["latent_dtype"]]
                assert read.shape == given_record.latents[first : last + 1].shape
                assert read.tobytes() == given_record.latents[first : last + 1].tobytes()
        assert read_media(store.directory, row) == given_record.media
        assert {name: row[name] for name in given_record.row} == given_record.row


@settings(max_examples=15, deadline=None)
@given(written=shards())
@example(written=[record("x" * 128, random_latents(0, 2, (2, 2)))])  # longer than a plain tar header holds
def test_plain_tools_agree_with_the_index(written: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("plain")
    store = Store.create(str(place))
    write_shard(store.directory, folder(), "00000", written)
    rows = shard_rows(store)
    with tarfile.open(place / rows[0]["latents_file"]) as latents, tarfile.open(place / rows[0]["media_file"]) as media:
        assert latents.getnames() == [f"{row['trajectory_id']}.latents.npy" for row in rows]
        for row in rows:
            for tar, kind, name in (
                (latents, "latents", f"{row['trajectory_id']}.latents.npy"),
                (media, "media", f"{row['trajectory_id']}.{row['media_format']}"),
            ):
                member = tar.getmember(name)
                assert (member.offset_data, member.size) == (row[f"{kind}_offset"], row[f"{kind}_length"])
                assert (member.mtime, member.isreg()) == (0, True)
    for sample, given_record in zip(plain_samples(place, rows[0], "latents"), written, strict=True):
        assert sample["__key__"] == given_record.row["trajectory_id"]
        array = np.load(io.BytesIO(sample["latents.npy"]), allow_pickle=False)
        assert (array.dtype, array.shape) == (given_record.latents.dtype, given_record.latents.shape)
        assert array.tobytes() == given_record.latents.tobytes()
    for sample, given_record in zip(plain_samples(place, rows[0], "media"), written, strict=True):
        assert sample["__key__"] == given_record.row["trajectory_id"]
        assert sample[given_record.media_format] == given_record.media
        note = read_json(sample["json"])
        assert note == {**given_record.note, "trajectory_id": given_record.row["trajectory_id"]}


def test_numpy_reads_a_latents_member_as_webdataset_decodes_it(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    [written] = records(1)
    write_shard(store.directory, folder(), "00000", [written])
    url = str(tmp_path / shard_rows(store)[0]["latents_file"])
    [sample] = webdataset.WebDataset(url, shardshuffle=False, nodesplitter=None).decode()
    assert sample["latents.npy"].tobytes() == written.latents.tobytes()


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        store = Store.create(str(tmp_path / name))
        write_shard(store.directory, folder(), "00000", records(3))
        row = shard_rows(store)[0]
        contents.append([(tmp_path / name / row[f"{kind}_file"]).read_bytes() for kind in ("latents", "media")])
    assert contents[0] == contents[1]


def test_memory_layout_of_the_latents_does_not_matter(tmp_path: Path) -> None:
    latents = np.asfortranarray(random_latents(0, 3, (2, 3, 4)))
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", [record("t0", latents)])
    assert np.array_equal(whole(store.directory, shard_rows(store)[0]), latents, equal_nan=True)


class Counting(Directory):
    """A directory that counts the bytes of latents asked of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[tuple[int, int]] = []

    def read_ranges(self, ranges: Sequence[Range], into: memoryview) -> Sequence[int]:
        self.asked += [(wanted.offset, wanted.length) for wanted in ranges]
        return super().read_ranges(ranges, into)


def test_a_prefix_costs_a_prefix(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(2, steps=5))
    location = LatentLocation.of(shard_rows(store)[1])
    directory = Counting(str(tmp_path))
    read_latents(directory, location, 0, 2)
    read_latents(directory, location, 1, 1)
    data, latent = location.offset + location.header, 2 * 2 * 2 * 4
    assert directory.asked == [(data, 3 * latent), (data + latent, latent)]


def test_latents_that_are_not_there(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(1, steps=3))
    location = LatentLocation.of(shard_rows(store)[0])
    for first, last in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(IndexError, match=rf"latents {first}\.\.{last} of t0: it has 4"):
            read_latents(store.directory, location, first, last)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Directory, list[dict[str, Any]]]:
    """A store with one shard of two trajectories (3 latents of 72 bytes each), free to be damaged; and its rows."""
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(2, steps=2, shape=(2, 3, 3)))
    return store.directory, shard_rows(store)


def flip(file: IO[bytes], position: int, mask: int) -> None:
    file.seek(position)
    value = file.read(1)[0]
    file.seek(position)
    file.write(bytes([value ^ mask]))
    file.flush()


def test_every_flipped_byte_of_latents_is_found_and_named(damaged: tuple[Directory, list[dict[str, Any]]]) -> None:
    directory, rows = damaged
    masks = random.Random(0)
    for row in rows:
        path = Path(directory.path(row["latents_file"]))
        start = row["latents_offset"] + row["latents_header"]
        with path.open("r+b") as file:
            for place in range(3 * 72):
                mask, k = masks.randrange(1, 256), place // 72
                flip(file, start + place, mask)
                with pytest.raises(CorruptionError, match="expected crc32") as caught:
                    whole(directory, row)
                found = zlib.crc32(path.read_bytes()[start + k * 72 : start + (k + 1) * 72])
                error = caught.value
                assert (error.file, error.member) == (row["latents_file"], f"{row['trajectory_id']}.latents.npy latent {k}")
                assert (error.expected, error.found) == (row["latents_crc32"][k], found)
                for told in (error.file, error.member, f"{error.expected:08x}", f"{found:08x}"):
                    assert told in str(error)
                if k > 0:  # the prefix before the damage is still good, and is never asked about what follows it
                    read_latents(directory, LatentLocation.of(row), 0, k - 1)
                flip(file, start + place, mask)
        whole(directory, row)


def test_every_flipped_byte_of_media_is_found_and_named(damaged: tuple[Directory, list[dict[str, Any]]]) -> None:
    directory, rows = damaged
    masks = random.Random(1)
    for row in rows:
        path = Path(directory.path(row["media_file"]))
        with path.open("r+b") as file:
            for place in range(row["media_length"]):
                mask = masks.randrange(1, 256)
                flip(file, row["media_offset"] + place, mask)
                with pytest.raises(CorruptionError, match=rf"{row['trajectory_id']}\.png: expected crc32") as caught:
                    read_media(directory, row)
                end = row["media_offset"] + row["media_length"]
                found = zlib.crc32(path.read_bytes()[row["media_offset"] : end])
                assert (caught.value.file, caught.value.member) == (row["media_file"], f"{row['trajectory_id']}.png")
                assert (caught.value.expected, caught.value.found) == (row["media_crc32"], found)
                flip(file, row["media_offset"] + place, mask)
        read_media(directory, row)


def test_every_truncation_is_found_and_named(damaged: tuple[Directory, list[dict[str, Any]]]) -> None:
    directory, rows = damaged
    row = rows[1]
    path = Path(directory.path(row["latents_file"]))
    start, end = row["latents_offset"] + row["latents_header"], row["latents_offset"] + row["latents_length"]
    for size in range(end - 1, start - 100, -1):
        os.truncate(path, size)
        k = max(0, size - start) // 72  # whole latents that are left
        with pytest.raises(CorruptionError, match=f"t1.latents.npy latent {k}: .*the file ends before it") as caught:
            whole(directory, row)
        assert (caught.value.expected, caught.value.found) == (row["latents_crc32"][k], None)
        if k > 0:
            read_latents(directory, LatentLocation.of(row), 0, k - 1)
    whole(directory, rows[0])
    os.truncate(directory.path(row["media_file"]), row["media_offset"] + row["media_length"] - 1)
    with pytest.raises(CorruptionError, match=r"t1\.png: .*the file ends before it"):
        read_media(directory, row)


def test_damage_is_found_on_an_object_store_too() -> None:
    store = Store.create("memory://damage")
    write_shard(store.directory, folder(), "00000", records(1))
    [row] = shard_rows(store)
    data = bytearray(store.directory.read(row["latents_file"]))
    data[row["latents_offset"] + row["latents_header"]] ^= 1
    overwrite(store.directory, row["latents_file"], bytes(data))
    with pytest.raises(CorruptionError, match=r"t0\.latents\.npy latent 0: expected crc32"):
        whole(store.directory, row)
    overwrite(store.directory, row["latents_file"], bytes(data[:600]))
    with pytest.raises(CorruptionError, match=r"t0\.latents\.npy latent 0: .*the file ends before it"):
        whole(store.directory, row)


@pytest.mark.parametrize(
    "lie",
    [
        {"latents_length": 1},
        {"latents_length": -1},
        {"latents_header": 0},
        {"latents_header": -128, "latents_length": 4 * 32 - 128},
        {"latents_offset": -512},
        {"latent_dtype": "float16"},
        {"latent_dtype": "complex128"},
        {"latent_dtype": "object"},
        {"latent_shape": [2, 2]},
        {"latent_shape": [2, 2, 2, 2]},
        {"latents_crc32": [1, 2, 3]},
    ],
    ids=str,
)
def test_an_index_row_that_contradicts_itself_is_refused(lie: dict[str, Any], tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(1))
    [row] = shard_rows(store)
    with pytest.raises(StoreError, match=r"latents\.tar: the index row of t0 contradicts itself"):
        LatentLocation.of(row | lie)


@pytest.mark.parametrize("column", ["latent_shape", "latents_offset", "latents_crc32"])
def test_an_index_row_without_a_place_is_refused(column: str, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", records(1))
    [row] = shard_rows(store)
    with pytest.raises(StoreError, match=rf"the index row of t0 has no \['{column}'\]"):
        LatentLocation.of(row | {column: None})


# -- names and records that may not enter ------------------------------------------------------------------------------

WICKED = ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", ".hidden", "a b", "a\nb", "a\0b", "é", "x" * 129]


def left_behind(place: Path) -> list[str]:
    """All files of a store but its marker, temporary ones included."""
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and path.name != "store.json")


@pytest.mark.parametrize("name", WICKED, ids=repr)
def test_names_that_reach_for_other_paths_are_refused(name: str, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"trajectory_id .* cannot be part of a path"):
        write_shard(store.directory, folder(), "00000", [*records(1), record(name, random_latents(0, 1, (2,)))])
    with pytest.raises(ValueError, match=r"shard .* cannot be part of a path"):
        write_shard(store.directory, folder(), name, records(1))
    with pytest.raises(ValueError, match=r"media_format .* cannot be part of a path"):
        write_shard(store.directory, folder(), "00000", records(1, media_format=name))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("file", ["../secret", "a/../../secret", "/etc/passwd", "/secret"])
def test_a_row_that_points_out_of_the_store_is_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(10_000))
    store = Store.create(str(tmp_path / "store"))
    write_shard(store.directory, folder(), "00000", records(1))
    row = shard_rows(store)[0] | {"latents_file": file, "media_file": file}
    with pytest.raises(StoreError, match="leads out of"):
        whole(store.directory, row)
    with pytest.raises(StoreError, match="leads out of"):
        read_media(store.directory, row)
    with pytest.raises(StoreError, match="leads out of"):
        write_shard(store.directory, "../elsewhere", "00000", records(1))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"latent_shape": [2, 4]}, r"its row says latents of float32 \(2, 4\), it has float32 \(2, 2, 2\)"),
        ({"latent_dtype": "float16"}, "its row says latents of float16"),
        ({"latent_dtype": "int8"}, "its row says latents of int8"),
        ({"colour": "red"}, r"columns \['colour'\] are not in the schema"),
    ],
)
def test_a_record_that_contradicts_its_row_is_not_committed(lie: dict[str, Any], message: str, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    [good, bad] = records(2)
    with pytest.raises(ValueError, match=message):
        write_shard(store.directory, folder(), "00000", [good, Record({**bad.row, **lie}, bad.latents, b"", "png", {})])
    assert left_behind(tmp_path) == []


def test_foreign_byte_order_is_refused(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    with pytest.raises(ValueError, match=r"its row says latents of float32 .* it has >f4"):
        write_shard(store.directory, folder(), "00000", [record("t0", random_latents(0, 1, (2,)).astype(">f4"))])
    assert left_behind(tmp_path) == []


@pytest.mark.filterwarnings("error")
def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Record]:
        yield from records(2)
        raise RuntimeError("the model ran out of memory")

    store = Store.create(str(tmp_path))
    with pytest.raises(RuntimeError, match="out of memory"):
        write_shard(store.directory, folder(), "00000", failing())
    gc.collect()  # whatever a half-written tar still wants to say, it says now
    assert left_behind(tmp_path) == []
    assert write_shard(store.directory, folder(), "00000", records(2))


# -- the commit --------------------------------------------------------------------------------------------------------


def problems(store: Store) -> list[str]:
    """What is wrong with what is committed: nothing, or the message of each reader that failed."""
    found: list[str] = []
    for row in shard_rows(store):
        try:
            whole(store.directory, row)
            read_media(store.directory, row)
            for kind in ("latents", "media"):
                with tarfile.open(store.directory.path(row[f"{kind}_file"])) as tar:
                    tar.getmembers()
        except (StoreError, OSError, tarfile.TarError) as error:
            found.append(f"{row['trajectory_id']}: {error}")
    return found


@pytest.mark.parametrize("writers", [2, 5])
def test_of_many_writers_of_a_shard_one_commits(writers: int, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    barrier = threading.Barrier(writers)

    def write(shard: str, seed: int) -> bool:
        rng = np.random.default_rng(seed)
        latents = [rng.standard_normal((3, 4), np.float32) for _ in range(1 + seed % 3)]  # sizes differ: offsets too
        mine = [record(f"{shard}-{i}", array, seed=seed, media=bytes([seed])) for i, array in enumerate(latents)]
        barrier.wait()
        return write_shard(store.directory, folder(), shard, mine)

    with ThreadPoolExecutor(writers) as pool:
        for attempt in range(60 // writers):
            shard = f"{attempt:05d}"
            committed = list(pool.map(write, [shard] * writers, range(writers)))
            assert sum(committed) == 1
            rows = store.read_tables("trajectories", [f"{folder()}/{shard}.parquet"]).to_pylist()
            winner = committed.index(True)
            assert {row["seed"] for row in rows} == {winner}
            rng = np.random.default_rng(winner)
            for row in rows:
                assert whole(store.directory, row).tobytes() == rng.standard_normal((3, 4), np.float32).tobytes()
                assert read_media(store.directory, row) == bytes([winner])
    assert problems(store) == []


def test_a_shard_is_committed_once_and_never_changed(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    assert write_shard(store.directory, folder(), "00000", records(2))
    before = shard_rows(store)
    assert not write_shard(store.directory, folder(), "00000", records(3, steps=1))
    assert shard_rows(store) == before
    assert problems(store) == []


def test_an_index_is_published_only_after_the_data_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_fsync, real_replace, real_link = os.fsync, os.replace, os.link

    def named(path: Any) -> str:
        name = Path(path).name
        return "folder" if name.startswith("iter=") else ".".join(name.split(".")[2:]) or name

    def fsync(descriptor: int) -> None:
        events.append(("fsync", named(Path(f"/proc/self/fd/{descriptor}").readlink())))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        events.append(("rename", named(target)))
        real_replace(source, target)

    def link(source: Any, target: Any) -> None:
        events.append(("link", Path(target).name))
        real_link(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file a descriptor belongs to")
    store = Store.create(str(tmp_path))
    (tmp_path / folder()).mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "link", link)
    write_shard(store.directory, folder(), "00000", records(1))
    kinds = [(what, name if what != "fsync" or name == "folder" else "file") for what, name in events]
    tar_commits = [[("fsync", "file"), ("rename", f"{kind}.tar"), ("fsync", "folder")] for kind in ("media", "latents")]
    assert kinds == [*tar_commits[0], *tar_commits[1], ("fsync", "file"), ("link", "00000.parquet"), ("fsync", "folder")]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.opgrpo_data.crashing_writer"]
    started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield started
    started.communicate()
    assert started.returncode == 0


class Writers:
    """Shard writers in processes of their own, each of which can be killed at any instant."""

    def __init__(self, store: Path, server: subprocess.Popen[str]) -> None:
        self.store = Store.create(str(store))
        self.count = 0
        self._server = server

    def write(self, order: str, *, kill_after: float | None = None, die_at: int | None = None) -> tuple[int, float]:
        """Start a writer of the next shard and wait for its end: its wait status (9: killed) and its seconds."""
        assert self._server.stdin
        assert self._server.stdout
        command = {"store": self.store.directory.root, "shard": f"{self.count:05d}", "order": order, "die_at": die_at}
        self.count += 1
        print(json.dumps(command), file=self._server.stdin, flush=True)
        pid = int(self._server.stdout.readline())
        began = time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        print(file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline()), time.perf_counter() - began

    def committed(self) -> bool:
        """Whether the last shard is visible to readers."""
        return self.store.directory.exists(f"{folder()}/{self.count - 1:05d}.parquet")


@pytest.fixture
def writers(tmp_path: Path, server: subprocess.Popen[str]) -> Writers:
    return Writers(tmp_path, server)


def test_a_writer_killed_at_random_leaves_a_whole_shard_or_none(writers: Writers) -> None:
    status, duration = writers.write("index_last")
    assert status == 0
    instants = random.Random(time.time_ns())
    killed = sum(writers.write("index_last", kill_after=instants.uniform(0, duration))[0] == 9 for _ in range(15))
    assert killed > 0
    assert problems(writers.store) == []


def test_a_writer_killed_at_any_file_operation_leaves_a_whole_shard_or_none(writers: Writers) -> None:
    outcomes = []
    for die_at in range(100):
        status, _ = writers.write("index_last", die_at=die_at)
        outcomes.append(writers.committed())
        assert problems(writers.store) == [], f"killed before file operation {die_at}"
        if status == 0:
            break
    assert status == 0  # the last one ran to its end: every operation before has been a place to die
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes)  # none before the commit, all after it
    assert outcomes[0] is False


def test_the_check_catches_a_writer_that_commits_first(writers: Writers) -> None:
    """The two tests above can fail: with the commit before the data, the same kills leave torn shards."""
    status, duration = writers.write("index_first")
    assert status == 0
    assert problems(writers.store) == []
    torn = set()
    for die_at in range(100):
        status, _ = writers.write("index_first", die_at=die_at)
        torn.update(problems(writers.store))
        if status == 0 or torn:
            break
    assert torn
    instants = random.Random(time.time_ns())
    for _ in range(100):
        writers.write("index_first", kill_after=instants.uniform(0, duration))
        if set(problems(writers.store)) - torn:
            break
    assert set(problems(writers.store)) - torn
