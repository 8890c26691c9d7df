"""What an export or import does not take is counted, never passed over in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

TOLD = 20
"""Messages that are kept."""


@dataclass
class LeftOut:
    """Trajectories (groups, files) that were not taken: how many for which reason, and the first messages."""

    counts: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    def add(self, reason: str, message: str | None = None, count: int = 1) -> None:
        """One more, or `count`."""
        self.counts[reason] += count
        if message is not None and len(self.messages) < TOLD:
            self.messages.append(message)

    def told(self) -> str:
        """In words, for an error."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())) or "nothing was left out"
