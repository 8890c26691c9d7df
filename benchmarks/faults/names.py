"""Two runs at once under one name, as whole processes: the same settings are one run, other settings are another run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.kills import FORKS
from benchmarks.faults.tally import Tally
from opgrpo_data.store import Store
from opgrpo_data.upkeep.verify import verify

LONGEST_WAIT = 600
TRAJECTORIES = 16
SETTINGS = """
name: twice
iterations: 2
prompts: {limit: 2}
rollout: {prompts_per_iteration: 2, group_size: 4, num_steps: 5, groups_per_shard: 1}
replay: {prefix_steps: 2}
reward: {name: scene_soft}
train: {window: 3}
eval: {samples: 4, num_steps: 4, every: 2}
"""
"""A run of seconds, of the embedded world: 2 iterations of 8 trajectories, its TRAJECTORIES."""


def _command(words: Sequence[str], told: str) -> None:
    """`opgrpo ...`, its standard output in a file."""
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 1)
    from cli import app

    app(list(words))


def at_once(work: Path, store: Path, configs: Sequence[Path]) -> list[dict[str, Any]]:
    """`opgrpo run` of several configs at the same time; what each told, with its exit code."""
    told = [work / f"{store.name}-{number}.json" for number in range(len(configs))]
    words = [["run", str(config), "--store", str(store), "--json", "--quiet"] for config in configs]
    processes = [FORKS.Process(target=_command, args=(each, str(file))) for each, file in zip(words, told, strict=True)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONGEST_WAIT)
    ended = [process.exitcode for process in processes]
    return [
        {"exit": code} | (json.loads(file.read_text()) if code == 0 else {}) for code, file in zip(ended, told, strict=True)
    ]


def same_name(work: Path, count: int, seed: int) -> Tally:
    """`count` times two processes with the same settings, and two with different ones under one name."""
    tally = Tally(
        seed,
        "two processes run the same settings under one name at once: both end with the policy of a run alone, the store holds "
        "one whole run and a deep verify finds nothing; with other settings under that name each has a run of its own, whole",
    )
    same, other = work / "same.yaml", work / "other.yaml"
    same.write_text(SETTINGS)
    other.write_text(f"seed: 1\n{SETTINGS}")
    alone = [at_once(work, work / f"alone-{config.stem}", [config])[0].get("policy_id") for config in (same, other)]
    for number in range(count):
        for name, configs in (("the same settings", [same, same]), ("other settings", [same, other])):
            store = work / f"store-{name.split()[-2]}-{number}"
            told = at_once(work, store, configs)
            expected = [alone[config is other] for config in configs]
            tally.count(name, problems(store, told, expected, len(set(configs))), number)
    return tally


def problems(store: Path, told: list[dict[str, Any]], expected: list[Any], runs: int) -> list[str]:
    """What is wrong after `at_once`. expected: policies. runs: that the store must hold."""
    found = [f"a process ended with {one['exit']}" for one in told if one["exit"] != 0]
    if found:
        return found
    if (ended := [one["policy_id"] for one in told]) != expected:
        found.append(f"they ended with the policies {ended}, alone they would with {expected}")
    opened = Store.open(str(store))
    table = opened.read_tables("trajectories", opened.files("trajectories"))
    if len(opened.directory.list("runs/*.json")) != runs or table.num_rows != runs * TRAJECTORIES:
        found.append(f"{len(opened.directory.list('runs/*.json'))} runs of {table.num_rows} trajectories")
    per_run = {kind: len(opened.files(kind)) / runs for kind in ("buffers", "plans", "updates")}
    if set(per_run.values()) != {2.0}:
        found.append(f"files a run: {per_run}")
    found += [f"{finding.path}: {finding.problem}" for finding in verify(opened, deep=True).findings]
    return found
