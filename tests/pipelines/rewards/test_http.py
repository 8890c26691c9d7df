"""The reward over HTTP: its protocol against our own server, its patience and its words against a server that misbehaves."""

from __future__ import annotations

import base64
import io
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.rewards.base import Media, Reward, Score, UnavailableError, build_reward
from pipelines.rewards.http import MAX_ANSWER_BYTES, retry_after
from pipelines.rewards.judge import judge
from tests.pipelines.reward_servers import Misbehaving, answer, misbehaving, send, served, status

SAMPLES = [np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8) for seed in range(3)]
TEXTS = ["a", "b", "ü"]
DATA: list[dict[str, Any]] = [{}, {"count": 2}, {"nested": {"x": [1]}}]


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    """One that misbehaves on demand."""
    with misbehaving() as state:
        yield state


def client(url: str, **options: Any) -> Reward:
    """A reward with short pauses."""
    return build_reward("http", {"url": url, "backoff": 0.01, **options})


class Seen:
    """Keeps what it was given."""

    name, version = "seen", "3"

    def __init__(self) -> None:
        self.seen: list[tuple[list[Media], list[str], list[Mapping[str, Any]]]] = []

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """The mean of each sample; the second of three is beyond it."""
        self.seen.append((list(media), list(prompts), list(metadata)))
        broken = Score(math.nan, {}, "too abstract")
        return [
            broken if text == "b" else Score(float(m.mean()), {"text": text}) for m, text in zip(media, prompts, strict=True)
        ]


def test_samples_and_scores_go_through_unchanged() -> None:
    video = np.stack(SAMPLES[:2])
    reward = Seen()
    with served(reward) as url:
        remote = client(url)
        assert (remote.name, remote.version) == ("seen", "3")
        scores = remote.score([SAMPLES[0], SAMPLES[1], video], TEXTS, DATA)
    (media, texts, metadata), *more = reward.seen
    assert more == []
    assert (texts, metadata) == (TEXTS, DATA)
    for sent, received in zip([SAMPLES[0], SAMPLES[1], video], media, strict=True):
        assert received.dtype == np.uint8
        assert np.array_equal(sent, received)
    assert scores[0] == Score(float(SAMPLES[0].mean()), {"text": "a"})
    assert scores[1].error == "too abstract"
    assert scores[2] == Score(float(video.mean()), {"text": "ü"})


def test_the_wire_format(server: Misbehaving) -> None:
    """As docs/new_reward.md tells it to whoever writes another server."""
    client(server.url).score([SAMPLES[0], np.stack(SAMPLES)], TEXTS[:2], DATA[:2])
    (body,) = server.asked
    assert body["samples"][0].keys() == {"prompt", "metadata", "kind", "media"}
    assert [(s["prompt"], s["metadata"], s["kind"], len(s["media"])) for s in body["samples"]] == [
        ("a", {}, "image", 1),
        ("b", {"count": 2}, "video", 3),
    ]
    first = Image.open(io.BytesIO(base64.b64decode(body["samples"][0]["media"][0])))
    assert first.format == "PNG"
    assert np.array_equal(np.asarray(first), SAMPLES[0])


def test_a_name_of_ours(server: Misbehaving) -> None:
    assert client(server.url, name="mine").name == "mine"


# -- patience ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_what_passes_is_tried_again(server: Misbehaving, code: int) -> None:
    remote = client(server.url)
    server.answers += [status(code)] * 3
    assert [score.value for score in remote.score(SAMPLES, TEXTS, DATA)] == [0.5] * 3
    assert server.batches == [3] * 4


def test_pauses_double_and_retry_after_is_honoured(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("pipelines.rewards.http.time.sleep", pauses.append)
    remote = client(server.url, backoff=1.0, retries=4)
    server.answers += [status(503), status(503), status(429, Retry_After="7"), status(503, Retry_After="86400")]
    remote.score(SAMPLES, TEXTS, DATA)
    assert 0.5 <= pauses[0] <= 1.5
    assert 1.0 <= pauses[1] <= 3.0
    assert pauses[2] >= 7.0
    assert pauses[3] == 60.0


def test_retry_after_as_number_date_or_nonsense() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    assert retry_after(date) == pytest.approx(30, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [retry_after(header) for header in (None, "12", "-3", "soon", "1e9", "Wed, 21 Oct 2015 07:28:00")] == [
        0,
        12,
        0,
        0,
        0,
        0,
    ]


def test_a_server_that_comes_up_later_is_waited_for() -> None:
    with misbehaving() as early:
        remote, port = client(early.url, backoff=0.2), int(early.url.rpartition(":")[2])
    scores: list[Score] = []
    asking = threading.Thread(target=lambda: scores.extend(remote.score(SAMPLES, TEXTS, DATA)))
    asking.start()
    time.sleep(0.15)
    with misbehaving(port):
        asking.join()
    assert [score.value for score in scores] == [0.5] * 3


def drip(handler: Any, _: Any) -> None:
    """A byte now and then: the connection is never idle for long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def silence(_: Any, __: Any) -> None:
    """No answer while the client waits."""
    time.sleep(0.6)


@pytest.mark.parametrize("slow", [drip, silence])
def test_a_slow_answer_is_given_up_and_tried_again(server: Misbehaving, slow: Any) -> None:
    remote = client(server.url, timeout=0.3)
    server.answers.append(slow)
    began = time.monotonic()
    assert [score.value for score in remote.score(SAMPLES, TEXTS, DATA)] == [0.5] * 3
    assert time.monotonic() - began < 1.5


def test_after_all_attempts_the_batch_fails_as_a_whole_and_the_next_is_tried_once(server: Misbehaving) -> None:
    remote = client(server.url, retries=2)
    server.answers += [status(503, "out of memory")] * 4
    judged = judge(remote, SAMPLES, TEXTS, DATA)
    expected = f"no reward from {server.url} in 3 attempts: status 503: out of memory. Does `opgrpo serve-reward` run there?"
    assert [one.error for one in judged] == [expected] * 3
    assert server.batches == [3, 3, 3]
    assert all(one.error is not None for one in judge(remote, SAMPLES, TEXTS, DATA))
    assert server.batches == [3] * 4
    assert [one.value for one in judge(remote, SAMPLES, TEXTS, DATA)] == [0.5] * 3
    server.answers += [status(503)]
    assert [one.value for one in judge(remote, SAMPLES, TEXTS, DATA)] == [0.5] * 3  # patient again


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 401, 403, 404, 301])
def test_a_refusal_is_an_error_at_once(server: Misbehaving, code: int) -> None:
    remote = client(server.url)
    server.answers.append(status(code, "not\nyou", Location="http://127.0.0.1:1"))
    judged = judge(remote, SAMPLES, TEXTS, DATA)
    assert [one.error for one in judged] == [f"{server.url} refuses us: status {code}: not you"] * 3
    assert server.batches == [3]


@pytest.mark.parametrize("code", [413, 422])
def test_a_batch_that_is_too_much_is_sent_sample_by_sample(server: Misbehaving, code: int) -> None:
    remote = client(server.url)
    server.answers.append(status(code, "too large"))
    assert [one.value for one in judge(remote, SAMPLES, TEXTS, DATA)] == [0.5] * 3
    assert server.batches == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>a proxy</html>", "answered with no JSON object: '<html>a proxy</html>'"),
        ("[1, 2, 3]", "answered with no JSON object"),
        (b"\xff\xfe", "answered with no JSON object"),
        ('{"version": "1"}', "answered with no list of scores for 3 samples"),
        ('{"version": "1", "scores": {}}', "answered with no list of scores for 3 samples"),
        (lambda n: [{"value": 1.0}] * (n - 1), "answered with 2 scores for 3 samples"),
        (lambda n: [{"value": 1.0}] * (n + 1), "answered with 4 scores for 3 samples"),
    ],
)
def test_nonsense_is_named(server: Misbehaving, body: Any, message: str) -> None:
    remote = client(server.url)
    server.answers.append(answer(body))
    with pytest.raises(ValueError, match=message) as raised:
        remote.score(SAMPLES, TEXTS, DATA)
    assert not isinstance(raised.value, UnavailableError)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"error": "blurred"}, "blurred"),
        ({"value": math.nan}, "the value is nan, not a finite number"),
        ({"value": math.inf}, "the value is inf, not a finite number"),
        ({"value": "1"}, "answered with no score: {'value': '1'}"),
        ({"value": True}, "answered with no score"),
        ({"value": None}, "answered with no score"),
        ({"value": 1, "detail": "much"}, "answered with no score"),
        ({}, "answered with no score"),
        (0.5, "answered with no score: 0.5"),
    ],
)
def test_one_bad_score_costs_its_sample_only(server: Misbehaving, score: Any, message: str) -> None:
    remote = client(server.url)
    server.answers.append(answer(lambda n: [{"value": 1.0, "detail": {"n": n}}, score, {"value": 2}]))
    judged = judge(remote, SAMPLES, TEXTS, DATA)
    assert [one.value for one in judged] == [1.0, None, 2.0]
    assert judged[0].detail == '{"n":3}'
    assert judged[1].error is not None
    assert message in judged[1].error
    assert server.batches == [3]


def test_an_answer_without_end_is_cut(server: Misbehaving) -> None:
    remote = client(server.url)
    server.answers.append(lambda handler, _: send(handler, 200, b" " * (MAX_ANSWER_BYTES + 2**20)))
    judged = judge(remote, SAMPLES, TEXTS, DATA)
    assert {one.error for one in judged} == {f"{server.url} answers with more than {MAX_ANSWER_BYTES} bytes"}
    assert server.batches == [3]


def test_a_server_that_became_another_reward_is_refused(server: Misbehaving) -> None:
    remote = client(server.url)
    server.version = "2"
    judged = judge(remote, SAMPLES, TEXTS, DATA)
    assert {one.error for one in judged} == {f"{server.url} judges by version '2', no longer by '1': score again"}


# -- building ------------------------------------------------------------------------------------------------------------


def test_no_server_is_a_clear_error_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"no reward from {url}: ConnectError: .*Does `opgrpo serve-reward` run there"):
        build_reward("http", {"url": url})
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("body", ["{}", '{"reward": 1, "version": "1"}', '{"reward": "a", "version": null}'])
def test_another_service_is_no_reward(server: Misbehaving, body: str) -> None:
    server.answers.append(answer(body))
    with pytest.raises(ValueError, match="/about does not tell a reward and its version: is an opgrpo reward served there"):
        client(server.url)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "file:///etc/passwd", ""])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=f"the url must be like http://host:8000, got '{url}'"):
        client(url)


def test_a_secret_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="no user or password in the url: it is stored") as raised:
        client("http://me:hush@host:8000")
    assert "hush" not in str(raised.value)


# -- the token -----------------------------------------------------------------------------------------------------------


def test_the_token_goes_into_the_header_and_nowhere_else(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "hush-hush\n")
    remote = client(server.url, token_variable="REWARD_TOKEN", retries=0)
    assert "hush" not in repr(remote)
    remote.score(SAMPLES[:1], [""], [{}])
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer hush-hush"] * 2

    server.answers += [
        status(401, "wrong token: Bearer hush-hush"),
        status(500, "cannot read Bearer hush-hush"),
        answer("hush-hush"),
        answer(lambda _: [{"error": "hush-hush"}]),
        answer(lambda _: [{"value": "hush-hush"}]),
    ]
    for _ in range(5):
        (judged,) = judge(remote, SAMPLES[:1], [""], [{}])
        assert judged.error is not None
        assert "***" in judged.error
        assert "hush" not in judged.error


@pytest.mark.parametrize(
    ("token", "why"), [(None, "is not set"), (" ", "is not set"), ("a\nb", "characters"), ("ü", "characters")]
)
def test_a_token_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, token: str | None, why: str) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("REWARD_TOKEN", token)
    with pytest.raises(ValueError, match=f"the environment variable REWARD_TOKEN .*{why}"):
        client("http://127.0.0.1:1", token_variable="REWARD_TOKEN")
