"""Progress and remarks for people, on stderr; results go to stdout and are the command line's business."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


class Progress:
    """Speaks to stderr. `quiet` silences everything but warnings; bars appear only on a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def bar(self, tasks: Sequence[T], description: str) -> Iterator[T]:
        """Iterate over tasks behind a progress bar."""
        shown: Iterable[T] = tasks
        if not self.quiet and self.console.is_terminal and len(tasks) > 1:
            shown = track(tasks, description, console=self.console, transient=True)
        yield from shown

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that is shown even when quiet."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)
