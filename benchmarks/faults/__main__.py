"""What the trajectory store loses: tried and lost for every kind of fault. Lost must be 0 everywhere.

python -m benchmarks.faults                                        try everything, a quarter of an hour on two cores
python -m benchmarks.faults --quick                                a minute: says that it works, proves little
python -m benchmarks.faults --only flip_bits --seed 7 --json       one kind, as one JSON object
python -m benchmarks.faults --save benchmarks/faults/results.json  try everything and keep the numbers
python -m benchmarks.faults --summary                              the table of the kept numbers, nothing tried

Exits with 1 when something was lost, or when a deliberately broken commit order was not caught.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.kills import FORKS
from benchmarks.faults.kinds import KINDS
from benchmarks.store.machine import machine

RESULTS = Path(__file__).with_name("results.json")


def run(kinds: Sequence[str], work: Path, quick: bool, seed: int) -> dict[str, Any]:
    """Try some kinds of faults, each in a folder of its own that is removed afterwards: the JSON object."""
    told: dict[str, Any] = {}
    where = ", ".join(f"{name} {value}" for name, value in machine(work).items())
    for name in kinds:
        kind = KINDS[name]
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=work))
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the store tells of what was done to it
                tally = kind.run(folder, kind.quick if quick else kind.full, seed)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = round(time.monotonic() - began, 1)
        told[name] = tally.told() | {"good": tally.good, "seconds": seconds, "machine": where}
        said = f"{name}: {tally.tried} tried, {tally.lost} lost, {seconds} s, seed {seed}"
        print(said, *tally.examples, sep="\n  ", file=sys.stderr, flush=True)
    return told


def table(told: Mapping[str, Any]) -> str:
    """The JSON object as Markdown."""
    lines = ["| | tried | lost | the same, broken on purpose: lost of tried | seconds | what had to hold |"]
    lines.append("| --- | ---: | ---: | --- | ---: | --- |")
    for name, one in told.items():
        proofs = "; ".join(f"{proof['broken']}: {proof['lost']} of {proof['tried']}" for proof in one["proofs"])
        lines.append(f"| `{name}` | {one['tried']:,} | {one['lost']} | {proofs} | {one['seconds']:,.0f} | {one['checked']} |")
    examples = [f"- {name}: {example}" for name, one in told.items() for example in one["examples"]]
    machines = sorted({one["machine"] for one in told.values()})
    seeds = sorted({one["seed"] for one in told.values()})
    return "\n".join([*lines, "", *examples, f"Seeds: {seeds}. Machine: {'; '.join(machines)}."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, try, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one object: {kind: {tried, lost, ...}, ...}")
    parser.add_argument("--quick", action="store_true", help="few trials of each kind")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0, help="for the same trials again, or for others")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for stores to be damaged in")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the object there")
    parser.add_argument("--summary", action="store_true", help="report what was saved, try nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="what --summary reports")
    options = parser.parse_args(arguments)
    if options.summary:
        if not options.results.exists():
            parser.error(f"there is no {options.results}: try with --save {options.results} first")
        told = json.loads(options.results.read_text(encoding="utf-8"))
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # runs are compared bit for bit
        FORKS.set_forkserver_preload(["benchmarks.faults.kinds"])
        told = run(options.only or list(KINDS), options.work, options.quick, options.seed)
    if options.save:
        options.save.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told) if options.json else table(told))
    sys.exit(0 if all(one["good"] for one in told.values()) else 1)


if __name__ == "__main__":
    main()
