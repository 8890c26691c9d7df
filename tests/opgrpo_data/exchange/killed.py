"""A process that forks exports and imports and kills them at any instant, without paying for their imports each time.

Run as `python -m tests.opgrpo_data.exchange.killed`. For each line on stdin, a JSON object {call, die_at}, it forks a process
that calls the function and kills it (-9) just before its operation on files of that number (see crashing_writer.die_at), and
prints its wait status. call: the function's name in CALLS and its arguments.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import webdataset.writer  # noqa: F401 an export imports it late

from opgrpo_data.exchange import export_dataset, import_dataset
from opgrpo_data.store import Store
from tests.opgrpo_data.crashing_writer import die_at


def exported(store: str, to: str, form: str) -> Any:
    """As `opgrpo export` does."""
    return export_dataset(Store.open(store), to, form)


def imported(source: str, to: str) -> Any:
    """As `opgrpo import --merge` does."""
    return import_dataset(source, to, merge=True)


CALLS: dict[str, Callable[..., Any]] = {"export": exported, "import": imported}


def main() -> None:
    """Serve until stdin closes."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                command = json.loads(line)
                name, *given = command["call"]
                if command["die_at"] is not None:
                    die_at(command["die_at"])
                CALLS[name](*given)
                status = 0
            finally:
                os._exit(status)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
