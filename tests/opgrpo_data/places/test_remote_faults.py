"""A real S3 server behind a proxy that fails: nothing is lost, nothing is wrong, what cannot be helped is told in a line."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs

from benchmarks.store.proxy import Fault, Proxy, Request
from benchmarks.store.server import PASSWORD, S3Server
from opgrpo_data.catalog import Catalog
from opgrpo_data.errors import CorruptionError, StoreError
from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from opgrpo_data.places.files import Range
from opgrpo_data.places.s3 import S3Objects, S3Parts
from opgrpo_data.reading import read_latents, read_media
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from opgrpo_data.stream import stream
from tests import s3 as servers
from tests.opgrpo_data.factories import RUN, folder, plan, plan_rule, records, rewards, shard_rows, trajectories
from tests.s3 import QUICK, failing, new_url, unfinished_uploads

FAULTS: tuple[Fault, ...] = ("500", "503", "reset", "lost", "cut", "short")
DATA = bytes(range(256)) * 40
SMALLEST_PART = 5 * 1024 * 1024
LARGE = DATA * (2 * SMALLEST_PART // len(DATA)) + b"end"


def read_many(directory: Directory) -> bytes:
    into = bytearray(30)
    assert directory.read_ranges([Range("file", at, 10) for at in (0, 5, 1000)], memoryview(into)) == [10, 10, 10]
    return bytes(into)


def write(directory: Directory, name: str, data: bytes) -> bytes:
    with directory.write_atomic(name) as file:
        file.write(data)
    return directory.read(name)


def remove(directory: Directory) -> list[str]:
    directory.remove("b/1")
    return directory.list("b/*")


USES: dict[str, tuple[Callable[[Directory], Any], Any]] = {
    "read": (lambda directory: directory.read("file"), DATA),
    "read_range": (lambda directory: directory.read_range("file", 100, 50), DATA[100:150]),
    "read_ranges": (read_many, DATA[:10] + DATA[5:15] + DATA[1000:1010]),
    "list": (lambda directory: directory.list("a/*"), ["a/1", "a/2"]),
    "entries": (lambda directory: [entry.path for entry in directory.entries("a")], ["a/1", "a/2"]),
    "exists": (
        lambda directory: (directory.exists("file"), directory.exists("a"), directory.exists("none")),
        (True, True, False),
    ),
    "write_atomic": (lambda directory: write(directory, "new", DATA), DATA),
    "publish": (lambda directory: (directory.publish("new", DATA), directory.read("new")), (True, DATA)),
    "publish again": (lambda directory: (directory.publish("file", b"other"), directory.read("file")), (False, DATA)),
    "remove": (remove, []),
}


def prepared() -> Directory:
    directory = Directory(new_url())
    for name, data in {"file": DATA, "a/1": b"", "a/2": b"2", "b/1": b""}.items():
        assert directory.publish(name, data)
    return directory


@pytest.mark.parametrize("use", USES)
def test_every_use_bears_every_fault(use: str, proxy: Proxy) -> None:
    function, expected = USES[use]
    for fault in FAULTS:
        directory = prepared()
        proxy.fault = failing(fault, 3)
        assert function(directory) == expected, fault
        assert proxy.fault(Request("any", "any")) is None, f"{fault} was not met three times"


@pytest.mark.parametrize("fault", ["silent", "slow"])
def test_who_does_not_answer_in_time_is_asked_again(fault: Fault, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opgrpo_data.places.remote.Patience", lambda: replace(QUICK, seconds=1.0))
    directory = prepared()
    start = time.monotonic()
    proxy.fault = failing(fault, 1, "GET")
    assert directory.read("file") == DATA
    proxy.fault = failing("silent", 1, "PUT")
    assert directory.publish("new", DATA)
    assert 2.0 <= time.monotonic() - start < 10


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as S3 allows."""
    monkeypatch.setattr(S3Parts, "size", SMALLEST_PART)


@pytest.mark.parametrize("fault", ["500", "reset", "lost"])
def test_a_large_file_bears_faults(fault: Fault, proxy: Proxy, small_parts: None) -> None:
    """Of its parts, and of their joining: when that answer is lost, the next try finds nothing to join."""
    directory = Directory(new_url())
    proxy.fault = failing(fault, 3, "PUT", "partNumber=2")
    assert write(directory, "file", LARGE) == LARGE
    proxy.fault = failing(fault, 1, "POST", "?uploadId")
    assert write(directory, "other", LARGE) == LARGE
    assert [entry.path for entry in directory.entries()] == ["file", "other"]


def test_a_large_file_that_fails_leaves_nothing(proxy: Proxy, small_parts: None) -> None:
    directory = Directory(new_url())
    directory.publish("file", b"old")
    proxy.fault = failing("503", 1000, "PUT", "partNumber=2")
    with pytest.raises(
        ConnectionError, match=f"^cannot write {directory.url}/file: 5 tries failed, the last with 503 SlowDown"
    ):
        write(directory, "file", LARGE)
    proxy.fault = lambda _: None
    assert directory.read("file") == b"old"
    assert unfinished_uploads(directory.url) == []


def test_a_lost_answer_to_a_publish_is_found_out(proxy: Proxy) -> None:
    """The server has our bytes, and the next try is refused: because of ourselves. What another wrote is another's."""
    directory = prepared()
    for number in range(5):  # on new connections and on used ones, which aiohttp tries again by itself
        proxy.requests.clear()
        proxy.fault = failing("lost", 1, "PUT")
        assert directory.publish(f"ours-{number}", DATA)
        assert [request.method for request in proxy.requests] == ["PUT", "PUT", "HEAD"]
    directory.publish("theirs", DATA)
    proxy.fault = failing("reset", 1, "PUT")
    assert not directory.publish("theirs", DATA)
    assert not directory.publish("ours-0", DATA)


@pytest.mark.parametrize("use", ["read", "read_ranges", "list", "publish", "write_atomic", "exists"])
def test_a_server_that_stays_away_is_told_in_one_line(use: str, proxy: Proxy) -> None:
    directory = prepared()
    proxy.requests.clear()
    proxy.fault = failing("500", 10**9)
    with pytest.raises(
        ConnectionError, match=r"^cannot [\w ]+ s3://\S+: 5 tries failed, the last with 500 .*: when the server"
    ):
        USES[use][0](directory)
    assert len(proxy.requests) == 5


# -- a store over a bad line -----------------------------------------------------------------------------------------


def use_store(url: str) -> dict[str, Any]:
    """Everything the data plane does, and what came of it."""
    store = Store.create(url)
    written = records(6, shape=(4, 16, 16))
    assert write_shard(store.directory, folder(), "00000", written[:4])
    assert write_shard(store.directory, folder(), "00001", written[4:])
    assert not write_shard(store.directory, folder(), "00001", written[4:])
    store.add_prompts([{"text": "a red square", "metadata": {}}], "train")
    store.add_run(RUN, {"config": {"name": "x", "seed": 1}, "command": [], "software": {}})
    rows = Store.open(url).read_tables("trajectories", store.files("trajectories", run=RUN)).to_pylist()
    planned = plan(trajectories(rows), rewards({row["trajectory_id"]: float(i) for i, row in enumerate(rows)}), plan_rule())
    store.publish_table(f"plans/run={RUN}/iter=000000.parquet", planned)
    batches = list(stream(store.directory, planned))
    location = LatentLocation.of(rows[0])
    store.quarantine("t5", CorruptionError("file", "member", 1, 2))
    return {
        "rows": [(row["trajectory_id"], row["latents_crc32"], row["media_crc32"]) for row in rows],
        "latents": {
            row["trajectory_id"]: read_latents(store.directory, LatentLocation.of(row), 0, 3).tobytes() for row in rows
        },
        "prefix": read_latents(store.directory, location, 0, 1).tobytes(),
        "media": [read_media(store.directory, row) for row in rows],
        "streamed": [(batch.microstep, [latents.tobytes() for latents in batch.latents], batch.damaged) for batch in batches],
        "quarantined": store.quarantined(),
        "counts": Catalog(store).query("SELECT count(*) AS n, (SELECT count(*) FROM plans) AS p FROM trajectories").to_pylist(),
        "runs": [document["run_id"] for document in store.documents("runs/*.json")],
    }


def test_a_store_in_a_bucket_is_one_on_disk(s3: str, tmp_path: Path) -> None:
    assert use_store(s3) == use_store(str(tmp_path / "store"))


def test_a_store_over_a_bad_line_is_the_same(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request in five fails, in any of six ways."""
    chance = random.Random(0)
    proxy.fault = lambda _: chance.choice(FAULTS) if chance.random() < 0.2 else None
    monkeypatch.setattr("opgrpo_data.places.remote.Patience", lambda: replace(QUICK, tries=12))
    assert use_store(new_url()) == use_store(str(tmp_path / "store"))
    assert len(proxy.requests) > 60


def test_an_outage_is_not_taken_for_damage(proxy: Proxy) -> None:
    store = Store.create(new_url())
    write_shard(store.directory, folder(), "00000", records(2))
    rows = shard_rows(store)
    planned = plan(trajectories(rows), rewards({"t0": 1.0, "t1": 2.0}), plan_rule())
    proxy.fault = failing("503", 10**9, "GET", ".tar")
    with pytest.raises(ConnectionError, match=r"cannot read .*latents\.tar: 5 tries failed"):
        list(stream(store.directory, planned))
    with pytest.raises(ConnectionError, match=r"cannot read .*media\.tar: 5 tries failed"):
        read_media(store.directory, rows[0])
    assert store.quarantined() == set()


# -- what users do wrong -----------------------------------------------------------------------------------------------


def attempt(url: str) -> str:
    """What opening a store at `url` says, within seconds."""
    start = time.monotonic()
    with pytest.raises((StoreError, OSError)) as caught:
        Store.open(url)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_is_no_such_bucket(s3: str) -> None:
    told = "cannot read s3://no-such-bucket/store/store.json: there is no bucket 'no-such-bucket': make it, or correct the URL"
    assert attempt("s3://no-such-bucket/store") == told
    with pytest.raises(OSError, match="there is no bucket"):
        Store.create("s3://no-such-bucket/store")
    assert "names no bucket: give s3://BUCKET/PREFIX" in attempt("s3://")


def test_there_is_no_such_store(s3: str) -> None:
    assert attempt(s3) == f"no store at {s3}: make one with `opgrpo init --store {s3} CONFIG`"


def test_the_credentials_are_wrong_or_missing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.at(monkeypatch, {"AWS_SECRET_ACCESS_KEY": "not the one"})
    told = attempt(s3)
    assert told.startswith(f"cannot read {s3}/store.json: the server refuses it with 403 SignatureDoesNotMatch")
    assert "not the one" not in told
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "no credentials (Unable to locate credentials): set AWS_ACCESS_KEY_ID and" in attempt(s3)


def test_nobody_answers(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.at(monkeypatch, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert attempt(s3).startswith(f"cannot read {s3}/store.json: no server answers (Could not connect to the endpoint URL")


def test_s3fs_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    assert attempt("s3://bucket/store").endswith(': pip install "opgrpo[s3]"')


@pytest.mark.parametrize(
    "url",
    [f"s3://KEY:{PASSWORD}@bucket/store", "s3://KEY:sec/ret@bucket/store", "simplecache::s3://KEY:x@y/z", "s3://:sesame@b/c"],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    told = attempt(url)
    assert "://...@" in told
    assert "leave it out; set AWS_ACCESS_KEY_ID" in told
    assert not any(secret in told for secret in (PASSWORD, "KEY:", "sec/ret", "sesame"))


def test_a_server_that_ignores_conditions_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = S3Objects.call

    def ignorant(self: S3Objects, method: str, path: str, moved: int = 0, **given: Any) -> dict[str, Any]:
        given.pop("IfNoneMatch", None)
        return call(self, method, path, moved, **given)

    monkeypatch.setattr(S3Objects, "call", ignorant)
    monkeypatch.setattr(S3Objects, "_proven", set())
    with pytest.raises(StoreError, match=f"{s3}/store.json: the server ignores If-None-Match, so that commits are not safe"):
        Store.create(s3)


# -- where the server is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "config file"])
def test_the_endpoint_comes_by_the_usual_means(
    name: str, s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if name == "config file":
        said = [f"{key.lower()} = {s3_server.environment()[key]}" for key in keys]
        Path(tmp_path, "config").write_text("\n".join(["[default]", f"endpoint_url = {s3_server.endpoint}", *said]))
        for key in keys:
            monkeypatch.delenv(key)
        servers.at(monkeypatch, {"AWS_CONFIG_FILE": str(tmp_path / "config")})
    else:
        servers.at(monkeypatch, {name: s3_server.endpoint})
    directory = Directory(s3)
    assert directory.publish("file", b"there")
    assert directory.read("file") == b"there"
