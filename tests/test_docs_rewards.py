"""docs/new_reward.md is true: its files are the examples, its commands run on them, its service serves, its JSON is ours."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pipelines.reward_app import ScoreRequest
from pipelines.rewards.http import HttpReward, Server
from tests.integration.harness import environment, opgrpo, opgrpo_json

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "new_reward.md").read_text()
FILE = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
FILES = dict(FILE.findall(PAGE))


def blocks(language: str) -> list[str]:
    """The page's blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def extracted(folder: Path) -> None:
    """Write the page's files into a folder."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_the_files_on_the_page_are_the_examples() -> None:
    assert len(FILES) == len(blocks("python")) + len(blocks("yaml")) == 5
    for name, text in FILES.items():
        assert (ROOT / name).read_text() == text, name


def test_the_commands_run_on_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds nothing but what the page shows."""
    extracted(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = [line[2:] for block in blocks("console") for line in block.splitlines()]
    printed = [opgrpo(*shlex.split(command)[1:]).stdout for command in commands]
    scored = next(text for command, text in zip(commands, printed, strict=True) if " score " in command)
    assert re.search(
        r"done 8, already there 0, reward warmth, version [0-9a-f]{12}, failed 0, samples_per_second [\d.]+", scored
    )
    means = opgrpo_json(*shlex.split(commands[-1])[1:])
    assert [(row["reward"], row["n"]) for row in means] == [
        (name, 16) for name in ("composite", "palette", "scene_soft", "warmth")
    ]
    whole, palette, scene, warm = (row["mean"] for row in means)
    assert whole == pytest.approx(0.7 * scene + 0.1 * warm + 0.2 * palette, abs=2e-3)

    file = tmp_path / "examples" / "rewards" / "warmth.py"
    file.write_text(file.read_text() + "# an edit\n")
    again = opgrpo("score", "examples/my_reward.yaml", "--store", "demo-store", "--set", "reward.workers=2", process=True)
    assert "done 8, already there 0" in again.stdout


def test_the_service_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own commands, on a port that is free."""
    extracted(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWARD_TOKEN", "a long secret")
    export, serve = blocks("sh")[0].splitlines()
    (run,) = blocks("sh")[1].splitlines()
    assert export == 'export REWARD_TOKEN="a long secret"'
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [port if word == "8000" else word for word in shlex.split(serve)[1:]]
    assert port in words
    given = {**environment(), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, "-m", "cli", *words], env=given, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not answers(url):
            assert server.poll() is None
            assert time.monotonic() < deadline
        arguments = [*shlex.split(run)[1:], "--set", f"reward.options.url={url}", "--set", "iterations=1"]
        result = opgrpo_json(*arguments)
        assert result["iterations"] == 1
    finally:
        server.terminate()
        server.wait(20)
    rows = opgrpo_json("sql", "--store", "demo-store", "SELECT DISTINCT reward, version FROM rewards")
    assert rows == [{"reward": "palette", "version": "1-214-39-40-100"}]
    assert not [path for path in (tmp_path / "demo-store").rglob("*.json") if "a long secret" in path.read_text()]


def answers(url: str) -> bool:
    """Whether a server is up."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        time.sleep(0.05)
        return False


def test_the_protocol_on_the_page_is_ours() -> None:
    request, answer = (json.loads(block) for block in blocks("json"))
    assert ScoreRequest.model_validate(request, extra="forbid", strict=True).samples[0].prompt == "a red circle"
    reward = HttpReward("palette", "1", Server("http://127.0.0.1:1", 1.0, 0, 0.0, None))
    value, error = (reward._score(score) for score in answer["scores"])
    assert (value.value, value.detail, value.error) == (0.25, {"nearest": 3.0}, None)
    assert error.error == "why there is no value"
    assert answer.keys() == {"reward", "version", "scores"}
