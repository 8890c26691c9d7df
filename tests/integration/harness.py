"""The command line as a user runs it: in a process of its own where that matters, in this one where it only costs time."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cli import app

# A fresh interpreter takes seconds to import torch and diffusers, and the tests start hundreds of commands: these are forked,
# each a process of its own, from one that has imported them.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.integration.warm"])


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A command, or another module of ours run as a script, in a process of its own."""

    def __init__(self, *arguments: str | Path, module: str = "cli") -> None:
        self._said = tempfile.TemporaryDirectory()
        words = [str(argument) for argument in arguments]
        where = (self._said.name, str(Path.cwd()), environment())
        self.process: BaseProcess = _FORKS.Process(target=_command, args=(module, words, *where))
        self.process.start()

    def wait(self) -> Done:
        """Until it ends, or four minutes, which is an error."""
        self.process.join(240)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError("the command did not end")
        said = [Path(self._said.name, name).read_text() for name in ("1", "2")]
        self._said.cleanup()
        return Done(self.process.exitcode, *said)


def _command(module: str, words: list[str], output: str, folder: str, environment: dict[str, str]) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{output}/{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m` does
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def opgrpo(*arguments: str | Path, check: bool = True, process: bool = False) -> Done:
    """Run the command line, with `process` in a process of its own. With `check`, a failure shows what it said."""
    words = [str(argument) for argument in arguments]
    if process:
        done = Running(*words).wait()
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
