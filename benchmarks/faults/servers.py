"""A real S3 server (SeaweedFS) behind a proxy: failing, silent, slow, losing answers; crowds of writers, and killed ones."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import s3fs

from benchmarks.faults import victims
from benchmarks.faults.content import add_everything, add_shard, damages, wrong_bytes
from benchmarks.faults.crowds import race
from benchmarks.faults.damage import readers
from benchmarks.faults.kills import Log, kill
from benchmarks.faults.tally import Tally, chances
from benchmarks.store.proxy import Fault, Proxy, Request, running
from benchmarks.store.server import S3Server, seaweedfs
from opgrpo_data.places import remote
from opgrpo_data.places.retries import Patience, Server
from opgrpo_data.places.s3 import S3Objects
from opgrpo_data.store import Store
from opgrpo_data.upkeep.garbage import collect

BUCKET = "faults"
IMPATIENT = Patience(tries=10, first_wait=0.005, longest_wait=0.02, seconds=0.25, slowest_bytes=4 * 2**20)
"""Of requests that fail one time in five, ten tries in a row fail once in ten millions."""
LARGE = (32, 96, 96)
"""A shard of these is written in two parts."""
ITERATION = 7


@contextmanager
def s3_server(work: Path) -> Iterator[S3Server]:
    """A server with a bucket, to which the environment leads."""
    with seaweedfs(work / "server") as server, leading_to(server.environment()):
        objects = S3Objects(s3fs.S3FileSystem(), Patience())
        Server(Patience()).ask("make", BUCKET, partial(objects.call, "create_bucket", BUCKET))
        yield server


@contextmanager
def leading_to(environment: Mapping[str, str]) -> Iterator[None]:
    """Here every S3 client finds the server of an environment. Open filesystems are kept by options that do not tell theirs."""
    with mock.patch.dict(os.environ, environment):
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@dataclass
class Failing:
    """Decides about requests: a share of them fails, each in one of some ways. happened: how many did."""

    ways: tuple[Fault, ...]
    share: float
    rng: random.Random
    happened: Counter[str] = field(default_factory=Counter)

    def __call__(self, _: Request) -> Fault | None:
        """See Proxy.fault."""
        if self.rng.random() >= self.share:
            return None
        fault = self.rng.choice(self.ways)
        self.happened[fault] += 1
        return fault


def _through(work: Path, count: int, seed: int, ways: tuple[Fault, ...], share: float) -> Tally:
    """Rounds of all that a store does, through a proxy that fails, until `count` requests have failed."""
    tally = Tally(
        seed,
        f"{share:.0%} of all requests fail ({', '.join(ways)}) while a store with a file of every kind is written, read and "
        "collected: no error; and seen without the proxy, every byte is there, and a deep verify finds no damage",
    )
    failing = Failing(ways, share, chances(seed))
    with s3_server(work) as server:
        number = 0
        while (before := failing.happened.total()) < count:
            url = f"s3://{BUCKET}/round-{number}"
            with running(Proxy(server.port, fault=failing)) as proxy, leading_to(server.environment(proxy.port)), _impatient():
                problems = list(_worked(url))
            with leading_to(server.environment()):
                problems += [] if problems else _found(Store.open(url))
            tally.count("rounds", problems, f"{number}, failed requests {before} to {failing.happened.total()}")
            number += 1
    tally.tried = failing.happened.total()
    tally.parts += failing.happened
    return tally


@contextmanager
def _impatient() -> Iterator[None]:
    """Short waits."""
    with mock.patch.object(remote, "Patience", return_value=IMPATIENT):
        yield


def _worked(url: str) -> Iterator[str]:
    """Write everything, read it back, collect; what went wrong."""
    try:
        store = add_everything(url)
        add_shard(store, ITERATION, 0, shape=LARGE)
        for reads in readers(store).values():
            for read in reads:
                read()
        collect(store, delete=True, grace=timedelta(0), keep_iterations=1)
        yield from _found(store)
    except (OSError, ValueError) as error:
        yield f"it ended with an error: {error}"


def _found(store: Store) -> list[str]:
    """What is wrong with a store of `_worked`."""
    dropped = store.dropped_shards()
    found = damages(store)
    for iteration, shape in ((0, None), (1, None), (2, None), (ITERATION, LARGE)):
        indexes = store.files("trajectories", iteration=iteration)
        found += [] if indexes else [f"iteration {iteration} has no shard"]
        there = [index for index in indexes if index not in dropped]
        found += wrong_bytes(store, there, **({} if shape is None else {"shape": shape}))
    return found


def s3_errors(work: Path, count: int, seed: int) -> Tally:
    """500s, 503s, broken connections, lost answers, cut and shortened bodies."""
    return _through(work, count, seed, ("500", "503", "reset", "lost", "cut", "short"), 0.2)


def s3_timeouts(work: Path, count: int, seed: int) -> Tally:
    """Requests that are never answered."""
    return _through(work, count, seed, ("silent",), 0.05)


def s3_slow(work: Path, count: int, seed: int) -> Tally:
    """Bodies that come at 100 bytes a second."""
    return _through(work, count, seed, ("slow",), 0.1)


def s3_races(work: Path, count: int, seed: int) -> Tally:
    """Eight writers of the same names; half of the rounds through a proxy that loses answers."""
    with s3_server(work) as server:
        tally = race(work, f"s3://{BUCKET}/races", (count + 1) // 2, seed, server.environment())
        failing = Failing(("lost", "500"), 0.1, chances(seed))
        with running(Proxy(server.port, fault=failing)) as proxy, leading_to(server.environment(proxy.port)):
            tally.add(race(work, f"s3://{BUCKET}/lossy", (count + 1) // 2, seed, server.environment(proxy.port)))
        tally.parts += failing.happened
    return tally


def _remotely(environment: Mapping[str, str], url: str, log: Log) -> None:
    """The writer's work, in a process that may have been forked before there was a server."""
    with leading_to(environment):
        victims.write_shards(url, log)


def kill_s3_writer(work: Path, count: int, seed: int) -> Tally:
    """The writer of shards, killed while it writes to a server."""
    with s3_server(work) as server:
        victim = replace(victims.WRITER, name="S3 writer", work=partial(_remotely, server.environment()))
        return kill(victim, work, count, seed, place=lambda folder: f"s3://{BUCKET}/{folder.name}")
