"""The trajectory store against the limits of the machine: writing, reading, streaming, selecting, scoring again.

python -m benchmarks.store                                        measure everything, print a table; --json: one object
python -m benchmarks.store --only write_sd3 remote_sd3            only the parts that measure these
python -m benchmarks.store --save benchmarks/store/results.json   measure and keep the numbers
python -m benchmarks.store --summary                              the table of the kept numbers, nothing measured
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.store.machine import Measure, machine

RESULTS = Path(__file__).with_name("results.json")

PARTS: Mapping[str, Sequence[str]] = {
    "writing": ("write_sd3", "write_small_per_s", "commit_ms"),
    "scattered": ("random_cold_sd3", "random_cold_small", "random_warm_sd3"),
    "remote": ("remote_sd3", "remote_small"),
    "streaming": ("stream_cold_sd3", "stream_warm_sd3", "stream_cold_small", "stall_ms_sd3"),
    "selection": ("select_1m", "select_10m", "ingest_ms"),
    "rescore": ("rescore_speedup",),
}
"""Modules of this package, and what each measures."""

DETAILS_ONLY = {"commit_ms"}
"""In the table and the details, without a key of its own in the JSON object."""


def run(parts: Sequence[str], work: Path, quick: bool) -> dict[str, Measure]:
    """Measure some parts, each in a folder of its own that is removed afterwards."""
    found: dict[str, Measure] = {}
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        folder = work / f"opgrpo-benchmark-{part}"  # no name that a folder of the user may have
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        try:
            found |= importlib.import_module(f"benchmarks.store.{part}").measure(folder, quick)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def report(found: Mapping[str, Measure], where: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object: a number for each key, and under `details` all that is known of it, and the machine."""
    values = {key: measure.value for key, measure in found.items() if key not in DETAILS_ONLY}
    measures = {key: asdict(measure) | {"met": measure.met} for key, measure in found.items()}
    return {**values, "details": {"measures": measures, "machine": dict(where)}}


def table(told: Mapping[str, Any]) -> str:
    """The JSON object as Markdown."""
    lines = ["| | value | spread | goal | met | |", "| --- | ---: | ---: | --- | --- | --- |"]
    for key, one in told["details"]["measures"].items():
        spread = f"{_number(one['low'])} - {_number(one['high'])}"
        goal, met = f"{one['direction']} {one['bound']:,} {one['goal']}", "yes" if one["met"] else "**no**"
        lines.append(f"| `{key}` | {_number(one['value'])} | {spread} | {goal} | {met} | {one['told']} |")
    where = ", ".join(f"{name} {value}" for name, value in told["details"]["machine"].items())
    return "\n".join([*lines, "", f"Machine: {where}."])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=(__doc__ or "").splitlines()[0])
    keys = [key for measured in PARTS.values() for key in measured]
    parser.add_argument("--json", action="store_true", help="print one object: {key: number, ..., details: ...}")
    parser.add_argument("--quick", action="store_true", help="little data and few repeats: says that it works, not how fast")
    parser.add_argument("--only", nargs="+", choices=keys, metavar="KEY", help=f"of {', '.join(keys)}")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for data, on the disk to be measured"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the object there")
    parser.add_argument("--summary", action="store_true", help="report what was saved, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="what --summary reports")
    options = parser.parse_args(arguments)
    if options.summary:
        if not options.results.exists():
            parser.error(f"there is no {options.results}: measure with --save {options.results} first")
        told = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        wanted = set(options.only or keys)
        options.work.mkdir(parents=True, exist_ok=True)
        where = machine(options.work)  # its load is that of others only now
        found = run([part for part, measured in PARTS.items() if wanted & set(measured)], options.work, options.quick)
        told = report({key: found[key] for key in keys if key in wanted}, where)
    if options.save:
        options.save.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told) if options.json else table(told))


if __name__ == "__main__":
    main()
