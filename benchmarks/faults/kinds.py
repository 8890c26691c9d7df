"""The kinds of faults, and how often each is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.faults import broken, cleaners, victims
from benchmarks.faults.crowds import clock_skew, concurrent_writers
from benchmarks.faults.damage import flip_bits, truncate
from benchmarks.faults.disk import full_disk
from benchmarks.faults.kills import Victim, kill
from benchmarks.faults.names import same_name
from benchmarks.faults.servers import kill_s3_writer, s3_errors, s3_races, s3_slow, s3_timeouts
from benchmarks.faults.tally import Tally

RELEASED = Path(__file__).parents[2] / "tests" / "opgrpo_data" / "fixtures" / "store-1.0"
PROOFS_AT_ONCE = 6
MOST_PROOFS = 60

Try = Callable[[Path, int, int], Tally]


@dataclass(frozen=True)
class Kind:
    """A kind of fault. run: (folder, count, seed) to a Tally. full, quick: how often it is tried, or the least of it."""

    run: Try
    full: int
    quick: int


def _killed(victim: Victim, proofs: Mapping[str, Victim], work: Path, count: int, seed: int) -> Tally:
    """Kills of a victim; and a fifth as many of broken ones, more until they have lost something: proof that kills can tell."""
    tally = kill(victim, work, count, seed)
    for what, wrong in proofs.items():
        trials = Tally(seed, what)
        sound = victim if wrong.prepare == victim.prepare else None
        while trials.tried < count // 5 or (trials.lost == 0 and trials.tried < MOST_PROOFS):
            trials.add(kill(wrong, work, PROOFS_AT_ONCE, seed + trials.tried, sound=sound))
        tally.prove(what, trials)
    return tally


def _kind(victim: Victim, full: int, quick: int, **proofs: Victim) -> Kind:
    told = {what.replace("_", " "): wrong for what, wrong in proofs.items()}
    return Kind(partial(_killed, victim, told), full, quick)


KINDS: Mapping[str, Kind] = {
    "kill_writer": _kind(victims.WRITER, 350, 6, index_published_before_its_tars=broken.WRITER),
    "kill_publisher": _kind(victims.PUBLISHER, 200, 4, files_written_in_place=broken.PUBLISHER),
    "kill_compactor": _kind(cleaners.COMPACTOR, 150, 3, JSON_published_before_its_Parquet_file=broken.COMPACTOR),
    "kill_collector": _kind(
        cleaners.COLLECTOR,
        150,
        4,
        tars_removed_before_they_are_announced=broken.HASTY_COLLECTOR,
        marks_not_looked_at=broken.BLIND_COLLECTOR,
    ),
    "kill_importer": _kind(victims.IMPORTER, 60, 2),
    "kill_migration": _kind(victims.migrator(RELEASED), 50, 2),
    "kill_s3_writer": Kind(kill_s3_writer, 40, 2),
    "flip_bits": Kind(flip_bits, 1000, 60),
    "truncate": Kind(truncate, 200, 0),
    "concurrent_writers": Kind(concurrent_writers, 50, 3),
    "full_disk": Kind(full_disk, 5, 1),
    "s3_errors": Kind(s3_errors, 500, 20),
    "s3_timeouts": Kind(s3_timeouts, 50, 3),
    "s3_slow": Kind(s3_slow, 50, 3),
    "s3_races": Kind(s3_races, 30, 2),
    "clock_skew": Kind(clock_skew, 20, 1),
    "same_name": Kind(same_name, 2, 0),
}
"""Kills add up to 1,000."""
