"""The benchmark of the store: small runs give every number they promise, and the table says what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store import __main__ as benchmark
from benchmarks.store.machine import Measure, machine, measured

KEYS = (
    "write_sd3 write_small_per_s random_cold_sd3 random_cold_small random_warm_sd3 remote_sd3 remote_small stream_cold_sd3 "
    "stream_warm_sd3 stream_cold_small stall_ms_sd3 select_1m select_10m ingest_ms rescore_speedup"
)
"""What `--json` must have, by the issue that asked for it."""


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What the command prints with --json."""
    benchmark.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_key_is_measured_by_one_part() -> None:
    keys = [key for measures in benchmark.PARTS.values() for key in measures]
    assert sorted(set(keys) - benchmark.DETAILS_ONLY) == sorted(KEYS.split())
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "part",
    ["writing", "scattered", "streaming", pytest.param("remote", marks=pytest.mark.xdist_group("seaweedfs")), "rescore"],
    ids=str,
)
def test_a_quick_run_gives_every_number(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if part == "remote":
        pytest.importorskip("s3fs")
    found = told(capsys, "--quick", "--work", tmp_path, "--only", *benchmark.PARTS[part])
    details = found.pop("details")
    assert set(found) == set(benchmark.PARTS[part]) - benchmark.DETAILS_ONLY
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert set(details["measures"]) == set(benchmark.PARTS[part])
    for key, one in details["measures"].items():
        assert one["low"] <= one["value"] <= one["high"]
        assert one["value"] == found.get(key, one["value"])
        assert one["told"]
    assert set(details["machine"]) >= {"cpu", "cores", "memory", "filesystem", "kernel", "python", "numpy"}
    assert list(tmp_path.iterdir()) == []  # every part cleans up


def test_the_machine_tells_of_the_filesystem_that_is_measured() -> None:
    assert machine(Path("/proc/self"))["filesystem"] == "proc"


@pytest.mark.parametrize(
    ("direction", "value", "met"), [(">=", 2.0, True), (">=", 1.9, False), ("<=", 2, True), ("<=", 2.1, False)]
)
def test_a_goal_is_met_by_the_median(direction: Any, value: float, met: bool) -> None:
    measure = measured([100, value, -100], direction, 2, "", "")
    assert (measure.value, measure.low, measure.high, measure.met) == (value, -100, 100, met)


SAVED = {
    "write_sd3": Measure(0.923, 0.87, 1.02, "of a raw write", 0.6, ">=", "64 in 54.6 ms"),
    "write_small_per_s": Measure(4415.4, 4352.6, 11558.0, "trajectories a second", 5000, ">=", "0.18 of raw"),
    "stall_ms_sd3": Measure(11.26, 10.0, 12.0, "ms a batch", 2, "<=", ""),
}
TABLE = """\
| | value | spread | goal | met | |
| --- | ---: | ---: | --- | --- | --- |
| `write_sd3` | 0.92 | 0.87 - 1.02 | >= 0.6 of a raw write | yes | 64 in 54.6 ms |
| `write_small_per_s` | 4,415 | 4,353 - 11,558 | >= 5,000 trajectories a second | **no** | 0.18 of raw |
| `stall_ms_sd3` | 11.3 | 10.0 - 12.0 | <= 2 ms a batch | **no** |  |

Machine: cpu Z80, cores 1.
"""


def test_a_summary_is_the_table_of_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "run", lambda *_: SAVED)
    monkeypatch.setattr(benchmark, "machine", lambda _: {"cpu": "Z80", "cores": "1"})
    file = tmp_path / "results.json"
    first = told(capsys, "--only", *SAVED, "--work", tmp_path, "--save", file)
    assert {key: value for key, value in first.items() if key != "details"} == {key: it.value for key, it in SAVED.items()}
    assert json.loads(file.read_text()) == first
    monkeypatch.delattr(benchmark, "run")
    benchmark.main(["--summary", "--results", str(file)])
    assert capsys.readouterr().out == TABLE
    assert told(capsys, "--summary", "--results", file) == first


def test_a_summary_of_nothing_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--summary", "--results", str(tmp_path / "none.json")])
    assert f"there is no {tmp_path}/none.json: measure with --save {tmp_path}/none.json first" in capsys.readouterr().err


def test_a_part_that_fails_leaves_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(work: Path, quick: bool) -> dict[str, Measure]:
        (work / "data").write_bytes(bytes(100))
        raise OSError("no room")

    monkeypatch.setattr("benchmarks.store.writing.measure", failing)
    with pytest.raises(OSError, match="no room"):
        benchmark.run(["writing"], tmp_path, True)
    assert list(tmp_path.iterdir()) == []
