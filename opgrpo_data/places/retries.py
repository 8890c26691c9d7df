"""Patience with a server: which failures pass by themselves, how long to wait for them, how to tell of those that do not."""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

Result = TypeVar("Result")

TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    "BadDigest",  # the request was damaged on its way
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
REFUSED_CODES = {"AccessDenied", "AuthorizationHeaderMalformed", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken"}
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE and ~/.aws"


@dataclass(frozen=True)
class Patience:
    """How often and how long. Between two tries passes a random half to whole of a wait that doubles up to longest_wait.

    first_wait, longest_wait: seconds. seconds: what one try may take, and a second more for each slowest_bytes it moves.
    """

    tries: int = 8
    first_wait: float = 0.2
    longest_wait: float = 5.0
    seconds: float = 30.0
    slowest_bytes: int = 128 * 1024

    def wait(self, tried: int) -> float:
        """Seconds to wait after `tried` tries."""
        longest = min(self.first_wait * 2.0 ** (tried - 1), self.longest_wait)
        return longest * secrets.SystemRandom().uniform(0.5, 1.0)

    def allowed(self, size: int) -> float:
        """Seconds that one try may take which moves `size` bytes."""
        return self.seconds + size / self.slowest_bytes


class Server:
    """What asks a server for things again and again. One that has never answered is not waited for: it may not be there."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.answered = False

    def ask(self, action: str, place: str, call: Callable[[], Result]) -> Result:
        """The result of `call`. `action` and `place` say in errors what failed: ("read", "s3://bucket/key").

        FileNotFoundError and FileExistsError are answers and come as they are. All else that cannot be helped is another
        OSError, never a ValueError: a store must not take a server's outage for damaged data.
        """
        for tried in range(1, self.patience.tries + 1):
            try:
                result = call()
            except Exception as error:
                self.answered = self.answered or bool(_answer(error)[0])
                if not is_transient(error):
                    raise _final(error, action, place) from error
                if _never_reached(error) and not self.answered:
                    raise ConnectionError(
                        f"cannot {action} {place}: no server answers ({error}): check AWS_ENDPOINT_URL and the network"
                    ) from error
                if tried == self.patience.tries:
                    raise ConnectionError(
                        f"cannot {action} {place}: {tried} tries failed, the last with {_told(error)}: when the server is "
                        "well again, run the same command again; what was committed is kept"
                    ) from error
                time.sleep(self.patience.wait(tried))
            else:
                self.answered = True
                return result
        raise AssertionError("a patience of no tries")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later: a busy or failing server, a broken or silent connection."""
    status, code = _answer(error)
    if status:
        return status in TRANSIENT_STATUS or code in TRANSIENT_CODES
    return isinstance(error, _broken_connections()) and not isinstance(error, _lasting())


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a server's answer; (0, "") where none came."""
    for candidate in (error, error.__cause__):
        response: Any = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            return status, str(response.get("Error", {}).get("Code", ""))
    return 0, ""


@cache
def _broken_connections() -> tuple[type[BaseException], ...]:
    classes: list[type[BaseException]] = [TimeoutError, ConnectionError]
    with suppress(ImportError):
        from aiohttp import ClientError
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        classes += [ClientError, exceptions.ConnectionError, exceptions.HTTPClientError, ResponseParserError]
    return tuple(classes)


@cache
def _lasting() -> tuple[type[BaseException], ...]:
    """Failures to connect that no waiting mends."""
    with suppress(ImportError):
        from botocore.exceptions import InvalidProxiesConfigError, SSLError

        return SSLError, InvalidProxiesConfigError
    return ()


def _never_reached(error: BaseException) -> bool:
    if isinstance(error, ConnectionRefusedError):
        return True
    with suppress(ImportError):
        from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, ProxyConnectionError

        return isinstance(error, EndpointConnectionError | ConnectTimeoutError | ProxyConnectionError)
    return False


def _without_credentials(error: BaseException) -> bool:
    with suppress(ImportError):
        from botocore import exceptions

        classes = exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError
        return isinstance(error, (*classes, exceptions.ProfileNotFound, exceptions.SSOError, exceptions.TokenRetrievalError))
    return False


def _final(error: Exception, action: str, place: str) -> Exception:
    """The error to tell of what no waiting mends."""
    status, code = _answer(error)
    if code == "NoSuchBucket":
        bucket = place.partition("://")[2].partition("/")[0]
        return OSError(f"cannot {action} {place}: there is no bucket {bucket!r}: make it, or correct the URL")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file", place)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "the name is taken", place)
    if _without_credentials(error):
        return PermissionError(f"cannot {action} {place}: no credentials ({error}): {CREDENTIALS}")
    if status in (401, 403) or code in REFUSED_CODES or isinstance(error, PermissionError):
        return PermissionError(
            f"cannot {action} {place}: the server refuses it with {_told(error)}: give other credentials ({CREDENTIALS}), "
            "or these the right to it"
        )
    if not isinstance(error, OSError) and not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
        return error  # a bug, which keeps its own name
    return OSError(f"cannot {action} {place}: {_told(error)}")


def _told(error: BaseException) -> str:
    status, code = _answer(error)
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    if status:
        return f"{status} {code} ({text})"
    name = type(error).__name__
    return text if type(error) is OSError else f"{name} ({text})" if text else name
