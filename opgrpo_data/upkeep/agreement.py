"""What the files of a store must say of each other: asked in SQL, over the few columns in which their tables meet.

A seal tells that a file is as it was written. It does not tell that a file is gone, that it lies in the place of another, or
that whoever wrote it was wrong: these rules do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

import duckdb
import polars as pl
import pyarrow as pa

from opgrpo_data.checks import check_prompts
from opgrpo_data.store import REMADE, TABLES, prompts_path

RESTORE = "restore it from a copy"
SET_APART = re.compile(r"(^|-)(imported|offline)$")
"""Buffers that a run imported, and what an offline run may train on, lie under the run's name with this behind it; the
trajectories of imported buffers under this alone."""

PLACE = re.compile(
    r"(?P<kind>\w+)/(reward=(?P<reward>[^/]+)/)?run=(?P<run_id>[^/]+)/iter=(?P<iteration>\d{6,})(/(?P<name>.+))?\.parquet"
)
LATENTS = {name: pl.col(name) for name in ("latents_file", "latents_offset", "latents_length")} | {
    "checksums": pl.col("latents_crc32").list.sum()
}
"""Where the latents of a row lie, and the sum of their checksums: enough to tell two places apart."""

COLUMNS: Mapping[str, Mapping[str, pl.Expr]] = {
    "prompts": {"prompt_id": pl.col("prompt_id")},
    "trajectories": {name: pl.col(name) for name in ("trajectory_id", "prompt_id", "policy_id", "parent_id")} | LATENTS,
    "rewards": {name: pl.col(name) for name in ("trajectory_id", "reward", "version", "value", "error")},
    "buffers": {name: pl.col(name) for name in ("trajectory_id", "reward")} | LATENTS,
    "plans": {name: pl.col(name) for name in ("trajectory_id", "reward")} | LATENTS,
    "densities": {"trajectory_id": pl.col("trajectory_id")},
    "updates": {name: pl.col(name) for name in ("trajectory_id", "new_policy_id")},
    "evals": {"policy_id": pl.col("policy_id")},
}
"""What is kept of each row of each table, some hundred bytes, until everything was read."""

RULES = resources.files("opgrpo_data").joinpath("queries", "agreement")
VIEWS = "views.sql"
FILES = pa.schema(
    [
        ("file", pa.int32()),
        ("path", pa.string()),
        ("settled", pa.bool_()),
        ("readable", pa.bool_()),
        ("kind", pa.string()),
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("name", pa.string()),
    ]
)
RUNS = pa.schema([("run_id", pa.string()), ("draws", pa.bool_())])


@dataclass(frozen=True)
class Disagreement:
    """path: a file, or where one should be. count: of rows; example: one of them."""

    path: str
    problem: str
    remedy: str


class Agreement:
    """Gathers what tables say while they are read, and asks the rules when all were."""

    def __init__(self, paths: Iterable[str], settled: Iterable[str]) -> None:
        """paths: every file of the store, also those that cannot be read. settled: those that an earlier listing had.

        Rules ask of these alone: what they refer to was committed before them, so the later listing has it, even while
        others write.
        """
        self._paths = sorted(paths)
        self._settled = set(settled)
        self._numbers = {path: number for number, path in enumerate(self._paths)}
        self._readable: set[int] = set()
        self._frames: dict[str, list[pl.DataFrame]] = {kind: [] for kind in COLUMNS}
        self._runs: list[dict[str, Any]] = []

    def add_table(self, kind: str, path: str, table: pa.Table) -> None:
        """A table that was read."""
        self._readable.add(self._numbers[path])
        if kind in COLUMNS:
            self._frames[kind].append(_narrow(kind, table, self._numbers[path]))

    def add_run(self, document: Mapping[str, Any]) -> None:
        """The document of a run."""
        self._runs.append({"run_id": document["run_id"], "draws": document["config"].get("algorithm") != "offline"})

    def disagreements(self) -> Iterator[Disagreement]:
        """What the rules find."""
        files = [self._file(number, path) for number, path in enumerate(self._paths)]
        with duckdb.connect(":memory:") as connection:
            for kind, frames in self._frames.items():
                none = _narrow(kind, TABLES[kind].schema.empty_table(), 0)
                connection.register(kind, pl.concat([none, *frames]).to_arrow())
            connection.register("files", pa.Table.from_pylist(files, schema=FILES))
            connection.register("runs", pa.Table.from_pylist(self._runs, schema=RUNS))
            connection.execute(RULES.joinpath(VIEWS).read_text())
            for rule in sorted(rule.name for rule in RULES.iterdir() if rule.name != VIEWS):
                for path, problem, remedy in connection.execute(RULES.joinpath(rule).read_text()).fetchall():
                    yield Disagreement(path, problem, remedy or f"{RESTORE}{REMADE.get(path.partition('/')[0], '')}")

    def _file(self, number: int, path: str) -> dict[str, Any]:
        """A row of FILES: of a table's path its parts, of any other the path alone."""
        found = PLACE.fullmatch(path)
        parts = found.groupdict() | {"iteration": int(found["iteration"])} if found else {}
        named = {name: parts.get(name) for name in ("kind", "run_id", "iteration", "name")}
        return {"file": number, "path": path, "settled": path in self._settled, "readable": number in self._readable, **named}


def _narrow(kind: str, table: pa.Table, number: int) -> pl.DataFrame:
    frame = cast(pl.DataFrame, pl.from_arrow(table)).select(**COLUMNS[kind])
    return frame.with_columns(file=pl.lit(number, pl.Int32))


def place_problem(path: str, table: pa.Table) -> str | None:
    """What contradicts a table's path, as where files were swapped: rows of another run, iteration, shard, reward, version."""
    if path.startswith("prompts/"):
        return _prompts_problem(path, table)
    if path.startswith("quarantine/"):
        return _odd(table, "trajectory_id", path.removeprefix("quarantine/").removesuffix(".parquet"))
    found = PLACE.fullmatch(path)
    if found is None:
        return None
    apart = SET_APART.search(found["run_id"])
    expected: dict[str, Any] = {"run_id": found["run_id"], "iteration": int(found["iteration"]), "reward": found["reward"]}
    if apart and found["kind"] in ("buffers", "plans"):
        expected |= {"run_id": found["run_id"].removesuffix(apart[0]), "iteration": -1}
    elif apart and found["kind"] == "trajectories":
        expected |= {"run_id": None, "iteration": None}  # of the runs that drew them
    if found["kind"] in ("trajectories", "dropped"):
        expected["shard"] = found["name"]
    problems = (_odd(table, column, value) for column, value in expected.items() if value is not None)
    return next((problem for problem in problems if problem), None) or _version_problem(found["kind"], found["name"], table)


def _odd(table: pa.Table, column: str, expected: Any) -> str | None:
    """The first value of a column that is not the one that its path says."""
    found = table[column].unique().to_pylist() if column in table.column_names else []
    odd = [value for value in found if value != expected]
    return f"holds rows of {column} {str(odd[0])[:100]!r} in the place of {expected!r}" if odd else None


def _version_problem(kind: str, name: str | None, table: pa.Table) -> str | None:
    """Rewards and evaluations have the version in their names: <shard>.v<version>.<000>, <reward>.v<version>.<settings>."""
    if kind not in ("rewards", "evals") or name is None:
        return None
    odd = [version for version in table["version"].unique().to_pylist() if f".v{version}." not in f"{name}."]
    return f"holds rows of version {str(odd[0])[:100]!r} under the name {name}" if odd else None


def _prompts_problem(path: str, table: pa.Table) -> str | None:
    """A file of prompts is named by its content, and so is each prompt."""
    rows = table.to_pylist()
    try:
        check_prompts(rows, path)
    except ValueError as error:
        return f"is wrong: {error}"
    named = {prompts_path(rows, split) for split in {row["split"] for row in rows}}
    return None if named <= {path} else f"holds the prompts of {sorted(named)[0]}"
