"""Which failures are borne, how long, and what is said of the others."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
    SSLError,
)
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data.places.retries import Patience, Server, is_transient

PLACE = "s3://bucket/some/key"
URL = {"endpoint_url": "http://server"}


def answer(status: int, code: str) -> OSError:
    """What s3fs raises for an answer of the server."""
    response = {"Error": {"Code": code, "Message": "it says"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = OSError(errno.EIO, "it says")
    error.__cause__ = ClientError(response, "GetObject")
    return error


TRANSIENT = [
    *(answer(status, "Whatever") for status in (408, 429, 500, 502, 503, 504)),
    *(answer(400, code) for code in ("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")),
    *(answer(409, code) for code in ("OperationAborted", "ConditionalRequestConflict")),
    answer(200, "SlowDown"),
    TimeoutError(),
    ConnectionResetError(),
    ClientPayloadError(),
    ReadTimeoutError(**URL),
    EndpointConnectionError(error="refused", **URL),
]
LASTING = [
    *(answer(status, "Whatever") for status in (301, 400, 401, 403, 404, 409, 412, 416, 501)),
    FileNotFoundError(),
    FileExistsError(),
    PermissionError(),
    OSError(errno.EINVAL, "no"),
    ValueError(),
    SSLError(error="certificate", **URL),
    NoCredentialsError(),
    ParamValidationError(report="no"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_passes(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_does_not_pass(error: Exception) -> None:
    assert not is_transient(error)


@given(tried=st.integers(1, 50), first=st.floats(0.01, 10), longest=st.floats(0.01, 10))
def test_waits_double_up_to_the_longest(tried: int, first: float, longest: float) -> None:
    whole = min(first * 2 ** (tried - 1), longest)
    assert whole / 2 <= Patience(first_wait=first, longest_wait=longest).wait(tried) <= whole


def test_a_try_may_take_longer_the_more_it_moves() -> None:
    patience = Patience(seconds=2.0, slowest_bytes=1000)
    assert [patience.allowed(size) for size in (0, 500, 10_000)] == [2.0, 2.5, 12.0]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited; nobody does."""
    waited: list[float] = []
    monkeypatch.setattr("opgrpo_data.places.retries.time.sleep", waited.append)
    return waited


def raising(*errors: Exception) -> Callable[[], str]:
    """A call that fails with each of these, then succeeds."""
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_it_is_asked_again_until_it_answers(waits: list[float]) -> None:
    assert Server(Patience(tries=8)).ask("read", PLACE, raising(*[answer(503, "SlowDown")] * 7)) == "done"
    assert len(waits) == 7
    assert 6 < sum(waits) < 17  # 0.2 s doubling up to 5 s, and a random half of that


def test_after_the_last_try_it_is_told(waits: list[float]) -> None:
    with pytest.raises(
        ConnectionError,
        match=r"^cannot read s3://bucket/some/key: 3 tries failed, the last with 503 SlowDown \(it says\): when the "
        "server is well again, run the same command again; what was committed is kept$",
    ):
        Server(Patience(tries=3)).ask("read", PLACE, raising(*[answer(503, "SlowDown")] * 3))
    assert len(waits) == 2


@pytest.mark.parametrize("error", [EndpointConnectionError(error="refused", **URL), ConnectTimeoutError(**URL)])
def test_who_never_answered_is_not_waited_for(error: Exception, waits: list[float]) -> None:
    server = Server(Patience())
    with pytest.raises(
        ConnectionError, match=f"^cannot list {PLACE}: no server answers .*: check AWS_ENDPOINT_URL and the net"
    ):
        server.ask("list", PLACE, raising(error))
    assert waits == []
    missing = FileNotFoundError()
    missing.__cause__ = answer(404, "NoSuchKey").__cause__
    with pytest.raises(FileNotFoundError, match=f"no such file: '{PLACE}'"):  # that was an answer
        server.ask("read", PLACE, raising(missing))
    assert server.ask("list", PLACE, raising(error)) == "done"


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (answer(404, "NoSuchBucket"), OSError, "there is no bucket 'bucket': make it, or correct the URL"),
        (
            answer(403, "AccessDenied"),
            PermissionError,
            r"the server refuses it with 403 AccessDenied .*: give other credentials",
        ),
        (answer(400, "ExpiredToken"), PermissionError, "the server refuses it with 400 ExpiredToken .*AWS_ACCESS_KEY_ID"),
        (NoCredentialsError(), PermissionError, r"no credentials \(Unable to locate credentials\): set AWS_ACCESS_KEY_ID and"),
        (SSLError(error="bad certificate", **URL), OSError, r"SSLError \(SSL validation failed .* bad certificate\)"),
        (ParamValidationError(report="bad name"), OSError, "ParamValidationError .* bad name"),
        (answer(412, "PreconditionFailed"), OSError, "412 PreconditionFailed"),
        (OSError(errno.ENOSPC, "full"), OSError, "full"),
    ],
)
def test_what_cannot_be_helped_is_an_oserror(error: Exception, kind: type[OSError], told: str, waits: list[float]) -> None:
    """A ValueError would pass for damaged data, and FileNotFoundError for a missing file."""
    with pytest.raises(kind, match=f"^cannot read {PLACE}: {told}") as caught:
        Server(Patience()).ask("read", PLACE, raising(error))
    assert not isinstance(caught.value, FileNotFoundError | ValueError)
    assert waits == []


def test_our_own_bugs_keep_their_names() -> None:
    with pytest.raises(KeyError, match="oops"):
        Server(Patience()).ask("read", PLACE, raising(KeyError("oops")))
