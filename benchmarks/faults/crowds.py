"""Many at once: eight writers of the same shards and tables, processes whose clocks differ, two runs of one name."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest import mock

from benchmarks.faults.cleaners import HOUR
from benchmarks.faults.content import (
    MEMBERS,
    RUN,
    add_documents,
    add_iteration,
    add_shard,
    damages,
    shard_index,
    table,
    trajectory_id,
    wrong_bytes,
)
from benchmarks.faults.kills import FORKS
from benchmarks.faults.tally import Tally, chances
from opgrpo_data import store as stores
from opgrpo_data.places.files import TEMPORARY_PREFIX
from opgrpo_data.store import Store, iteration_folder
from opgrpo_data.upkeep import garbage
from opgrpo_data.upkeep.garbage import collect

WRITERS = 8
LONGEST_WAIT = 300


def publications(store: Store, number: int, writer: int) -> Iterator[tuple[str, Callable[[], bool]]]:
    """What every writer publishes in a round under the same names, but with bytes of its own."""
    names = [f"{trajectory_id(0, 0, member)}" for member in range(MEMBERS)]
    yield shard_index(0, number), partial(add_shard, store, 0, number, writer=writer)
    path = f"{iteration_folder('rewards/reward=taste', RUN, 0)}/{number:05d}.v1.000.parquet"
    yield path, partial(store.publish_table, path, table("rewards", 0, [*names, str(writer)]))
    path = f"{iteration_folder('updates', RUN, number)}.parquet"
    yield path, partial(store.publish_table, path, table("updates", number, [*names, str(writer)]))
    run = {"config": {"name": RUN, "seed": writer}, "command": [], "software": {}}
    yield f"runs/{RUN}-{number}.json", partial(store.add_run, f"{RUN}-{number}", run)


def _write(url: str, writer: int, rounds: int, barrier: Barrier, environment: dict[str, str], wins: str) -> None:
    os.environ.update(environment)
    store = Store.open(url)
    with Path(wins).open("w", encoding="utf-8") as log:
        for number in range(rounds):
            barrier.wait(LONGEST_WAIT)
            for path, publish in publications(store, number, writer):
                if publish():
                    log.write(f"{path}\n")


def race(work: Path, url: str, rounds: int, seed: int, environment: dict[str, str] | None = None) -> Tally:
    """Let WRITERS processes write the same names at once, `rounds` times."""
    tally = Tally(
        seed,
        f"{WRITERS} processes write the same shards, tables and documents: one of them is told that it created each, what is "
        "there is that one's, whole; a deep verify finds no damage; the collector leaves the winners' tars alone",
    )
    Store.create(url)
    barrier, logs = FORKS.Barrier(WRITERS), [work / f"wins-{writer}" for writer in range(WRITERS)]
    arguments = [(url, writer, rounds, barrier, environment or {}, str(log)) for writer, log in enumerate(logs)]
    processes = [FORKS.Process(target=_write, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONGEST_WAIT)
    failed = [f"a writer ended with {process.exitcode}" for process in processes if process.exitcode]
    store = Store.open(url)
    winners: dict[str, list[int]] = {}
    for writer, log in enumerate(logs):
        for path in log.read_text(encoding="utf-8").splitlines():
            winners.setdefault(path, []).append(writer)
    for number in range(rounds):
        for path, _ in publications(store, number, 0):
            tally.count(path.split("/")[0], [*failed, *of_one(store, path, winners.get(path, []))], path)
    collect(store, delete=True, grace=timedelta(0))
    tars = Counter(entry.path.rpartition(".")[2] for entry in store.directory.entries())["tar"]
    left = [] if tars == 2 * rounds else [f"{tars} tars are left of {rounds} shards"]
    found = damages(store)
    tally.count("the store as a whole", [*left, *found, *wrong_bytes(store, store.files("trajectories"))])
    return tally


def of_one(store: Store, path: str, winners: list[int]) -> Iterator[str]:
    """What is wrong with a file that several tried to create."""
    if len(winners) != 1:
        yield f"{len(winners)} writers were told that they created it"
        return
    if path.startswith("trajectories/"):
        found = set(store.read_tables("trajectories", [path])["seed"].to_pylist())
    elif path.startswith(("rewards/", "updates/")):
        found = {int(store.read_tables(path.partition("/")[0], [path])["trajectory_id"][-1].as_py())}
    else:
        found = {document["config"]["seed"] for document in store.documents(path)}
    if found != set(winners):
        yield f"it holds bytes of {sorted(found)}, created it was by {winners[0]}"


def concurrent_writers(work: Path, count: int, seed: int) -> Tally:
    """Races on the local disk; `count` rounds of four names each."""
    return race(work, str(work / "store"), count, seed)


# -- clocks ------------------------------------------------------------------------------------------------------------


@contextmanager
def clock(off: timedelta) -> Iterator[None]:
    """The clock of this machine goes wrong, for all that the store asks of it."""
    wrong = datetime.now(UTC) + off
    with (
        mock.patch.object(stores, "now", return_value=wrong),
        mock.patch.object(garbage, "now", return_value=wrong),
        mock.patch.object(time, "time", return_value=wrong.timestamp()),
    ):
        yield


SKEWS = (timedelta(days=-20_000), timedelta(days=-1), timedelta(seconds=-5), timedelta(days=1), timedelta(days=20_000))


def clock_skew(work: Path, count: int, seed: int) -> Tally:
    """`count` runs, each iteration on a machine with another clock; collectors with wrong clocks beside writers under way."""
    tally = Tally(
        seed,
        "iterations written and collected on machines whose clocks are up to 55 years apart: no file under way goes, leftovers "
        "that are old by the disk's clock go, nothing needed goes, a deep verify finds no damage",
    )
    rng = chances(seed)
    for number in range(count):
        store = Store.create(str(work / f"store-{number}"))
        skews = [rng.choice(SKEWS) for _ in range(4)]
        with clock(skews[0]):
            add_documents(store)
        for iteration, skew in enumerate(skews):
            with clock(skew):
                add_iteration(store, iteration, 1, [trajectory_id(0, 0, 0)])
        tally.count("collectors", list(_collected(store, rng.choice(SKEWS))), f"{number}: {skews}")
    return tally


def _collected(store: Store, skew: timedelta) -> Iterator[str]:
    """What is wrong after a collector with a wrong clock."""
    folder = Path(store.directory.path(iteration_folder("trajectories", RUN, 3)))
    ages = {"young": timedelta(0), "old": 2 * HOUR, "future": -2 * HOUR, "far-future": timedelta(days=-9999)}
    for name, age in ages.items():
        path = folder / f"{TEMPORARY_PREFIX}{name}"
        path.write_bytes(b"under way")
        when = (datetime.now(UTC) - age).timestamp()
        os.utime(path, (when, when))
    for index in store.files("trajectories"):  # as a copy without times leaves them: committed is committed
        os.utime(store.directory.path(index), (0, 0))
    with clock(skew):
        collect(store, delete=True, grace=HOUR, keep_iterations=2)
    left = {path.name.removeprefix(TEMPORARY_PREFIX) for path in folder.glob(f"{TEMPORARY_PREFIX}*")}
    if left != {"young", "future", "far-future"}:
        yield f"of the unfinished files {left} are left"
    if (dropped := store.dropped_shards()) != {shard_index(1, 0)}:
        yield f"dropped were {sorted(dropped)}"
    yield from wrong_bytes(store, [index for index in store.files("trajectories") if index not in dropped])
    yield from damages(store)
