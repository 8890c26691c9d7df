"""The learning curve of a run, per kind of prompt, from its evaluations: a table, and a picture.

python -m benchmarks.learning_curve --store DIR [--run RUN_ID] [--picture curve.png] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

from opgrpo_data.catalog import Catalog
from opgrpo_data.store import Store

# Standard error of a kind's mean: of its samples, as if independent.
QUERY = """
SELECT run_id, iteration, reward, version, num_steps, coalesce(detail->>'kind', 'all') AS kind,
       avg(value) AS mean, count(*) AS samples,
       stddev_samp(value) / sqrt(count(*)) AS standard_error
FROM (SELECT * FROM evals UNION ALL BY NAME SELECT * REPLACE ('{"kind": "all"}' AS detail) FROM evals)
GROUP BY ALL ORDER BY ALL
"""
SPENT = """
SELECT run_id, iteration + 1 AS iteration,
       epoch(max(created_at) - min(min(created_at)) OVER (PARTITION BY run_id)) / 60 AS minutes
FROM trajectories GROUP BY run_id, iteration ORDER BY ALL
"""


def curves(store: str, run: str | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run, reward and steps -> kind -> points: iteration, minutes since the first trajectory, mean, standard_error, samples."""
    catalog = Catalog(Store.open(store))
    minutes = {(row["run_id"], row["iteration"]): row["minutes"] for row in catalog.query(SPENT).to_pylist()}
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in catalog.query(QUERY).to_pylist():
        if run in (None, row["run_id"]):
            spent = minutes.get((row["run_id"], row["iteration"]), 0.0)
            curve = f"{row['run_id']}, {row['reward']} {row['version']}, {row['num_steps']} steps"
            found[curve][row["kind"]].append({**row, "minutes": spent})
    return found


def print_table(run: str, kinds: dict[str, list[dict[str, Any]]]) -> None:
    """One Markdown row an evaluation, one column a kind."""
    print(f"{run}: held-out reward, mean ± standard error; {platform.machine()}, {os.cpu_count()} cores")
    print("| iteration | minutes | " + " | ".join(kinds) + " |")
    print("| --- " * (len(kinds) + 2) + "|")
    for points in zip(*kinds.values(), strict=True):
        cells = " | ".join(f"{point['mean']:.3f} ± {point['standard_error']:.3f}" for point in points)
        print(f"| {points[0]['iteration']} | {points[0]['minutes']:.1f} | {cells} |")


def draw(found: dict[str, dict[str, list[dict[str, Any]]]], picture: Path) -> None:
    """One panel a run, one line a kind, with a band of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(6.4 * len(found), 4), squeeze=False, sharey=True)
    for panel, (run, kinds) in zip(panels[0], found.items(), strict=True):
        for kind, points in kinds.items():
            x = [point["iteration"] for point in points]
            low = [point["mean"] - point["standard_error"] for point in points]
            high = [point["mean"] + point["standard_error"] for point in points]
            panel.plot(x, [point["mean"] for point in points], label=kind, linewidth=2.5 if kind == "all" else 1.2)
            panel.fill_between(x, low, high, alpha=0.15)
        panel.set(title=run, xlabel="iteration", ylabel="held-out reward", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Parse the command line, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--run", help="run_id; all runs by default")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = curves(arguments.store, arguments.run)
    if not found:
        parser.error(f"no evaluation of run {arguments.run or '*'} in {arguments.store}")
    if arguments.json:
        print(json.dumps(found))
    else:
        for run, kinds in found.items():
            print_table(run, kinds)
    if arguments.picture:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
