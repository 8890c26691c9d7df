"""Bytes and paths: files appear whole or not at all, names are taken once, and nothing leads out of the directory."""

from __future__ import annotations

import errno
import re
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data.errors import StoreError
from opgrpo_data.io import NAME, Directory, checked_name
from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.places.remote import RemoteFiles
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder, records, shard_rows


@pytest.fixture(params=["file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    """An empty directory: on disk, and as an object store."""
    return Directory(str(tmp_path / "place") if request.param == "file" else f"memory://{tmp_path}")


def everything(directory: Directory) -> list[str]:
    """All files, published or not."""
    return [entry.path for entry in directory.entries()]


# -- names -----------------------------------------------------------------------------------------------------------


@given(name=st.text(max_size=140) | st.text("abC0._-/\\", max_size=140))
def test_a_checked_name_is_one_visible_component(name: str) -> None:
    if not NAME.fullmatch(name):
        with pytest.raises(ValueError, match=re.escape(f"shard {name!r} cannot be part of a path")):
            checked_name(name, "shard")
        return
    assert checked_name(name, "shard") == name
    assert Path(name).parts == (name,)
    assert not name.startswith(".")
    assert name.isascii()
    assert 0 < len(name) <= 128


@pytest.mark.parametrize("path", ["../x", "a/../x", "..", "/x", "/", "a/.."])
def test_no_path_leads_out(directory: Directory, path: str) -> None:
    for use in (directory.path, directory.exists, directory.list, directory.read):
        with pytest.raises(StoreError, match="leads out of"):
            use(path)
    with pytest.raises(StoreError, match="leads out of"):
        directory.read_range(path, 0, 1)
    with pytest.raises(StoreError, match="leads out of"):
        directory.publish(path, b"")
    with pytest.raises(StoreError, match="leads out of"):
        directory.remove_tree(path)
    with pytest.raises(StoreError, match="leads out of"), directory.write_atomic(path):
        raise AssertionError("the block must not run")
    assert everything(directory) == []


# -- publish ---------------------------------------------------------------------------------------------------------


def test_publish_is_put_if_absent(directory: Directory) -> None:
    assert directory.publish("a/b/c.parquet", b"first")
    assert not directory.publish("a/b/c.parquet", b"second")
    assert directory.read("a/b/c.parquet") == b"first"
    assert directory.exists("a/b/c.parquet")
    assert everything(directory) == ["a/b/c.parquet"]


def test_of_many_publishers_one_wins(directory: Directory) -> None:
    barrier = threading.Barrier(4)

    def publish(name: str, mine: bytes) -> bool:
        barrier.wait()
        return directory.publish(name, mine)

    contents = [bytes([n]) * (1000 * n) for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        for attempt in range(15):
            created = list(pool.map(publish, [f"file-{attempt}"] * 4, contents))
            if directory.local:  # the in-memory filesystem checks and writes in two steps: no test of atomicity
                assert sum(created) == 1
                assert directory.read(f"file-{attempt}") == contents[created.index(True)]
    assert everything(directory) == sorted(f"file-{attempt}" for attempt in range(15))


class Refusing(MemoryFileSystem):  # type: ignore[misc]
    """An object store whose server answers every conditional PUT with an error."""

    cachable = False

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        raise OSError(self.code, "the server says no")


def test_a_servers_refusal_means_taken_and_nothing_else_does() -> None:
    directory = Directory("memory://refusing")
    directory.files = RemoteFiles(Refusing(errno.EINVAL))
    with pytest.raises(OSError, match="the server says no"):  # the name is free, so EINVAL means something else
        directory.publish("a", b"")
    with MemoryFileSystem().open("/refusing/a", "wb") as file:
        file.write(b"taken")
    assert not directory.publish("a", b"")
    directory.files = RemoteFiles(Refusing(errno.EACCES))
    with pytest.raises(PermissionError, match="the server says no"):
        directory.publish("a", b"")


# -- atomic writes -----------------------------------------------------------------------------------------------------


def test_a_file_appears_when_its_block_ends(directory: Directory) -> None:
    with directory.write_atomic("a/file") as file:
        file.write(b"half")
        file.flush()
        assert not directory.exists("a/file")
        assert directory.list("a/*") == []
        file.write(b" and half")
    assert directory.read("a/file") == b"half and half"
    assert directory.list("a/*") == everything(directory) == ["a/file"]


def write_half(directory: Directory, name: str, data: bytes) -> None:
    with directory.write_atomic(name) as file:
        file.write(data)
        raise RuntimeError("halfway")


def test_an_exception_leaves_nothing(directory: Directory) -> None:
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(directory, "a/file", b"x" * 1_000_000)
    assert everything(directory) == []


def test_an_exception_leaves_what_was_there(directory: Directory) -> None:
    with directory.write_atomic("file") as file:
        file.write(b"old")
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(directory, "file", b"new")
    assert directory.read("file") == b"old"
    with directory.write_atomic("file") as file:
        file.write(b"new")
    assert directory.read("file") == b"new"
    assert everything(directory) == ["file"]


# -- listing and reading -----------------------------------------------------------------------------------------------


def test_list_gives_sorted_relative_paths_without_temporary_files(directory: Directory) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "b/1.parquet", f"b/{TEMPORARY_PREFIX}0123.parquet", "b/1.tar"):
        directory.publish(name, b"")
    assert directory.list("*/*.parquet") == ["a/1.parquet", "b/1.parquet", "b/2.parquet"]
    assert directory.list("b/*") == ["b/1.parquet", "b/1.tar", "b/2.parquet"]
    assert directory.list("c/*") == []


@pytest.mark.parametrize("name", ["runs[1]", "a*", "what?", 'it\'s "mine"', "two words", "{a,b}", "100%", "#1", "ü"])
def test_a_directory_may_have_any_name(name: str, tmp_path: Path) -> None:
    for neighbour in ("runs1", "ab", "whatX", name):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "theirs").write_bytes(b"")
    directory = Directory(str(tmp_path / name))
    directory.publish("x/ours", b"1")
    assert directory.list("*/*") == ["x/ours"]
    assert directory.list("*") == ["theirs", "x"]
    assert directory.read("x/ours") == b"1"


@given(data=st.binary(max_size=50), offset=st.integers(0, 60), length=st.integers(0, 60), local=st.booleans())
def test_read_range_is_a_slice(
    data: bytes, offset: int, length: int, local: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.getbasetemp() / "ranges"
    directory = Directory(str(place) if local else "memory://ranges")
    with directory.write_atomic("file") as file:
        file.write(data)
    assert directory.read_range("file", offset, length) == data[offset : offset + length]
    assert directory.read("file") == data


def test_reading_what_is_not_there(directory: Directory) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        directory.read("absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        directory.read_range("absent", 0, 1)
    assert not directory.exists("absent")


@pytest.mark.parametrize("url", ["", "  "])
def test_an_empty_place_is_none(url: str) -> None:
    with pytest.raises(
        StoreError, match=rf"^the place '{url}' is empty: name a directory or a bucket prefix, for example s3://"
    ):
        Directory(url)


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_what_lies_in_a_place(scheme: str, tmp_path: Path) -> None:
    place = Directory(f"{scheme}{tmp_path}/a")
    assert all(place.contains(Directory(f"{scheme}{tmp_path}/{name}")) for name in ("a", "a/", "a/b", "a/b/c"))
    assert not any(place.contains(Directory(f"{scheme}{tmp_path}/{name}")) for name in ("", "b", "ab", "b/a"))
    other = "memory:/" if scheme == "" else ""
    assert not place.contains(Directory(f"{other}{tmp_path}/a/b"))


def test_a_bucket_by_another_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert Directory("s3://bucket/a").contains(Directory("s3a://bucket/a/b"))
    assert Directory("s3://bucket").contains(Directory("s3://bucket/a/"))
    assert not Directory("s3://bucket/a").contains(Directory("memory://bucket/a"))


def test_remove_tree(directory: Directory) -> None:
    directory.publish("a/b/1", b"")
    directory.publish("c", b"")
    directory.remove_tree("a")
    directory.remove_tree("a")
    assert everything(directory) == ["c"]


# -- a full disk -------------------------------------------------------------------------------------------------------


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writes fail halfway, as on a full disk (but with EFBIG, not ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leaves_no_file(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    with room_for(1000), pytest.raises(OSError, match="File too large"):
        directory.publish("a", bytes(1001))
    with room_for(1000), pytest.raises(OSError, match="File too large"), directory.write_atomic("b") as file:
        file.write(bytes(1001))
    assert everything(directory) == []
    with room_for(1000):
        assert directory.publish("a", bytes(1000))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("room", "tars_fit"), [(100, False), (30_000, False), (11_000, True)])
def test_a_store_survives_a_full_disk(room: int, tars_fit: bool, tmp_path: Path) -> None:
    """Wherever the room ends, in a tar or in the index, nothing is committed, and with room again all goes on."""
    store = Store.create(str(tmp_path))
    assert write_shard(store.directory, folder(), "00000", records(1))
    before = shard_rows(store)
    written = records(1) if tars_fit else records(4, shape=(64, 64))
    with room_for(room), pytest.raises(OSError, match="File too large"):
        write_shard(store.directory, folder(), "00001", written)
    assert [name for name in everything(store.directory) if TEMPORARY_PREFIX in name] == []
    assert (len([name for name in everything(store.directory) if "00001" in name]) == 2) == tars_fit  # garbage at most
    again = Store.open(str(tmp_path))
    assert shard_rows(again) == before
    assert write_shard(again.directory, folder(), "00001", written)
    assert len(shard_rows(again)) == 1 + len(written)
