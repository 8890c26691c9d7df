"""The small version of benchmarks.faults: nothing is lost, and what is deliberately broken is caught.

That of failing servers is tests/opgrpo_data/places/test_remote_faults.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.faults import __main__ as command
from benchmarks.faults import broken, cleaners, crowds, damage, disk, kinds, names, victims
from benchmarks.faults.kills import Victim, kill
from benchmarks.faults.tally import Tally
from opgrpo_data.store import Store

VICTIMS: Mapping[str, Victim] = {
    victim.name: victim
    for victim in (
        victims.WRITER,
        victims.PUBLISHER,
        cleaners.COMPACTOR,
        cleaners.COLLECTOR,
        victims.IMPORTER,
        victims.migrator(kinds.RELEASED),
    )
}


def nothing_lost(tally: Tally) -> None:
    assert tally.tried > 0
    assert tally.lost == 0, tally.examples


@pytest.mark.parametrize("name", VICTIMS)
def test_kills(name: str, tmp_path: Path) -> None:
    tally = kill(VICTIMS[name], tmp_path, 2, seed=0)
    nothing_lost(tally)
    assert tally.tried == 2


@pytest.mark.filterwarnings("ignore:.*passed over:UserWarning")
@pytest.mark.parametrize(
    ("wrong", "sound"),
    [
        (broken.WRITER, victims.WRITER),
        (broken.PUBLISHER, victims.PUBLISHER),
        (broken.COMPACTOR, None),
        (broken.HASTY_COLLECTOR, cleaners.COLLECTOR),
        (broken.BLIND_COLLECTOR, cleaners.COLLECTOR),
    ],
    ids=["index first", "in place", "JSON first", "tars first", "no marks"],
)
def test_the_kills_catch_a_broken_order(wrong: Victim, sound: Victim | None, tmp_path: Path) -> None:
    """Most kills hit the wrong order, but none must: up to 60."""
    for seed in range(15):
        tally = kill(wrong, tmp_path, 4, seed, sound=sound)
        if tally.lost:
            assert tally.examples[0].startswith(f"broken {wrong.name.removeprefix('broken ')} kill ")
            return
    pytest.fail("60 kills of a broken commit order lost nothing")


def test_flipped_bits_and_cut_files(tmp_path: Path) -> None:
    tally = damage.flip_bits(tmp_path, 14, seed=0)
    nothing_lost(tally)
    assert set(tally.parts.values()) == {1}  # of each kind of file
    assert {"latents tar", "media tar", "trajectories index", "plans table", "tensors", "JSON document"} < tally.parts.keys()
    cut = damage.truncate(tmp_path, 2, 0, {"media tar", "plans table", "JSON document"})
    nothing_lost(cut)
    assert {"0 bytes", "in a header", "in a payload", "in the padding", "in the end blocks", "in the footer"} < cut.parts.keys()


def test_damage_that_nobody_finds_is_counted(tmp_path: Path) -> None:
    """A Patient whose sound content is not what its files hold: every reader hands out something else."""
    patient = damage.Patient(tmp_path / "store")
    path = next(path for path in patient.readers if path.startswith("rewards/"))
    right = patient.store.directory.read(path)
    patient.sound[path] = [None, patient.sound[path][1]]
    problems = patient.problems(path, right)
    assert problems[0].startswith("verify does not name it")
    assert problems[1].startswith("a reader got pyarrow.Table")
    assert patient.store.directory.read(path) == right


def test_eight_writers_at_once(tmp_path: Path) -> None:
    tally = crowds.concurrent_writers(tmp_path, 2, seed=0)
    nothing_lost(tally)
    assert tally.parts == {"trajectories": 2, "rewards": 2, "updates": 2, "runs": 2, "the store as a whole": 1}


def test_two_winners_and_mixed_bytes_are_counted(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    for path, publish in crowds.publications(store, 0, 3):
        assert publish()
        assert list(crowds.of_one(store, path, [3])) == []
        assert list(crowds.of_one(store, path, [4])) == ["it holds bytes of [3], created it was by 4"]
        assert list(crowds.of_one(store, path, [3, 4])) == ["2 writers were told that they created it"]
        assert list(crowds.of_one(store, path, [])) == ["0 writers were told that they created it"]


def test_a_full_disk(tmp_path: Path) -> None:
    nothing_lost(disk.full_disk(tmp_path, 1, 0, {"shard", "policy", "compactor", "export webdataset"}))


def test_a_limit_where_no_disk_may_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users without root get."""
    monkeypatch.setattr(disk, "MOUNT", "false")
    tally = disk.full_disk(tmp_path, 1, 0, {"shard", "table"})
    nothing_lost(tally)
    assert tally.checked.startswith("RLIMIT_FSIZE")


def test_wrong_clocks(tmp_path: Path) -> None:
    nothing_lost(crowds.clock_skew(tmp_path, 1, seed=0))


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    config, store = tmp_path / "config.yaml", tmp_path / "store"
    config.write_text(names.SETTINGS)
    told = names.at_once(tmp_path, store, [config, config])
    assert names.problems(store, told, [told[0]["policy_id"]] * 2, runs=1) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(work: Path, count: int, seed: int) -> Tally:
        tally = Tally(seed, "all is well")
        for number in range(count):
            tally.count("part", ["gone"] if number == seed else [], number)
        return tally

    monkeypatch.setattr(command, "KINDS", {"one": kinds.Kind(tried, 3, 2)})
    saved = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="0"):
        command.main(["--quick", "--seed", "9", "--json", "--work", str(tmp_path), "--save", str(saved)])
    told = json.loads(capsys.readouterr().out)
    assert (told["one"]["tried"], told["one"]["lost"], told["one"]["seed"], told["one"]["parts"]) == (2, 0, 9, {"part": 2})
    assert json.loads(saved.read_text()) == told
    with pytest.raises(SystemExit, match="1"):
        command.main(["--seed", "2", "--work", str(tmp_path), "--only", "one"])
    said = capsys.readouterr().out
    assert "| `one` | 3 | 1 |" in said
    assert "- one: part 2: gone" in said
    with pytest.raises(SystemExit, match="0"):
        command.main(["--summary", "--results", str(saved)])
    assert "| `one` | 2 | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--summary", "--results", str(tmp_path / "none.json")])


def test_a_tally_is_good_only_with_its_proofs() -> None:
    assert not Tally(0, "").good  # nothing was tried
    assert Tally(0, "", tried=1).good
    assert not Tally(0, "", tried=1, lost=1).good
    tally = Tally(0, "", tried=1)
    tally.prove("broken", Tally(0, "", tried=5))
    assert tally.told()["proofs"] == [{"broken": "broken", "tried": 5, "lost": 0}]
    assert not tally.good


def test_a_tally_is_good_when_what_is_broken_was_caught() -> None:
    tally = Tally(0, "", tried=1)
    tally.prove("broken", Tally(0, "", tried=5, lost=1))
    assert tally.good
