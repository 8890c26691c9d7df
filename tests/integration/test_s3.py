"""The command line on a bucket: the same run as on a disk, by a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.store.server import PASSWORD
from opgrpo_data.io import Directory
from tests.integration.harness import opgrpo, opgrpo_json


def test_a_run_on_a_bucket_ends_at_the_same_policy(finished: tuple[Path, dict[str, Any]], config: Path, s3: str) -> None:
    on_disk, told = finished
    done = opgrpo("run", config, "--store", s3, "--json")
    result = json.loads(done.stdout)
    assert result["policy_id"] == told["policy_id"]
    query = "SELECT trajectory_id, value FROM trajectories JOIN rewards USING (trajectory_id) ORDER BY ALL"
    rows = opgrpo_json("sql", "--store", s3, query)
    assert rows == opgrpo_json("sql", "--store", on_disk, query)
    assert len(rows) == 16
    stored = Directory(s3)
    assert PASSWORD not in done.stdout + done.stderr
    assert all(PASSWORD.encode() not in stored.read(entry.path) for entry in stored.entries())
    picture = result["picture"]
    assert stored.read(picture.removeprefix(f"{stored.root}/")).startswith(b"\x89PNG")


def test_a_password_on_the_command_line_reaches_no_store(config: Path, tmp_path: Path) -> None:
    url = f"s3://KEY:{PASSWORD}@bucket/store"
    store = tmp_path / "store"
    for words in (["--store", url], ["--store", url, "--dry-run"], ["--store", str(store), "--import-buffer", url]):
        done = opgrpo("init", config, *words, check=False)
        assert done.returncode in (1, 2)
        assert "holds a password, and URLs are kept: leave it out" in done.stderr
        assert PASSWORD not in done.stdout + done.stderr
    assert not store.exists()
