"""A reward that another machine computes: `opgrpo serve-reward` there, this client here. JSON and PNG, nothing executable.

POST URL/score {"samples": [{"prompt", "metadata", "kind": "image" | "video", "media": [base64 PNG, one a frame]}]} answers
{"reward", "version", "scores": [{"value", "detail"} | {"error"}]}; GET URL/about answers {"reward", "version"}.
"""

from __future__ import annotations

import base64
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pipelines import media as files
from pipelines.rewards.base import Media, Reward, Score, UnavailableError
from pipelines.rewards.frames import frames

MAX_ANSWER_BYTES = 64 * 1024**2
MAX_WAIT = 60.0
"""Seconds: no pause between two attempts is longer, whatever the server asks for."""


@dataclass
class HttpReward:
    """Asks a server. `name` and `version` are the server's, as of when this was built."""

    name: str
    version: str
    server: Server

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample; a sample that the server could not judge gets the server's error.

        Raises UnavailableError when the server cannot be reached, refuses us, or has become another reward; ValueError when
        it answers nonsense.
        """
        asked = [_encoded(*sample) for sample in zip(media, prompts, metadata, strict=True)]
        answer = self.server.ask("POST", "/score", {"samples": asked})
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(asked):
            found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise ValueError(f"{self.server.url} answered with {found} for {len(asked)} samples")
        if answer.get("version") != self.version:
            now = f"version {answer.get('version')!r}, no longer by {self.version!r}"
            raise UnavailableError(f"{self.server.url} judges by {now}: score again")
        return [self._score(score) for score in scores]

    def _score(self, said: Any) -> Score:
        if isinstance(said, dict) and isinstance(said.get("error"), str):
            return Score(float("nan"), {}, self.server.redacted(said["error"]))
        value = said.get("value") if isinstance(said, dict) else None
        detail = said.get("detail", {}) if isinstance(said, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(detail, dict):
            return Score(float("nan"), {}, f"{self.server.url} answered with no score: {self.server.redacted(str(said))[:100]}")
        return Score(float(value), detail)


def http(
    url: str,
    *,
    name: str | None = None,
    timeout: float = 60.0,
    retries: int = 5,
    backoff: float = 0.5,
    token_variable: str | None = None,
) -> Reward:
    """The reward that is served at `url`. Raises ValueError when no reward answers there.

    name: ours for it; None: the server's. timeout: seconds for one request, its answer included. retries: further attempts
    when the connection fails, time is up, or the server says 429 or 5xx; the first waits `backoff` seconds, each later one
    twice as long, give or take half. token_variable: the environment variable that holds the server's token.
    """
    server = Server(_checked_url(url), timeout, retries, backoff, _token(token_variable))
    about = server.ask("GET", "/about", None, retries=0)
    if not isinstance(about.get("reward"), str) or not isinstance(about.get("version"), str):
        raise ValueError(f"{url}/about does not tell a reward and its version: is an opgrpo reward served there?")
    return HttpReward(name or about["reward"], about["version"], server)


@dataclass
class Server:
    """One server: requests with retries. The token is never shown."""

    url: str
    timeout: float
    retries: int
    backoff: float
    token: str | None = field(repr=False)
    exhausted: bool = False
    """All attempts failed last time: until one succeeds, a request is tried once. A run must not wait for each batch."""

    def __post_init__(self) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ValueError('the reward http needs httpx: pip install "opgrpo[http]"') from error
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        self.client = httpx.Client(headers=headers, timeout=self.timeout)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None, retries: int | None = None) -> dict[str, Any]:
        """The JSON object that the server answers.

        Raises UnavailableError when all attempts failed or the server refuses us, ValueError when it refuses this request
        (413, 422) or its answer is no JSON object or too long.
        """
        attempts = 1 + (0 if self.exhausted else self.retries if retries is None else retries)
        for attempt in range(attempts):
            status, text, wait = self._attempt(method, path, body)
            if status is None or status == 429 or status >= 500:
                if attempt + 1 < attempts:
                    jitter = random.uniform(0.5, 1.5)  # noqa: S311 so that workers do not come back all at once
                    time.sleep(min(max(self.backoff * 2**attempt * jitter, wait), MAX_WAIT))
                continue
            self.exhausted = False
            return self._object(status, text)
        self.exhausted = True
        tries = "" if attempts == 1 else f" in {attempts} attempts"
        raise UnavailableError(
            f"no reward from {self.url}{tries}: {self.redacted(text)}. Does `opgrpo serve-reward` run there?"
        )

    def _attempt(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int | None, str, float]:
        """Status, text, and the seconds that the server asks us to wait; no status when there was no answer in time."""
        import httpx

        deadline = time.monotonic() + self.timeout
        answer = bytearray()
        try:
            with self.client.stream(method, f"{self.url}{path}", json=body) as response:
                for chunk in response.iter_bytes():
                    answer += chunk
                    if time.monotonic() > deadline:  # httpx counts from byte to byte: a drip would never end
                        return None, f"no answer in {self.timeout:g} s", 0.0
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise UnavailableError(f"{self.url} answers with more than {MAX_ANSWER_BYTES} bytes")
                status, wait = response.status_code, retry_after(response.headers.get("Retry-After"))
        except httpx.TimeoutException:
            return None, f"no answer in {self.timeout:g} s", 0.0
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}", 0.0
        text = answer.decode(errors="replace")
        return status, text if status == 200 else f"status {status}: {_reason(text)}", wait

    def _object(self, status: int, text: str) -> dict[str, Any]:
        if status in (413, 422):
            raise ValueError(f"{self.url} refuses the request: {self.redacted(text)}")
        if status != 200:
            raise UnavailableError(f"{self.url} refuses us: {self.redacted(text)}")
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f"{self.url} answered with no JSON object: {self.redacted(text[:100])!r}")
        return answer

    def redacted(self, text: str) -> str:
        """The text without our token, should a server repeat it."""
        return text if self.token is None else text.replace(self.token, "***")


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it says nothing that is understood."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else 0.0


def _encoded(sample: Media, prompt: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    pictures = [base64.b64encode(files.encode(frame, "png")).decode() for frame in frames(sample)]
    kind = "video" if sample.ndim == 4 else "image"
    return {"prompt": prompt, "metadata": dict(metadata), "kind": kind, "media": pictures}


def _reason(text: str) -> str:
    """What an error's body says, in one short line."""
    try:
        said = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        said = text
    return " ".join(str(said).split())[:200]


def _checked_url(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    if scheme not in ("http", "https") or not colon or not rest.strip("/"):
        raise ValueError(f"reward http: the url must be like http://host:8000, got {url!r}")
    if "@" in rest.partition("/")[0]:
        raise ValueError("reward http: no user or password in the url: it is stored. Give a token by token_variable")
    return url.rstrip("/")


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        state = "is not set" if not token else "holds characters that a header cannot carry"
        raise ValueError(f"reward http: the environment variable {variable} {state}: set it to the server's token")
    return token
