"""What commands print: one line for a stage, one JSON object for machines, a table for SQL, advice after a run."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opgrpo_data.upkeep.verify import Report
    from pipelines.experiment import Outcome
    from pipelines.loop import Result

PIPE_WIDTH = 100_000
LEARNING_CURVE = (
    "SELECT iteration, count(*) AS n, avg(value) AS reward FROM trajectories JOIN rewards USING (trajectory_id) "
    "WHERE {mine} AND reward = '{reward}' GROUP BY 1 ORDER BY 1"
)
TRAINED_ON = (
    "SELECT iteration, count(*) AS n, avg(reward) AS reward, avg(age) AS age FROM updates WHERE {mine} GROUP BY 1 ORDER BY 1"
)
OLDEST_ENTRIES = (
    "SELECT text, decayed_reward, age FROM buffer JOIN prompts USING (prompt_id) "
    "WHERE {mine} AND iteration = {last} ORDER BY age DESC LIMIT 10"
)


def show(told: Any, as_json: bool) -> None:
    """What a command tells: as JSON; else an object as a line for each entry, rows as a table, a list as lines."""
    if as_json:
        print(to_json(told))
    elif isinstance(told, dict):
        print("\n".join(f"{name}: {_line(value)}" for name, value in told.items()))
    elif told and not isinstance(told[0], dict):
        print("\n".join(map(str, told)))
    else:
        show_table(told)


def _line(value: Any) -> str:
    """Rows below one another, everything else in one line, as people write it."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  {_line(row)}" for row in value)
    if isinstance(value, list | dict):
        parts = [f"{name} {_line(part)}" for name, part in value.items()] if isinstance(value, dict) else map(_line, value)
        return ", ".join(parts) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def show_report(report: Report, as_json: bool) -> None:
    """What `verify` looked at and what it found."""
    if as_json:
        print(to_json(asdict(report)))
        return
    for finding in report.findings:
        print(f"{finding.path}: {finding.problem}; {finding.remedy}")
    if report.quarantined:
        print(f"{_counted(report.quarantined, 'trajectory')} in quarantine: that damage is known")
    if report.unsealed:
        print(f"{_counted(report.unsealed, 'file')} of an older format without a seal: `opgrpo migrate` writes checksums down")
    looked_at = [(report.files, "file"), (report.trajectories, "trajectory"), (report.bytes, "byte")]
    verdict = _counted(len(report.findings), "finding") if report.findings else "nothing is wrong"
    print(f"{', '.join(_counted(number, what) for number, what in looked_at)}: {verdict}")


def _counted(number: int, what: str) -> str:
    many = f"{what.removesuffix('y')}ies" if what.endswith("y") else f"{what}s"
    return f"{number} {what if number == 1 else many}"


def show_outcome(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    """What a stage did, in one line."""
    if as_json:
        print(to_json({**asdict(outcome), "dry_run": dry_run}))
        return
    where = "" if outcome.iteration is None else f" iteration {outcome.iteration}"
    verb = "would do" if dry_run else "done"
    work = f"{verb} {outcome.done}, already there {outcome.skipped}" if outcome.done else "nothing to do"
    told = "".join(f", {name} {value}" for name, value in outcome.detail.items())
    print(f"{outcome.stage}{where}: {work}{told}")


def show_result(config: Path, overrides: list[str], result: Result) -> None:
    """Before and after, where things lie, and commands to go on with, ready to be pasted into a shell."""
    if result.held_out_before is not None and result.held_out_after is not None:
        gain = result.held_out_after - result.held_out_before
        print(
            f"\nheld-out reward before {result.held_out_before:.3f}, after {result.held_out_after:.3f} "
            f"({gain:+.3f} ± {result.gain_error:.3f}, {_counted(result.samples, 'sample')})\n"
            f"pictures before and after: {result.picture}"
        )
    print(f"store: {result.store} (run {result.run_id}, policy {result.policy_id})\ngo on with:")
    mine, last = f"run_id = '{result.run_id}'", result.iterations - 1
    longer = [*(part for override in overrides for part in ("--set", override)), "--set", f"iterations={2 * result.iterations}"]
    drawn = [LEARNING_CURVE.format(mine=mine, reward=result.reward), OLDEST_ENTRIES.format(mine=mine, last=last)]
    asked = drawn if result.algorithm != "offline" else [TRAINED_ON.format(mine=mine)]
    for command in (
        *(["opgrpo", "sql", "--store", result.store, query] for query in asked),
        ["opgrpo", "run", str(config), "--store", result.store, *longer],
    ):
        print(f"  {' '.join(map(_quoted, command))}")


def _quoted(word: str) -> str:
    """The word for a shell: in double quotes where those are legible and safe, which shlex never uses."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def show_table(rows: list[dict[str, Any]]) -> None:
    """The rows of a query."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*(rows[0] if rows else ["no rows"]))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    # Into a pipe nothing is cut: the reader there has no narrow window.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table, markup=False)


def _cell(value: Any) -> str:
    """A value in a table: nothing where there is none."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_json(value: Any) -> str:
    """One line of valid JSON."""
    return json.dumps(_plain(value), default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
