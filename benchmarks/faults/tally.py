"""What every kind of fault reports: how often it was tried, how often something was lost, and how to try it again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5


def chances(*seed: object) -> random.Random:
    """The same chances for the same seed."""
    return random.Random(" ".join(map(str, seed)))  # noqa: S311 nothing secret


@dataclass
class Proof:
    """The same trials on something deliberately broken. broken: what is wrong with it. lost: must not be 0."""

    broken: str
    tried: int = 0
    lost: int = 0


@dataclass
class Tally:
    """One kind of fault.

    seed: gives the same trials again; where a process was killed, the same instants to within the machine's timing. checked:
    what had to hold after each trial. parts: trials by what was hit. lost: trials after which it did not hold; examples: what
    did not, of the first few.
    """

    seed: int
    checked: str
    tried: int = 0
    lost: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)

    def count(self, part: str, problems: Sequence[str], trial: object = "") -> None:
        """One trial. problems: what did not hold; none: nothing was lost."""
        self.tried += 1
        self.parts[part] += 1
        if problems:
            self.lost += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(f"{part} {trial}: {'; '.join(problems)[:500]}")

    def add(self, other: Tally) -> None:
        """Take the trials of another tally of the same kind."""
        self.tried += other.tried
        self.lost += other.lost
        self.parts += other.parts
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def prove(self, broken: str, trials: Tally) -> None:
        """Note how the same trials ended on something broken."""
        self.proofs.append(Proof(broken, trials.tried, trials.lost))

    @property
    def good(self) -> bool:
        """Nothing was lost, and what is broken was caught."""
        return self.tried > 0 and self.lost == 0 and all(proof.lost > 0 for proof in self.proofs)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tried": self.tried,
            "lost": self.lost,
            "checked": self.checked,
            "seed": self.seed,
            "parts": dict(self.parts),
            "examples": self.examples,
            "proofs": [vars(proof) for proof in self.proofs],
        }
