"""Files on a real S3 server: the same answers as a disk gives, names taken once, bounded memory, nothing half-written."""

from __future__ import annotations

import multiprocessing
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.store.proxy import Proxy
from opgrpo_data.io import Directory
from opgrpo_data.places import remote
from opgrpo_data.places.files import Range
from opgrpo_data.places.objects import Page
from opgrpo_data.places.remote import CONCURRENT, GAP_BYTES, PIECE_BYTES, READING_BYTES, RemoteFiles
from opgrpo_data.places.retries import Patience
from opgrpo_data.places.s3 import PART_BYTES
from tests import s3 as servers
from tests.s3 import unfinished_uploads

MIB = 1024 * 1024


@pytest.fixture(params=["seaweedfs", "moto"])
def directory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Directory]:
    """An empty place on either server."""
    if request.param == "seaweedfs":
        yield Directory(request.getfixturevalue("s3"))
    else:
        servers.at(
            monkeypatch, {"AWS_ENDPOINT_URL": request.getfixturevalue("moto_endpoint"), "AWS_DEFAULT_REGION": "us-east-1"}
        )
        servers.at(monkeypatch, {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"})
        yield Directory(servers.new_url())
        s3fs.S3FileSystem.clear_instance_cache()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def names(directory: Directory) -> list[str]:
    return [entry.path for entry in directory.entries()]


def publish_many(directory: Directory, paths: list[str], data: bytes = b"") -> None:
    with ThreadPoolExecutor(CONCURRENT) as pool:
        assert all(pool.map(directory.publish, paths, [data] * len(paths)))


# -- what Files promises -----------------------------------------------------------------------------------------------


def test_a_bucket_answers_as_a_disk_does(directory: Directory) -> None:
    assert names(directory) == directory.list("*") == []
    assert directory.publish("a/b", b"0123456789")
    assert not directory.publish("a/b", b"other")
    with directory.write_atomic("a/empty"):
        pass
    assert directory.read("a/b") == b"0123456789"
    assert directory.read("a/empty") == b""
    assert [directory.read_range("a/b", *at) for at in ((0, 0), (2, 3), (8, 9), (10, 1), (99, 1))] == [
        b"", b"234", b"89", b"", b"",
    ]  # fmt: skip
    assert [directory.exists(name) for name in ("a/b", "a", "b", "a/b/c")] == [True, True, False, False]
    assert directory.list("*") == ["a"]
    assert directory.list("a/*") == ["a/b", "a/empty"]
    entry = directory.entries()[0]
    assert (entry.path, entry.size) == ("a/b", 10)
    assert abs(entry.modified.timestamp() - time.time()) < 60
    for missing in ("none", "a"):
        with pytest.raises(FileNotFoundError, match=f"no such file: '{directory.url}/{missing}'"):
            directory.read(missing)
    with pytest.raises(FileNotFoundError, match="no such file"):
        directory.read_range("none", 0, 0)
    directory.remove("a/b")
    directory.remove("a/b")
    assert names(directory) == ["a/empty"]
    directory.remove_tree("a")
    directory.remove_tree("a")
    assert names(directory) == []


def test_of_many_publishers_one_wins(s3: str) -> None:
    """SeaweedFS makes the others wait for a second, so that the races for eight names are run at once."""
    directory = Directory(s3)
    barriers = [threading.Barrier(4) for _ in range(8)]

    def publish(number: int, mine: bytes) -> bool:
        barriers[number].wait()
        return directory.publish(f"file-{number}", mine)

    contents = [bytes([n]) * 2000 for n in range(4)]
    with ThreadPoolExecutor(32) as pool:
        created = list(pool.map(publish, [number for number in range(8) for _ in range(4)], contents * 8))
    for number in range(8):
        winners = created[4 * number : 4 * number + 4]
        assert sum(winners) == 1
        assert directory.read(f"file-{number}") == contents[winners.index(True)]


def test_no_listing_is_old(s3: str) -> None:
    """Two processes see each other's files at once: what one has listed it asks for again."""
    ours, theirs = Directory(s3), s3fs.S3FileSystem(skip_instance_cache=True)
    ours.publish("x/1", b"")
    assert (ours.list("x/*"), ours.exists("x/2"), names(ours)) == (["x/1"], False, ["x/1"])
    theirs.pipe_file(f"{s3}/x/2", b"22")
    assert (ours.list("x/*"), ours.exists("x/2"), names(ours)) == (["x/1", "x/2"], True, ["x/1", "x/2"])
    theirs.rm_file(f"{s3}/x/1")
    assert (ours.list("x/*"), ours.exists("x/1"), names(ours)) == (["x/2"], False, ["x/2"])


def test_more_files_than_one_answer_lists(s3: str) -> None:
    directory = Directory(s3)
    paths = [f"run=0/iter={n:06d}.parquet" for n in range(1010)]
    publish_many(directory, paths)
    assert directory.list("run=*/*.parquet") == directory.list("run=0/*") == names(directory) == paths
    directory.remove_tree("")
    assert names(directory) == []


def test_folders_that_consoles_make_are_no_files(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.at(monkeypatch, {"AWS_ENDPOINT_URL": moto_endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"})
    directory = Directory(servers.new_url())
    s3fs.S3FileSystem().call_s3("put_object", Bucket=servers.BUCKET, Key=f"{directory.root.partition('/')[2]}/a/")
    directory.publish("a/b", b"")
    assert names(directory) == ["a/b"]
    assert directory.list("*") == ["a"]
    assert directory.list("a/*") == directory.list("*/*") == ["a/b"]


TREE_NAMES = st.sampled_from(["a", "b", ".c", "run=1", "x.tar", "x+y", "[z]", "ü 1"])
PATTERNS = st.lists(st.sampled_from(["*", "a", "run=*", "*.tar", "?", "[ab]", ".*", "[!a]*", "**"]), min_size=1, max_size=3)


@given(
    tree=st.sets(st.lists(TREE_NAMES, min_size=1, max_size=3).map(tuple), max_size=8),
    patterns=st.lists(PATTERNS.map("/".join), min_size=1, max_size=6),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_glob_finds_the_same_everywhere(
    tree: set[tuple[str, ...]], patterns: list[str], s3: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = [path for path in tree if not any(path == other[: len(path)] for other in tree if other != path)]
    url, folder = servers.new_url(), tmp_path_factory.mktemp("tree")
    places = [Directory(str(folder)), Directory(f"memory://{folder}"), Directory(url)]
    for place in places:
        for path in files:
            place.publish("/".join(path), b"")
    for pattern in patterns:
        on_disk, in_memory, in_bucket = (place.list(pattern) for place in places)
        assert in_bucket == in_memory == on_disk


# -- reading many ranges -----------------------------------------------------------------------------------------------

RANGES = st.lists(st.tuples(st.sampled_from(["one", "two", "none"]), st.integers(0, 70), st.integers(0, 40)), max_size=12)


@given(ranges=RANGES, piece=st.integers(1, 30), gap=st.integers(0, 10))
@settings(deadline=None)
def test_ranges_are_slices(ranges: list[tuple[str, int, int]], piece: int, gap: int) -> None:
    contents = {"one": noise(64), "two": noise(33, 1)}
    directory = Directory("memory://ranges-in-memory")
    for name, data in contents.items():
        directory.publish(name, data)
    into = bytearray(sum(length for _, _, length in ranges))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "PIECE_BYTES", piece)
        patch.setattr(remote, "GAP_BYTES", gap)
        found = directory.read_ranges([Range(*wanted) for wanted in ranges], memoryview(into))
    start = 0
    for (name, offset, length), count in zip(ranges, found, strict=True):
        assert into[start : start + count] == contents.get(name, b"")[offset : offset + length]
        assert count == len(contents.get(name, b"")[offset : offset + length])
        start += length


def test_ranges_of_large_files_from_a_server(s3: str) -> None:
    directory, data = Directory(s3), noise(5 * MIB)
    with directory.write_atomic("big") as file:
        file.write(data)
    wanted = [(0, 5 * MIB), (100, 10), (4 * MIB, 3 * MIB), (300, 10), (MIB, 2 * MIB), (9 * MIB, 5)]
    into = bytearray(sum(length for _, length in wanted))
    found = directory.read_ranges([Range("big", *at) for at in wanted], memoryview(into))
    assert found == [len(data[offset : offset + length]) for offset, length in wanted]
    start = 0
    for (offset, length), count in zip(wanted, found, strict=True):
        assert into[start : start + count] == data[offset : offset + length]
        start += length
    assert directory.read("big") == data
    assert directory.read_range("big", 7, 3 * MIB) == data[7 : 7 + 3 * MIB]


class Counting:
    """Objects that are all zeros, and that remember what was asked for at once."""

    parts = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.underway = self.most = 0
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return path

    def get(self, path: str, start: int, stop: int) -> tuple[bytes, int]:
        with self.lock:
            self.asked.append((path, start, stop))
            self.underway += stop - start
            self.most = max(self.most, self.underway)
        time.sleep(0.002)
        with self.lock:
            self.underway -= stop - start
        return bytes(stop - start), 1 << 40

    def page(self, folder: str, *, deep: bool, after: str | None = None) -> Page:
        raise NotImplementedError

    put = create = size = delete = page


def counting() -> tuple[RemoteFiles, Counting]:
    files = RemoteFiles(MemoryFileSystem(), Patience())
    files.objects = objects = Counting()  # type: ignore[assignment]
    return files, objects


def test_requests_under_way_are_bounded() -> None:
    files, objects = counting()
    into = bytearray(100 * 3 * MIB)
    files.read_ranges([Range(f"file-{n}", 10, 3 * MIB) for n in range(100)], memoryview(into))
    assert objects.most <= READING_BYTES == CONCURRENT * PIECE_BYTES
    assert objects.most > READING_BYTES / 4
    assert max(stop - start for _, start, stop in objects.asked) == PIECE_BYTES
    assert sum(stop - start for _, start, stop in objects.asked) == len(into)


def test_near_ranges_are_one_request_and_far_ones_are_not() -> None:
    files, objects = counting()
    into = memoryview(bytearray(400))
    ranges = [Range("a", 0, 100), Range("a", 100 + GAP_BYTES, 100), Range("a", 201 + 2 * GAP_BYTES, 100), Range("b", 50, 100)]
    files.read_ranges(ranges, into)
    assert sorted(objects.asked) == [
        ("a", 0, 200 + GAP_BYTES), ("a", 201 + 2 * GAP_BYTES, 301 + 2 * GAP_BYTES), ("b", 50, 150),
    ]  # fmt: skip
    files.read_ranges([], into)
    files.read_ranges([Range("a", 5, 0)], into)
    assert len(objects.asked) == 3


def test_far_away_reads_overlap(proxy: Proxy) -> None:
    """At 20 ms a request, 32 ranges one after the other take 640 ms and more."""
    url = servers.new_url()
    directory = Directory(url)
    publish_many(directory, [f"file-{n}" for n in range(32)], noise(1000))
    proxy.latency = 0.02
    into = bytearray(32_000)
    ranges = [Range(f"file-{n}", 0, 1000) for n in range(32)]
    directory.read_ranges(ranges, memoryview(into))  # opens the connections
    start = time.monotonic()
    assert directory.read_ranges(ranges, memoryview(into)) == [1000] * 32
    assert time.monotonic() - start < 0.32
    assert into == noise(1000) * 32


# -- writing large files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 2 * PART_BYTES + 7])
def test_a_file_of_any_size_appears_whole(size: int, s3: str) -> None:
    directory, data = Directory(s3), noise(size)
    with directory.write_atomic("file") as file:
        for start in range(0, size, 3 * MIB + 1):
            file.write(data[start : start + 3 * MIB + 1])
        assert file.tell() == size
        assert names(directory) == []
    assert directory.read("file") == data
    assert unfinished_uploads(s3) == []


def test_one_large_write_is_cut_in_parts(directory: Directory) -> None:
    data = noise(2 * PART_BYTES + 7)
    with directory.write_atomic("file") as file:
        assert file.write(memoryview(data)) == len(data)
    assert directory.read("file") == data


def test_an_error_halfway_leaves_nothing(s3: str) -> None:
    directory = Directory(s3)
    directory.publish("file", b"old")

    def write_half() -> None:
        with directory.write_atomic("file") as file:
            file.write(noise(2 * PART_BYTES))
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert directory.read("file") == b"old"
    assert unfinished_uploads(s3) == []


def test_memory_of_a_writer_is_bounded(s3: str) -> None:
    directory, piece = Directory(s3), noise(MIB)
    directory.publish("warm", b"")
    tracemalloc.start()
    try:
        with directory.write_atomic("file") as file:
            for _ in range(64):
                file.write(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * PART_BYTES
    assert directory.entries()[0].size == 64 * MIB


# -- processes and threads ---------------------------------------------------------------------------------------------


def test_many_threads_share_a_directory(s3: str) -> None:
    directory = Directory(s3)

    def use(number: int) -> bool:
        name, data = f"{number % 5}/{number}", noise(1000, number)
        with directory.write_atomic(name) as file:
            file.write(data)
        return directory.read(name) == data and name in directory.list("*/*")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(40)))


def read_in_child(directory: Directory, told: multiprocessing.SimpleQueue[bytes]) -> None:
    told.put(directory.read("file"))


def test_a_forked_process_can_read(s3: str) -> None:
    """And the one it was forked from still can: neither waits for connections that the other has closed."""
    directory = Directory(s3)
    directory.publish("file", b"content")
    context = multiprocessing.get_context("fork")
    told: multiprocessing.SimpleQueue[bytes] = context.SimpleQueue()
    start = time.monotonic()
    child = context.Process(target=read_in_child, args=(directory, told))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert told.get() == directory.read("file") == b"content"
    assert time.monotonic() - start < 10


def test_place_of_a_memory_filesystem_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no such file: 'memory://{tmp_path}/none'"):
        Directory(f"memory://{tmp_path}").read("none")
