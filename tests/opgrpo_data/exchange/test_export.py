"""What an export takes and where it goes: rewards and conditions, new folders only, nothing that only looks finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import export_dataset, import_dataset, selection
from opgrpo_data.exchange.export import FORMS
from opgrpo_data.exchange.selection import Selection
from opgrpo_data.exchange.target import MANIFEST, UNFINISHED, Target
from opgrpo_data.io import Directory
from opgrpo_data.seal import read_json
from opgrpo_data.store import Store
from tests.opgrpo_data.exchange.made import filled, quarantined
from tests.opgrpo_data.factories import reward_row, rewards

FOLDER = "run=run-0/iter=000000"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A filled store with one reward. Do not change it."""
    return filled(str(tmp_path_factory.mktemp("one") / "store"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A filled store with two rewards, one of them in two versions. Do not change it."""
    store = filled(str(tmp_path_factory.mktemp("several") / "store"))
    again = rewards([reward_row("run-0-i0g0m0", 7.0, version="2")])
    store.publish_table(f"rewards/reward=taste/{FOLDER}/00000.v2.000.parquet", again)
    other = rewards([reward_row("run-0-i0g0m1", 9.0, reward="smell")])
    store.publish_table(f"rewards/reward=smell/{FOLDER}/00000.v1.000.parquet", other)
    return store


def taken(store: Store, reward: str | None, where: str | None) -> set[str]:
    """The ids that a selection takes, without the run's name."""
    chosen = Selection(store, reward, where, needs_reward=False)
    return {row["trajectory_id"].removeprefix("run-0-") for page in chosen.pages for row in chosen.rows(page)}


# -- rewards and conditions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("value > 1.1", {"i1g0m1", "i1g0m2", "i1g1m1"}),
        ("value IS NULL", {"i0g1m2", "i1g1m2"}),
        ("text = 'a red square' AND iteration = 0", {"i0g0m0", "i0g0m1", "i0g0m2"}),
        ("split = 'held_out' AND metadata ->> 'n' = '2' AND member_index = 0", {"i0g1m0", "i1g1m0"}),
        ("trajectory_id IN (SELECT trajectory_id FROM buffer) AND iteration = 0 -- the buffer", {"i0g0m2", "i0g1m1"}),
    ],
)
def test_a_condition_sees_trajectories_prompts_and_the_reward(where: str, expected: set[str], store: Store) -> None:
    found = taken(store, None, where)
    assert found == expected


def test_the_reward_is_the_one_that_is_meant(several: Store) -> None:
    assert taken(several, "smell", "value > 0") == {"i0g0m1"}
    assert taken(several, "taste@2", "value > 0") == {"i0g0m0"}
    assert len(taken(several, "taste@1", "value > 0")) == 8
    assert len(taken(several, None, "iteration = 0")) == 6


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (None, "--reward is needed to say which value counts; the store has smell@1, taste@1, taste@2"),
        ("sight", "the store has no values of reward 'sight'; it has smell@1, taste@1, taste@2"),
        ("taste@3", "the store has no values of reward 'taste@3'; it has smell@1, taste@1, taste@2"),
        ("taste", "reward 'taste' has values in several versions: give --reward as one of taste@1, taste@2"),
        ("x' OR 1=1", 'the store has no values of reward "x\' OR 1=1"; it has smell@1, taste@1, taste@2'),
    ],
)
@pytest.mark.parametrize("form", ["preferences", "sft"])
def test_a_reward_that_is_not_clear(form: str, reward: str | None, told: str, several: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError) as raised:
        export_dataset(several, str(tmp_path / "out"), form, reward=reward)
    assert str(raised.value) == told
    assert not (tmp_path / "out").exists()


def test_no_reward_at_all(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"), iterations=0)
    with pytest.raises(StoreError, match=r"^--reward is needed .*; the store has none: run `opgrpo score` first$"):
        export_dataset(store, str(tmp_path / "out"), "preferences")


def test_value_without_a_clear_reward(several: Store) -> None:
    told = r"the column value needs a reward, name one of smell@1, taste@1, taste@2$"
    with pytest.raises(StoreError, match=rf"^the condition 'value > 0' cannot be asked: SQL: .*; {told}"):
        taken(several, None, "value > 0")


@pytest.mark.parametrize(
    "where",
    [
        "vaule > 0",
        "1 = ",
        "true) --",
        "true; DROP TABLE x",
        "true); COPY (SELECT 1) TO '/tmp/x'",
        "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0",
    ],
)
def test_a_condition_that_is_none(where: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^the condition .* cannot be asked: "):
        export_dataset(store, str(tmp_path / "out"), "sft", where=where)
    assert not (tmp_path / "out").exists()


def test_a_condition_that_changes_its_mind(store: Store) -> None:
    chosen = Selection(store, None, "random() < 0.5", needs_reward=False)
    told = r"^the condition 'random\(\) < 0.5' gave \d+ trajectories and then \d+: ask for something that stays the same, "
    with pytest.raises(StoreError, match=told):
        [chosen.rows(page) for _ in range(200) for page in chosen.pages]


def test_nothing_matches(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no trajectory to export for which value > 100$"):
        export_dataset(store, str(tmp_path / "out"), "sft", where="value > 100")
    with pytest.raises(StoreError, match=r"has no trajectory to export$"):
        export_dataset(Store.create(str(tmp_path / "empty")), str(tmp_path / "out"), "webdataset")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("", "the condition is empty"),
        (" \n", "the condition is empty"),
        ("false) UNION ALL (SELECT * FROM trajectories", "cannot be asked: "),
        ("true); SELECT (1", "cannot be asked: "),
    ],
)
def test_a_condition_is_one_condition(where: str, told: str, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"), iterations=1)
    with pytest.raises(StoreError, match=told):
        export_dataset(store, str(tmp_path / "out"), "webdataset", where=where)
    assert not (tmp_path / "out").exists()


def test_pages_are_bounded_and_groups_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(str(tmp_path / "store"), iterations=4)
    whole = Selection(store, None, None, needs_reward=False)
    assert [(page.run_id, page.first, page.last, page.trajectories, page.groups) for page in whole.pages] == [
        ("run-0", 0, 3, 24, 8)
    ]
    monkeypatch.setattr(selection, "PAGE_ROWS", 13)
    parts = Selection(store, None, None, needs_reward=False)
    assert [(page.first, page.last, page.trajectories) for page in parts.pages] == [(0, 1, 12), (2, 3, 12)]
    monkeypatch.setattr(selection, "PAGE_ROWS", 1)
    single = Selection(store, None, None, needs_reward=False)
    assert [(page.first, page.last) for page in single.pages] == [(n, n) for n in range(4)]
    assert [row for page in single.pages for row in single.rows(page)] == whole.rows(whole.pages[0])


def test_a_trajectory_that_two_shards_hold_counts_once(store: Store, tmp_path: Path) -> None:
    twice = filled(str(tmp_path / "store"), iterations=1)
    table = twice.read_tables("trajectories", twice.files("trajectories")[:1])
    twice.publish_table("trajectories/run=imported/iter=000000/copy.parquet", table)
    assert export_dataset(twice, str(tmp_path / "out"), "webdataset")["rows"] == 6


# -- where it goes ----------------------------------------------------------------------------------------------------------


def test_there_is_no_such_form(store: Store, tmp_path: Path) -> None:
    told = "^there is no dataset form 'csv': choose one of webdataset, huggingface, preferences, sft$"
    with pytest.raises(ValueError, match=told):
        export_dataset(store, str(tmp_path / "out"), "csv")


def test_only_into_what_is_empty(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_dataset(store, str(tmp_path / "out"), "sft")
    with pytest.raises(StoreError, match=r"out holds an export already: choose another folder$"):
        export_dataset(store, str(tmp_path / "out"), "sft")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"mine is not empty, and holds no unfinished export: choose another folder$"):
        export_dataset(store, str(tmp_path / "mine"), "sft")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(StoreError, match=r"x lies in the store .*: choose a place outside it$"):
        export_dataset(store, f"{store.directory.url}/x", "sft")
    (tmp_path / "link").symlink_to(store.directory.root)
    with pytest.raises(StoreError, match=r"link/x lies in the store .*: choose a place outside it$"):
        export_dataset(store, str(tmp_path / "link/x"), "sft")


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    """Where an export goes: on disk, and in an object store."""
    return Directory(str(tmp_path / "out") if request.param == "file" else f"memory://{tmp_path.name}/out")


def files(place: Directory) -> dict[str, bytes]:
    """All that lies in a place, unfinished files too, but for the manifest."""
    return {entry.path: place.read(entry.path) for entry in place.entries() if entry.path != MANIFEST}


@pytest.mark.parametrize("form", list(FORMS))
def test_cut_short_at_any_file_it_is_finished_by_the_same_command(
    form: str, store: Store, place: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it says that it is unfinished, so that an import refuses it."""
    left = 0

    def killing(directory: Directory, path: str) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return write_atomic(directory, path)

    expected = Directory(str(tmp_path / "expected"))
    export_dataset(store, expected.url, form)
    write_atomic, attempts = Directory.write_atomic, 0
    while True:
        left, attempts = attempts, attempts + 1
        monkeypatch.setattr(Directory, "write_atomic", killing)
        with suppress(KeyboardInterrupt):
            export_dataset(store, place.url, form)
        monkeypatch.undo()
        if UNFINISHED not in read_json(place.read(MANIFEST)):
            break
        with pytest.raises(StoreError, match=r"is an export that was cut short: run the same `opgrpo export` again, which "):
            import_dataset(place.url, str(tmp_path / "store"))
    assert attempts == (4 if form == "webdataset" else 5)
    assert files(place) == files(expected)
    with pytest.raises(StoreError, match=r"out holds an export already: choose another folder$"):
        export_dataset(store, place.url, form)


def test_what_an_unfinished_export_left_goes_and_what_is_mine_stays(store: Store, place: Directory, tmp_path: Path) -> None:
    """Also where it was another one, of which the next would not write over all files."""
    Target(place).claim()
    names = ("notes.txt", "data/notes.txt", "trajectories-of-mine.tar", "trajectories-2024.tar", "data/train-2020.parquet")
    nested = (
        "data/train-00000-of-00001/a.parquet",
        "trajectories-0-mine/x.tar",
        ".tmp-0/thesis.md",
        "sub/.tmp-a",
        ".tmp-diary",
    )
    mine = dict.fromkeys((*names, *nested), b"mine")
    left = {"trajectories-00007.tar": b"", "data/train-00003-of-00004.parquet": b"", "data/.tmp-1": b"", ".tmp-2": b"",
            "README.md": place_card(store, tmp_path)}  # fmt: skip
    for path, data in (mine | left).items():
        with place.write_atomic(path) as file:
            file.write(data)
    export_dataset(store, place.url, "webdataset")
    assert files(place).keys() == {*mine, "trajectories-00000.tar"}
    assert files(place).items() >= mine.items()


def place_card(store: Store, tmp_path: Path) -> bytes:
    """The README.md of an export."""
    export_dataset(store, str(tmp_path / "card"), "sft")
    return (tmp_path / "card" / "README.md").read_bytes()


def test_a_readme_of_mine_is_not_written_over(store: Store, tmp_path: Path) -> None:
    target = Target(Directory(str(tmp_path / "out")))
    target.claim()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(StoreError, match=r"out holds an unfinished export and a README.md that is not its own: move that away"):
        export_dataset(store, str(tmp_path / "out"), "sft")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_an_export_that_finds_nothing_leaves_nothing(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"), iterations=1)
    for name in taken(store, None, None):
        quarantined(store, f"run-0-{name}")
    for form in ("webdataset", "huggingface"):
        with pytest.raises(StoreError, match=r"^nothing is left to export: 6 quarantined\. Choose other trajectories$"):
            export_dataset(store, str(tmp_path / "out"), form)
        assert Directory(str(tmp_path / "out")).entries() == []


@pytest.mark.parametrize("form", list(FORMS))
def test_of_two_exports_at_once_the_later_has_the_place(
    form: str, store: Store, place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier has begun a file: it writes no more."""
    write_atomic = Directory.write_atomic

    @contextmanager
    def meanwhile(directory: Directory, path: str) -> Iterator[BinaryIO]:
        with write_atomic(directory, path) as file:
            monkeypatch.undo()
            export_dataset(store, place.url, form, where="iteration = 0")
            yield file

    monkeypatch.setattr(Directory, "write_atomic", meanwhile)
    told = r"^another export to .*out began meanwhile and has the place: leave it to finish$"
    with pytest.raises(StoreError, match=told):
        export_dataset(store, place.url, form)
    assert read_json(place.read(MANIFEST))["where"] == "iteration = 0"
    assert not any(".tmp-" in path for path in files(place))


def test_to_an_object_store(store: Store, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/pictures"
    export_dataset(store, url, "huggingface")
    assert [entry.path for entry in Directory(url).entries()] == ["README.md", "data/train-00000-of-00001.parquet", MANIFEST]
