"""S3 for tests: a real SeaweedFS server, started once a session, moto as a second opinion, a proxy that injects faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import s3fs

from benchmarks.store.proxy import Fault, Proxy, Request, running
from benchmarks.store.server import S3Server, seaweedfs
from opgrpo_data.io import Directory
from opgrpo_data.places import remote
from opgrpo_data.places.remote import RemoteFiles
from opgrpo_data.places.retries import Patience, Server
from opgrpo_data.places.s3 import S3Objects

BUCKET = "opgrpo-tests"
QUICK = Patience(tries=5, first_wait=0.002, longest_wait=0.01, seconds=5.0, slowest_bytes=2**25)
"""Four failures are borne, and nobody waits for them."""

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with one bucket."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server, pytest.MonkeyPatch.context() as patch:
        at(patch, server.environment())
        make_bucket()
        Directory(new_url()).publish("first", b"")  # takes longer than others: the server makes its volumes
        yield server


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """The URL of moto's server, with the same bucket. It knows no credentials: any will do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        at(patch, S3Server(port).environment())
        make_bucket()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty place on the real server, which every S3 client of the test finds."""
    at(monkeypatch, s3_server.environment())
    yield new_url()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that every S3 client of the test goes through, impatiently; its `fault` is for the test to set."""
    with running(Proxy(s3_server.port)) as proxy:
        at(monkeypatch, s3_server.environment(proxy.port))
        monkeypatch.setattr(remote, "Patience", lambda: QUICK)
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


def at(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """From here on, S3 is there. Open filesystems are cached by their options, which do not tell where they lead."""
    for name, value in environment.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


def new_url() -> str:
    """A place in the bucket that no test has used."""
    return f"s3://{BUCKET}/place-{next(_numbers)}"


def make_bucket() -> None:
    """Make the bucket at the endpoint that the environment names; a server may need a moment after its start."""
    objects = S3Objects(s3fs.S3FileSystem(), Patience())
    Server(Patience()).ask("make", BUCKET, partial(objects.call, "create_bucket", BUCKET))


def unfinished_uploads(url: str) -> list[Any]:
    """Uploads in parts below a place that were neither joined nor dropped."""
    files = Directory(url).files
    assert isinstance(files, RemoteFiles)
    assert isinstance(files.objects, S3Objects)
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    told = files.objects.call("list_multipart_uploads", BUCKET, Prefix=prefix)
    return list(told.get("Uploads", []))


def failing(fault: Fault, times: int, method: str | None = None, path: str = "") -> Callable[[Request], Fault | None]:
    """That many requests fail, of one method if it is named and whose path holds a text; those after them do not."""
    left = itertools.count(times, -1)

    def decide(request: Request) -> Fault | None:
        wanted = method in (None, request.method) and path in request.path
        return fault if wanted and next(left) > 0 else None

    return decide
