"""A process that forks compactors which kill themselves; see crashing_writer, whose protocol it speaks.

Run as `python -m tests.opgrpo_data.upkeep.crashing_compactor`. For each line on stdin, a JSON object {store, many, die_at}, it
forks a compactor, to which `many` files are worth a generation, and prints its wait status.
"""

from __future__ import annotations

import json
import os
import sys

from opgrpo_data import pieces
from opgrpo_data.store import Store
from opgrpo_data.upkeep import compaction
from tests.opgrpo_data.crashing_writer import die_at


def main() -> None:
    """Serve until stdin closes."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                command = json.loads(line)
                store = Store.open(command["store"])
                for module in (compaction, pieces):
                    module.MANY_FILES = command["many"]  # type: ignore[attr-defined]
                die_at(command["die_at"])
                compaction.compact(store)
                status = 0
            finally:
                os._exit(status)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
