"""Errors and warnings are one line each, and what a command tells is all that stdout gets."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import typer

from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store
from opgrpo_data.upkeep import compaction
from pipelines.commands.shared import UsageError, one_line_each, parse_options
from pipelines.config import ConfigError
from tests.integration.harness import environment, opgrpo
from tests.opgrpo_data.factories import overwrite
from tests.opgrpo_data.hostile import small_store


@pytest.fixture
def damaged(tmp_path: Path) -> Store:
    """A store with a generation that is passed over."""
    store = small_store(str(tmp_path / "store"))
    with patch.object(compaction, "MANY_FILES", 1):
        compaction.compact(store)
    overwrite(store.directory, "catalog/trajectories/gen-000001.json", b"{}")
    return store


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StoreError("two\n lines"), 1, "error: two lines"),
        (ConfigError("a key"), 2, "error: a key"),
        (UsageError("options"), 2, "error: options"),
        (
            OSError(28, "No space left", "x"),
            1,
            "error: [Errno 28] No space left: 'x': make room and run the same command again;",
        ),
    ],
)
def test_an_error_is_one_line(error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, one_line_each():
        raise error
    assert caught.value.exit_code == code
    printed = capsys.readouterr()
    assert printed.err.startswith(said)
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_a_bug_of_ours_keeps_its_trace() -> None:
    with pytest.raises(KeyError), one_line_each():
        raise KeyError("x")


def test_each_warning_is_one_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with one_line_each():
        for text in ("first", "second\n  half", "first"):
            warnings.warn(text, stacklevel=1)
        warnings.warn("first", FutureWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "warning: first\nwarning: second half\n")
    assert warnings.showwarning is before


def test_warnings_leave_json_alone(damaged: Store) -> None:
    query = "SELECT count(*) AS n FROM trajectories"
    words = ["sql", query, "--store", damaged.directory.root, "--json"]
    done = subprocess.run([sys.executable, "-m", "cli", *words], capture_output=True, text=True, env=environment(), timeout=240)
    assert json.loads(done.stdout) == [{"n": 2}]
    assert done.stderr == (
        "warning: catalog/trajectories/gen-000001.json is passed over (it describes no generation (KeyError('parquet'))): what "
        "it holds is read from the index files; `opgrpo compact` makes another\n"
    )


def test_a_generation_is_warned_of_once_however_often_it_is_read(damaged: Store) -> None:
    assert opgrpo("compact", "--store", damaged.directory.root).stderr.count("gen-000001.json is passed over") == 1


@pytest.mark.parametrize(
    ("text", "said"), [("{", "--options is not JSON: "), ("[]", "--options must be a JSON object, got '[]'")]
)
def test_options_that_are_no_object(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("[]", r"\[\]")):
        parse_options(text)
