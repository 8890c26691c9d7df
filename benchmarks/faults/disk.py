"""A full disk: every writer fails with an error that says so, nothing committed is lost, and with room again it finishes.

The disk is a tmpfs of a few MiB, which root alone may mount; others get a limit on the size of every file instead.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from benchmarks.faults import cleaners
from benchmarks.faults.content import RUN, SHAPE, add_shard, damages, trajectory_id, weights, wrong_bytes
from benchmarks.faults.tally import Tally, chances
from opgrpo_data.errors import CorruptionError
from opgrpo_data.exchange.export import FORMS, export_dataset
from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.store import Store
from opgrpo_data.upkeep.compaction import compact
from opgrpo_data.upkeep.garbage import collect

MOUNT = "mount"
DISK_MIB = 8
PAGE = 4096
BALLAST = "ballast"
FULL = (errno.ENOSPC, errno.EFBIG)
LARGE = (16, 64, 64)
"""A shard of these has 2 MiB."""


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of DISK_MIB at `folder`, if it may be mounted: False where it may not."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = not subprocess.run(
        [MOUNT, "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def room(folder: Path, left: int, mounted: bool) -> Iterator[None]:
    """No more than `left` bytes on the disk; without a disk of our own, in any one file."""
    if mounted:
        free = os.statvfs(folder)
        with Path(folder, BALLAST).open("wb") as file:
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - left)))
        try:
            yield
        finally:
            Path(folder, BALLAST).unlink()
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _writers(store: Store, disk: Path, number: int) -> dict[str, tuple[Callable[[], object], int]]:
    """What writes, and about how many bytes it needs."""
    names = [trajectory_id(0, 0, member) for member in range(3)]
    table = store.read_tables("rewards", store.files("rewards")[:1])
    document = {"kind": "average", "run_id": "faults", "iteration": number}
    run = {"config": {"name": "faults", "seed": number}, "command": ["x" * 50_000], "software": {}}
    export = disk / f"export-{number}"
    writers: dict[str, tuple[Callable[[], object], int]] = {
        "shard": (partial(add_shard, store, 9, number, shape=LARGE), 2_000_000),
        "small shard": (partial(add_shard, store, 8, number), 60_000),
        "table": (
            partial(store.publish_table, f"rewards/reward=taste/run={RUN}/iter=000000/{number}.v1.000.parquet", table),
            PAGE,
        ),
        "run": (partial(store.add_run, f"run-{number}", run), 50_000),
        "policy": (partial(store.add_policy, f"policy-{number}", document, weights(number)), 2 * PAGE),
        "quarantine": (partial(store.quarantine, names[0], CorruptionError("a", "b", 1, 2)), PAGE),
        "compactor": (partial(compact, store), 30_000),
    }
    return writers | {f"export {form}": (partial(_export, store, export, form), 10_000) for form in FORMS}


def _export(store: Store, to: Path, form: str) -> object:
    return export_dataset(store, str(to), form, reward="taste@1")


def full_disk(work: Path, count: int, seed: int, writers: Collection[str] = ()) -> Tally:
    """Every writer, or these, on a disk with too little room, `count` times each with another lack."""
    rng = chances(seed)
    disk = work / "disk"
    with small_disk(disk) as mounted:
        what = f"a tmpfs of {DISK_MIB} MiB" if mounted else "RLIMIT_FSIZE, since no tmpfs may be mounted,"
        tally = Tally(
            seed,
            f"{what} too full for a writer: it fails with an error that says so and names the file, leaves no "
            "unfinished file, what was committed is whole; with room again it finishes; the collector works on a full disk",
        )
        shutil.copytree(cleaners.compacted_template(), disk / "store")
        for number in range(count):
            for name in writers or _writers(Store.open(str(disk / "store")), disk, number):
                with _copy(disk) as store:
                    write, needed = _writers(store, disk, number)[name]
                    left = rng.randrange(0, max(PAGE, needed // 2)) // PAGE * PAGE
                    tally.count(name, list(_tried(store, disk, write, left, mounted)), f"{number}, {left} bytes left")
            with _copy(disk) as store:
                tally.count("collector", list(_made_room(store, disk, mounted)), f"{number}")
    return tally


@contextmanager
def _copy(disk: Path) -> Iterator[Store]:
    """The store by hard links, which need no room, and away with it and with what else was written."""
    shutil.copytree(disk / "store", disk / "copy", copy_function=os.link)
    try:
        yield Store.open(str(disk / "copy"))
    finally:
        for path in disk.iterdir():
            if path.name != "store":
                shutil.rmtree(path)


def _tried(store: Store, disk: Path, write: Callable[[], object], left: int, mounted: bool) -> Iterator[str]:
    with room(disk, left, mounted):
        try:
            write()
            yield "it did not fail"
        except (OSError, ValueError) as error:
            if not any(os.strerror(code) in str(error) for code in FULL):
                yield f"the error does not say that the disk is full: {error}"
            elif str(disk) not in str(error):
                yield f"the error does not say where: {error}"
        yield from _unharmed(store, disk)
    for export in disk.glob("export-*"):
        shutil.rmtree(export)
    try:
        write()
    except (OSError, ValueError) as error:
        yield f"with room again: {error}"
    yield from _unharmed(store, disk)


def _unharmed(store: Store, disk: Path) -> Iterator[str]:
    yield from (f"{path} is left over" for path in disk.rglob(f"{TEMPORARY_PREFIX}*"))
    yield from damages(store)
    for iteration, shape in ((0, (1, 2, 2)), (8, SHAPE), (9, LARGE)):
        yield from wrong_bytes(store, store.files("trajectories", iteration=iteration), shape=shape)


def _made_room(store: Store, disk: Path, mounted: bool) -> Iterator[str]:
    """What is wrong with a collector on a disk without a free byte, which has old leftovers to remove."""
    old = disk / "copy" / "trajectories" / f"{TEMPORARY_PREFIX}old"
    old.write_bytes(bytes(100_000))
    os.utime(old, (0, 0))
    with room(disk, 0, mounted):
        try:
            collect(store, delete=True, grace=timedelta(hours=1))
        except (OSError, ValueError) as error:
            yield f"it failed: {error}"
    if old.exists():
        yield "it left what was old"
    yield from _unharmed(store, disk)
