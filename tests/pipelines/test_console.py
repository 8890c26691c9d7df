"""What commands print for people."""

from __future__ import annotations

import pytest

from opgrpo_data.upkeep.verify import Finding, Report
from pipelines.console import show_report

FINDING = Finding("a.parquet", None, "it is gone", "restore it", "damage")


@pytest.mark.parametrize(
    ("report", "lines"),
    [
        (Report(False), ["0 files, 0 trajectories, 0 bytes: nothing is wrong"]),
        (
            Report(False, 1, 1, 1, 1, 1, [FINDING]),
            [
                "a.parquet: it is gone; restore it",
                "1 trajectory in quarantine: that damage is known",
                "1 file of an older format without a seal: `opgrpo migrate` writes checksums down",
                "1 file, 1 trajectory, 1 byte: 1 finding",
            ],
        ),
        (
            Report(True, 2, 3, 4, 5, 6, [FINDING] * 2),
            [
                *["a.parquet: it is gone; restore it"] * 2,
                "5 trajectories in quarantine: that damage is known",
                "6 files of an older format without a seal: `opgrpo migrate` writes checksums down",
                "2 files, 3 trajectories, 4 bytes: 2 findings",
            ],
        ),
    ],
)
def test_a_report_counts_in_english(report: Report, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show_report(report, as_json=False)
    assert capsys.readouterr().out.splitlines() == lines
