"""The command line as a user runs it: in a process of its own where that matters, in this one where it only costs time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cli import app


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def opgrpo(*arguments: str | Path, check: bool = True, process: bool = False, **options: Any) -> Done:
    """Run the command line; `process` and every option of subprocess.run ask for a process of its own.

    With `check`, a failure shows what it said.
    """
    words = [str(argument) for argument in arguments]
    if process or options:
        command = [sys.executable, "-m", "cli", *words]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240, **options)
        done = Done(ended.returncode, ended.stdout, ended.stderr)
    else:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a bug of ours, which the process would show as a traceback
        done = Done(result.exit_code, result.stdout, result.stderr)
    assert not check or done.returncode == 0, done.stderr
    return done


def opgrpo_json(*arguments: str | Path, process: bool = False) -> Any:
    """What a command prints with --json."""
    return json.loads(opgrpo(*arguments, "--json", process=process).stdout)


def environment() -> dict[str, str]:
    """One thread: two runs are compared bit for bit, and tests share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
