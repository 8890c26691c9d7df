"""A reward as a service: who may ask, how much at once, what else is refused, and a whole `opgrpo score` through it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines import media
from pipelines.reward_app import Limits
from pipelines.reward_server import serve
from pipelines.rewards.base import Media, Score, build_reward
from pipelines.rewards.judge import judge
from pipelines.score import score
from pipelines.selection import select
from tests.integration.harness import environment, opgrpo
from tests.pipelines.bad_rewards import Mood, brightness, digest, moody
from tests.pipelines.helpers import forked, pictures_of, rows_of
from tests.pipelines.reward_servers import served

SMALL_LIMITS = Limits(body_bytes=20_000, samples=3, pixels=200)
GREY = np.full((8, 8, 3), 51, np.uint8)
TOKEN = {"Authorization": "Bearer open sesame"}


def sample(picture: Media = GREY, **changes: Any) -> dict[str, Any]:
    """One sample of a request."""
    png = base64.b64encode(media.encode(picture, "png")).decode()
    return {"prompt": "grey", "metadata": {}, "kind": "image", "media": [png], **changes}


@pytest.fixture
def url() -> Iterator[str]:
    """The moody reward, tightly limited."""
    with served(moody(), limits=SMALL_LIMITS) as where:
        yield where


def post(url: str, body: Any, **options: Any) -> httpx.Response:
    """POST /score; a body that is no text is sent as JSON."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return httpx.post(f"{url}/score", content=content, **options)


def test_the_three_routes(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/about").json() == {"reward": "moody", "version": "1"}
    expected = {"reward": "moody", "version": "1", "scores": [{"value": brightness(GREY), "detail": {"height": 8}}]}
    assert post(url, {"samples": [sample()]}).json() == expected
    assert post(url, {"samples": []}).json()["scores"] == []
    assert [httpx.get(f"{url}{path}").status_code for path in ("/", "/docs", "/openapi.json", "/score")] == [404] * 3 + [405]


def test_only_who_has_the_token_may_ask() -> None:
    with served(moody(), token="open sesame") as url:
        for given in ("", "Bearer open", "open sesame", "Bearer ü", "bearer open sesame"):
            headers = [(b"Authorization", given.encode())]
            answers = [httpx.get(f"{url}/about", headers=headers), post(url, {"samples": [sample()]}, headers=headers)]
            assert [answer.status_code for answer in answers] == [401, 401]
            assert "sesame" not in answers[0].text
        assert httpx.get(f"{url}/about").status_code == 401
        assert httpx.get(f"{url}/about", headers=TOKEN).status_code == 200
        assert post(url, {"samples": [sample()]}, headers=TOKEN).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_who_has_no_token_cannot_send_a_body(mood: Mood) -> None:
    with served(moody(), token="open sesame", limits=SMALL_LIMITS) as url:
        assert post(url, b"x" * 1_000_000).status_code == 401
    assert mood.batches == []


def chunks(count: int) -> Iterator[bytes]:
    """A body whose length is not announced."""
    for _ in range(count):
        yield b" " * 1000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b" " * 20_001, "the body has more than 20000 bytes: send smaller batches"),
        (b" " * 2_000_000, "the body has more than 20000 bytes"),
        ({"samples": [sample()] * 4}, "4 samples, at most 3: send smaller batches"),
        ({"samples": [sample(np.zeros((20, 11, 3), np.uint8))]}, "220 pixels, at most 200: send smaller batches"),
        ({"samples": [sample(media=[sample()["media"][0]] * 4, kind="video")]}, "256 pixels, at most 200"),
    ],
)
def test_too_much_at_once(url: str, body: Any, message: str, mood: Mood) -> None:
    answer = post(url, body)
    assert answer.status_code == 413
    assert message in answer.json()["detail"]
    assert mood.batches == []


def test_a_body_of_unknown_length_is_counted(url: str) -> None:
    assert httpx.post(f"{url}/score", content=chunks(30)).status_code == 413


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "body: Invalid JSON"),
        (b"\xff\xfe", "body: Invalid JSON"),
        ("[]", "body: Input should be an object"),
        ({}, "samples: Field required"),
        ({"samples": [{}]}, "samples.0.prompt: Field required; samples.0.metadata: Field required; samples.0.kind: Field"),
        ({"samples": [sample(kind="audio")]}, "samples.0.kind: Input should be 'image' or 'video'"),
        ({"samples": [sample(media=[])]}, "samples.0.media: List should have at least 1 item"),
        ({"samples": [sample(metadata="none")]}, "samples.0.metadata: Input should be an object"),
    ],
)
def test_what_is_no_request(url: str, body: Any, message: str, mood: Mood) -> None:
    answer = post(url, body)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)
    assert mood.batches == []


def bomb() -> bytes:
    """A PNG whose header promises 30,000 by 30,000 pixels."""
    data = bytearray(media.encode(GREY, "png"))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"media": ["%%%"]}, "media: not base64"),
        ({"media": ["ü"]}, "media: not base64"),
        ({"media": [base64.b64encode(b"GIF89a").decode()]}, "media: not a PNG"),
        ({"media": [base64.b64encode(media.encode(GREY, "webp")).decode()]}, "media: not a PNG"),
        ({"media": [base64.b64encode(media.encode(GREY, "png")[:45]).decode()]}, "media: not a picture"),
        ({"media": sample()["media"] * 2}, "media: an image has one frame, got 2"),
        (
            {"kind": "video", "media": sample()["media"] + sample(GREY[:4])["media"]},
            "media: the frames of a video have several sizes",
        ),
    ],
)
def test_a_sample_that_cannot_be_read_costs_only_itself(url: str, changes: dict[str, Any], message: str) -> None:
    scores = post(url, {"samples": [sample(), sample(**changes)]}).json()["scores"]
    assert scores[0] == {"value": brightness(GREY), "detail": {"height": 8}}
    assert scores[1]["error"].startswith(message)


def test_a_bomb_is_not_decoded() -> None:
    asked = {"samples": [sample(media=[base64.b64encode(bomb()).decode()])]}
    with served(moody()) as url:
        assert "900000000 pixels, at most" in post(url, asked).json()["detail"]
    with served(moody(), limits=Limits(pixels=2**40)) as url:
        (told,) = post(url, asked).json()["scores"]
        assert told["error"].startswith("media: not a picture: Image size (900000000 pixels) exceeds limit")


class Slow:
    """Counts how many callers are inside at once."""

    name, version = "slow", "1"

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Zero, after a while."""
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.1)
        self.inside -= 1
        return [Score(0.0, {}) for _ in media]


def test_one_scores_at_a_time_and_the_server_stays_awake() -> None:
    reward, statuses = Slow(), list[int]()
    with served(reward) as url:
        asking = [
            threading.Thread(target=lambda: statuses.append(post(url, {"samples": [sample()]}).status_code)) for _ in "abcd"
        ]
        for thread in asking:
            thread.start()
        while not reward.inside:
            time.sleep(0.001)
        began = time.monotonic()
        assert httpx.get(f"{url}/health").status_code == 200
        assert time.monotonic() - began < 0.3
        assert len(statuses) < 4
        for thread in asking:
            thread.join()
    assert (statuses, reward.most) == ([200] * 4, 1)


# -- the whole stage, through the network -----------------------------------------------------------------------------------


def test_scoring_over_http_stores_what_scoring_here_would(rolled: Path, tmp_path: Path, mood: Mood) -> None:
    here = forked(rolled, tmp_path / "here")
    bad = sorted(pictures_of(here))[3]
    mood.kind, mood.pictures = "raises", {digest(pictures_of(here)[bad])}
    score(here, 0)
    with served(moody()) as url:
        there = forked(rolled, tmp_path / "there", reward={"name": "http", "options": {"url": url}})
        outcome = score(there, 0)
        assert (outcome.done, outcome.detail["failed"]) == (8, 1)
        assert rows_of(there, "rewards") == rows_of(here, "rewards")
        select(there, 0)
        assert bad not in {row["trajectory_id"] for row in rows_of(there, "plans")}
        mood.kind = "good"
        again = score(there, 0)
        assert (again.done, again.skipped, again.detail["failed"]) == (1, 7, 0)


def test_a_part_and_two_workers_over_http(rolled: Path, tmp_path: Path, mood: Mood) -> None:
    with served(moody()) as url:
        parts = [
            {"name": "http", "weight": 1, "options": {"url": url, "name": "remote"}},
            {"name": "tests.pipelines.plain_rewards:warmth", "weight": 2},
        ]
        reward = {"name": "composite", "options": {"parts": parts}, "workers": 2, "batch_size": 2}
        experiment = forked(rolled, tmp_path, reward=reward)
        assert score(experiment).detail["failed"] == 0
    rows = rows_of(experiment, "rewards")
    assert {name: sum(row["reward"] == name for row in rows) for name in ("composite", "remote", "warmth")} == {
        "composite": 8,
        "remote": 8,
        "warmth": 8,
    }
    assert sum(mood.batches) == 8


def test_a_server_that_goes_away_leaves_error_rows_that_are_tried_again(rolled: Path, tmp_path: Path) -> None:
    with served(moody()) as url:
        options = {"url": url, "retries": 1, "backoff": 0.01}
        experiment = forked(rolled, tmp_path, reward={"name": "http", "options": options})
        experiment.reward(experiment.config.reward)
    with pytest.raises(ValueError, match=f"reward moody failed on all 8 samples: no reward from {url} in 2 attempts"):
        score(experiment)
    rows = rows_of(experiment, "rewards")
    assert len(rows) == 8
    assert all("ConnectError" in row["error"] for row in rows)


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "serve-reward", "scene_soft", "--port", "0", "--token-variable", "REWARD_TOKEN"]
    given = {**environment(), "REWARD_TOKEN": "open sesame"}
    server = subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert server.stderr is not None
        said = iter(server.stderr.readline, "")
        url = next(line for line in said if "Uvicorn running on" in line).split()[4]
        assert httpx.get(f"{url}/about", headers=TOKEN).json()["reward"] == "scene_soft"
        assert httpx.get(f"{url}/about").status_code == 401
        os.environ["REWARD_TOKEN"] = "open sesame"
        remote = build_reward("http", {"url": url, "token_variable": "REWARD_TOKEN"})
        (judged,) = judge(remote, [np.zeros((24, 24, 3), np.uint8)], ["a red circle"], [{}])
        assert judged.error is not None
        assert judged.error.startswith("ValueError: scene metadata lacks")  # the reward's own words
    finally:
        os.environ.pop("REWARD_TOKEN", None)
        server.send_signal(signal.SIGINT)
        _, rest = server.communicate(timeout=20)
    assert "open sesame" not in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["beauty"], "error: unknown reward 'beauty'; known: "),
        (["scene_soft", "--options", "{"], "error: --options is not JSON"),
        (["scene_soft", "--options", "[1]"], "error: --options must be a JSON object, got '[1]'"),
        (["scene_soft", "--options", '{"shade": 1}'], "error: reward 'scene_soft' cannot be built with options {'shade': 1}"),
        (["scene_soft", "--host", "0.0.0.0"], "error: --host 0.0.0.0 lets other machines ask: set a token"),
        (["scene_soft", "--host", "example.org"], "error: --host example.org lets other machines ask"),
        (["scene_soft", "--token-variable", "NO_SUCH_TOKEN"], "error: --token-variable names NO_SUCH_TOKEN, which is not set"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], message: str) -> None:
    done = opgrpo("serve-reward", *arguments, check=False)
    assert done.returncode == (2 if message.startswith("error: --options") else 1)  # usage, or what cannot be served
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "pipelines.reward_app")
    with pytest.raises(ValueError, match=rf'serving a reward needs {missing}: pip install "opgrpo\[serve\]"'):
        serve("scene_soft", {}, "127.0.0.1", 0, None)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ValueError, match=r'the reward http needs httpx: pip install "opgrpo\[http\]"'):
        build_reward("http", {"url": "http://127.0.0.1:1"})
