"""A process that forks shard writers, so that a test can kill one at any instant without paying for its imports.

Run as `python -m tests.opgrpo_data.crashing_writer`. For each line on stdin, a JSON object {store, shard, order, die_at}, it
forks a writer and prints the writer's pid; after one more line, it waits for the writer and prints its wait status.
order: "index_last" is write_shard; "index_first" is the same bytes in the order that must never be.
die_at: kill -9 itself just before the n-th operation on files; null: never.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from typing import Any

from opgrpo_data.io import Directory
from opgrpo_data.shards import write_shard
from tests.opgrpo_data.factories import folder, records

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir"}


def write_index_first(directory: Directory, shard: str) -> None:
    """What write_shard does, with the commit before the data: the test of the test."""
    memory = Directory("memory://index-first")
    write_shard(memory, folder(), shard, big_records())
    for path in sorted(memory.list(f"{folder()}/{shard}.*"), key=lambda path: not path.endswith(".parquet")):
        directory.publish(path, memory.read(path))


def big_records() -> Any:
    """Enough bytes that writing them takes a while: 4 trajectories of 1.4 MB."""
    return records(4, steps=10, shape=(32, 32, 32), media=b"picture" * 10_000)


def die_at(count: int) -> None:
    """Kill this process just before its `count`-th (from 0) operation on files, fsync included."""
    operations = itertools.count()

    def step() -> None:
        if next(operations) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        step()
        real_fsync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(lambda event, _: step() if event in FILE_EVENTS else None)


def write(command: dict[str, Any]) -> None:
    """Do what one line on stdin says."""
    directory = Directory(command["store"])
    if command["die_at"] is not None:
        die_at(command["die_at"])
    if command["order"] == "index_first":
        write_index_first(directory, command["shard"])
    else:
        write_shard(directory, folder(), command["shard"], big_records())


def main() -> None:
    """Serve until stdin closes."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                write(json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(pid, flush=True)
        sys.stdin.readline()  # until then the pid is the writer's, alive or not, and safe to kill
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
