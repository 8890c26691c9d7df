"""The command line as `--help` shows it."""

from __future__ import annotations

import re

from tests.integration.harness import opgrpo

COMMANDS = (
    "init rollout select eval score train run quickstart sql sample export import evaluate-offline verify gc compact pin "
    "migrate serve-reward store"
)


def _named(text: str) -> str:
    """The commands in a help text."""
    return " ".join(re.findall(r"^│ ([a-z-]+) +[A-Z]", text, re.MULTILINE))


def test_commands_come_in_the_order_of_their_use() -> None:
    assert _named(opgrpo("--help").stdout) == COMMANDS
    assert _named(opgrpo("store", "--help").stdout) == "ls show"


def test_gc_says_what_no_grace_does() -> None:
    said = " ".join(re.sub("│", " ", opgrpo("gc", "--help").stdout).split())
    assert "With 0, files of commands that are running now are removed too, and these commands then stop" in said
    assert "nothing committed is lost" in said
