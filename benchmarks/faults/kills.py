"""kill -9 at random instants: what was acknowledged is there, nothing is half visible, and the same work again finishes.

A victim commits on and on and writes down each commit after it was acknowledged. It is forked from a process that has
imported everything (multiprocessing's fork server), so that a kill costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.faults.content import damages
from benchmarks.faults.tally import Tally, chances
from opgrpo_data.store import Store

FORKS = multiprocessing.get_context("forkserver")
LOG = "acknowledged"
AT_ONCE = 2
ONE_AT_A_TIME = threading.Lock()
"""Whoever starts a process looks after all others too, and takes away the exit code from the one who waits for it."""

WARM_UPS = 2
LONGEST_WAIT = 120.0
"""Seconds after which a victim that does not end is an error."""

Log = Callable[[str], None]
Place = Callable[[Path], str]


@dataclass(frozen=True)
class Victim:
    """Work that is killed, and what must hold then.

    prepare: makes the store at a URL. work: (URL, log): commits, and logs the path of each commit; done again, it finishes
    what is missing. check: what is wrong with what is committed. finished: what is wrong when the work was done to its end.
    All are functions of modules, which another process can import.
    """

    name: str
    prepare: Callable[[str], None]
    work: Callable[[str, Log], None]
    check: Callable[[Store], list[str]]
    finished: Callable[[Store], list[str]]


@dataclass
class _Span:
    """How long the victim's work takes: what comes too late shortens it, what hits lengthens it a little."""

    seconds: float

    def learn(self, hit: bool) -> None:
        self.seconds *= 1.01 if hit else 0.95


def here(folder: Path) -> str:
    """The store of a trial on the local disk."""
    return str(folder / "store")


def kill(victim: Victim, work: Path, count: int, seed: int, *, place: Place = here, sound: Victim | None = None) -> Tally:
    """Kill the victim `count` times, at instants spread evenly over the time that its work takes.

    A victim that had ended before is killed another time. place: URL of a trial's store. sound: of a broken victim, the one
    that it stands for, by which the time is measured.
    """
    tally = Tally(
        seed,
        "after a kill -9 at a random instant every acknowledged commit is there with all its bytes, a deep verify finds "
        "no damage, and the same work again finishes",
    )
    span = _Span(min(_seconds(sound or victim, work / f"warm-up-{n}", place) for n in range(WARM_UPS)))
    numbers = iter(range(20 * count))

    def trial(_: int) -> None:
        hit = False
        while not hit:
            number = next(numbers)
            delay = chances(seed, number).uniform(0, span.seconds)
            problems, hit, commits = _trial(victim, work / f"trial-{number}", delay, place)
            span.learn(hit)
            if hit or problems:
                tally.count(victim.name, problems, f"kill {number}, after {delay * 1000:.1f} ms")
                tally.parts["acknowledged commits"] += commits

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(trial, range(count)):
            pass
    return tally


def _trial(victim: Victim, folder: Path, delay: float, place: Place) -> tuple[list[str], bool, int]:
    """Problems, whether the kill came in time, how many commits had been acknowledged."""
    url = place(folder)
    process = _start(victim, url, folder)
    time.sleep(delay)
    process.kill()
    code = _end(process)
    acknowledged = (folder / LOG).read_text().splitlines()
    if code == 0:
        shutil.rmtree(folder)
        return [], False, len(acknowledged)
    problems = inspected(victim, url, acknowledged) if code == -signal.SIGKILL else [f"it failed with {code}"]
    if not problems:
        victim.work(url, lambda _: None)
        again = [*inspected(victim, url, acknowledged), *victim.finished(Store.open(url))]
        problems = [f"after the work was done again: {problem}" for problem in again]
    shutil.rmtree(folder)
    return problems, code == -signal.SIGKILL, len(acknowledged)


def inspected(victim: Victim, url: str, acknowledged: Sequence[str]) -> list[str]:
    """What is wrong with a store in which a victim has worked."""
    try:
        store = Store.open(url)
        lost = [f"{path} was acknowledged and is gone" for path in acknowledged if not store.directory.exists(path)]
        found = damages(store)
        return [*lost, *found, *victim.check(store)]
    except (ValueError, OSError) as error:
        return [f"the store cannot be read: {error}"]


def _start(victim: Victim, url: str, folder: Path) -> BaseProcess:
    """The victim in a process of its own, which has just begun its work."""
    folder.mkdir(parents=True)
    victim.prepare(url)
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_be_killed, args=(victim, url, str(folder / LOG), theirs))
    with ONE_AT_A_TIME:
        process.start()
    theirs.close()
    if not ours.poll(LONGEST_WAIT):
        raise TimeoutError(f"{victim.name} did not start")
    ours.recv()
    ours.close()
    return process


def _end(process: BaseProcess) -> int:
    """The exit code of a process when it has ended."""
    if not wait([process.sentinel], LONGEST_WAIT):
        process.kill()
        raise TimeoutError("a victim did not end")
    with ONE_AT_A_TIME:
        process.join()
        code = process.exitcode
        process.close()
    assert code is not None
    return code


def _be_killed(victim: Victim, url: str, log: str, started: Connection) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    started.send(None)
    victim.work(url, partial(_acknowledge, descriptor))


def _acknowledge(descriptor: int, path: str) -> None:
    os.write(descriptor, f"{path}\n".encode())


def _seconds(victim: Victim, folder: Path, place: Place) -> float:
    """How long the work takes without being killed; and then nothing is wrong with it, or the trials would mean nothing."""
    url = place(folder)
    process = _start(victim, url, folder)
    begin = time.perf_counter()
    code = _end(process)
    took = time.perf_counter() - begin
    if problems := [*inspected(victim, url, ()), *victim.finished(Store.open(url))]:
        raise RuntimeError(f"{victim.name} ended with {code} before anything was done to it: {problems[0]}")
    shutil.rmtree(folder)
    return took
