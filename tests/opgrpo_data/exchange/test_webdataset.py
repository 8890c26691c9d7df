"""Plain WebDataset: any reader takes it, and it comes back without loss; what is damaged or hostile in it does not."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opgrpo_data import ids
from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import export_dataset, import_dataset, importing, webdataset
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.target import MANIFEST
from opgrpo_data.exchange.webdataset import Sample
from opgrpo_data.io import Directory
from opgrpo_data.seal import sealed_json
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder
from tests.opgrpo_data.exchange.made import PLACES, contents, damage, filled, quarantined, rows_of, same
from tests.opgrpo_data.factories import random_latents, record, reward_row, rewards

VIEWS: dict[str, set[str]] = {"trajectories": PLACES, "prompts": set(), "rewards": set(), "reward_errors": set()}
TAR = "trajectories-00000.tar"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A filled store. Do not change it."""
    return filled(str(tmp_path_factory.mktemp("source") / "store"))


@pytest.fixture(scope="module")
def exported(source: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export. Do not change it."""
    folder = tmp_path_factory.mktemp("exported") / "tars"
    export_dataset(source, str(folder), "webdataset")
    return folder


@pytest.fixture(scope="module")
def there(source: Store) -> dict[str, tuple[bytes, bytes]]:
    """Its bytes."""
    return contents(source)


def read(folder: Path) -> tuple[list[Sample], LeftOut]:
    """What can be read of a tar that should hold twelve trajectories."""
    left_out = LeftOut()
    size = (folder / TAR).stat().st_size
    return list(webdataset.read(Directory(str(folder)), TAR, size, 12, left_out)), left_out


def copied(exported: Path, folder: Path, change: Callable[[list[tuple[str, bytes]]], Any]) -> Path:
    """A copy of an export whose tar has members changed in place by `change`."""
    folder.mkdir()
    (folder / MANIFEST).write_bytes((exported / MANIFEST).read_bytes())
    with tarfile.open(exported / TAR) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(folder / TAR, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def unchanged(members: list[tuple[str, bytes]]) -> None:
    """Leave the members as they are."""


def taken(folder: Path, to: Path) -> tuple[dict[str, Any], Store]:
    """What an import into a new store says, and the store."""
    store = Store.create(str(to))
    return import_dataset(str(folder), store.directory.url), store


# -- there and back -----------------------------------------------------------------------------------------------------


def test_comes_back_without_loss(source: Store, exported: Path, tmp_path: Path) -> None:
    told, store = taken(exported, tmp_path / "store")
    assert told == {
        "source": str(exported), "form": "webdataset", "trajectories": 12, "already_there": 0, "prompts": 2, "rewards": 12,
        "left_out": {}, "left_out_because": [],
    }  # fmt: skip
    same(store, source, VIEWS)
    assert contents(store) == contents(source)
    assert {row["latents_file"].rpartition("/")[0] for row in rows_of(store, "trajectories")} == {
        iteration_folder("trajectories", "run-0", iteration) for iteration in (0, 1)
    }


def test_through_an_object_store(source: Store, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    export_dataset(source, f"{url}/tars", "webdataset")
    store = Store.create(f"{url}/store")
    import_dataset(f"{url}/tars", store.directory.url)
    same(store, source, VIEWS)
    assert contents(store) == contents(source)


def test_plain_readers_see_samples(exported: Path, source: Store) -> None:
    import webdataset as wds

    samples = {sample["__key__"]: sample for sample in wds.WebDataset(str(exported / TAR), shardshuffle=False).decode("rgb8")}
    there = contents(source)
    assert samples.keys() == there.keys()
    for name, sample in samples.items():
        assert sample["latents.npy"].tobytes() == there[name][0]
        assert sample["json"]["trajectory"]["trajectory_id"] == name
        assert sample["json"]["prompt"] in ("a red square", "two blue circles, | `quoted`\nand σ")
        assert sample["png"].shape == (4, 4, 3)


def test_many_tars_and_chunks(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "TAR_BYTES", 5000)
    monkeypatch.setattr(importing, "CHUNK_BYTES", 500)
    told = export_dataset(source, str(tmp_path / "tars"), "webdataset")
    tars = sorted(path.name for path in (tmp_path / "tars").glob("*.tar"))
    assert tars == [f"trajectories-{number:05d}.tar" for number in range(told["files"])]
    assert len(tars) > 2
    _, store = taken(tmp_path / "tars", tmp_path / "store")
    same(store, source, VIEWS)
    assert contents(store) == contents(source)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
floats = st.floats()
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)
simple = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
nested = st.recursive(
    simple, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2), max_leaves=4
)
dtypes = st.sampled_from(["float32", "float16", "bfloat16"])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.dictionaries(names, st.tuples(floats, floats, dtypes), min_size=1, max_size=3),
    text=texts,
    metadata=st.dictionaries(texts, nested, max_size=3),
    detail=texts,
)
def test_any_name_text_and_number_comes_back(
    found: dict[str, tuple[float, float, str]],
    text: str,
    metadata: dict[str, Any],
    detail: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = Store.create(str(folder / "source"))
    source.add_prompts([{"text": text, "metadata": metadata}], "train")
    prompt_id = ids.prompt_id(text, metadata)
    records = [
        record(name, random_latents(1, 2, (3,), dtype), dtype=dtype, prompt_id=prompt_id, behaviour_logprob=[number, -0.0],
               noise_level=number, media=text.encode())
        for name, (number, _, dtype) in found.items()
    ]  # fmt: skip
    write_shard(source.directory, iteration_folder("trajectories", "run-0", 0), "00000", records)
    rows = [reward_row(name, value, detail=detail) for name, (_, value, _) in found.items()]
    source.publish_table("rewards/reward=taste/run=run-0/iter=000000/00000.v1.000.parquet", rewards(rows))
    export_dataset(source, str(folder / "tars"), "webdataset")
    _, store = taken(folder / "tars", folder / "store")
    same(store, source, VIEWS)
    assert contents(store) == contents(source)


def test_import_twice_is_import_once(source: Store, exported: Path, tmp_path: Path) -> None:
    _, store = taken(exported, tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"^the store .* holds something already: add --merge .*, or choose another store$"):
        import_dataset(str(exported), store.directory.url)
    told = import_dataset(str(exported), store.directory.url, merge=True)
    assert (told["trajectories"], told["already_there"], told["rewards"], told["prompts"]) == (0, 12, 0, 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_same_id_with_other_bytes(exported: Path, tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"), iterations=1, salt=1)
    before = contents(store)
    told = (
        r"^6 trajectories of .* are in .* with other bytes: run-0-i0g0m0, run-0-i0g0m1, run-0-i0g0m2, run-0-i0g1m0, "
        r"run-0-i0g1m1, \.\.\.\. They were left where they are, 6 others were imported: keep the two in stores of their own"
    )
    with pytest.raises(StoreError, match=told):
        import_dataset(str(exported), store.directory.url, merge=True)
    after = contents(store)
    assert {name: after[name] for name in before} == before
    assert len(after) == 12


# -- left out -----------------------------------------------------------------------------------------------------------


def test_what_is_damaged_in_the_store_stays_there(tmp_path: Path) -> None:
    source = filled(str(tmp_path / "source"), iterations=1)
    damage(source, "run-0-i0g0m0")
    damage(source, "run-0-i0g0m1", "media")
    quarantined(source, "run-0-i0g1m2")
    told = export_dataset(source, str(tmp_path / "tars"), "webdataset")
    assert (told["rows"], told["trajectories"], told["left_out"]) == (3, 6, {"damaged": 2, "quarantined": 1})
    assert sorted(message.split("member ")[1].split(":")[0] for message in told["left_out_because"]) == [
        "run-0-i0g0m0.latents.npy latent 3", "run-0-i0g0m1.png",
    ]  # fmt: skip
    _, store = taken(tmp_path / "tars", tmp_path / "store")
    assert sorted(contents(store)) == ["run-0-i0g0m2", "run-0-i0g1m0", "run-0-i0g1m1"]


def flip(kind: str) -> Callable[[list[tuple[str, bytes]]], None]:
    """Flip a bit in the middle of the first member of a kind."""

    def change(members: list[tuple[str, bytes]]) -> None:
        at = next(i for i, (name, _) in enumerate(members) if name.endswith(kind))
        data = bytearray(members[at][1])
        data[len(data) // 2] ^= 1
        members[at] = (members[at][0], bytes(data))

    return change


@pytest.mark.parametrize("kind", ["latents.npy", "png", "json"])
def test_a_flipped_bit_costs_one_trajectory(kind: str, exported: Path, source: Store, tmp_path: Path) -> None:
    told, store = taken(copied(exported, tmp_path / "tars", flip(kind)), tmp_path / "store")
    assert (told["trajectories"], told["left_out"]) == (11, {"damaged": 1})
    assert "run-0-i0g0m0" in told["left_out_because"][0]
    there = contents(source)
    assert contents(store) == {name: there[name] for name in there if name != "run-0-i0g0m0"}


@pytest.mark.parametrize("length", [0, 700, 20_000])
def test_a_tar_cut_short(length: int, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "tars", unchanged)
    (folder / TAR).write_bytes((folder / TAR).read_bytes()[:length])
    told, store = taken(folder, tmp_path / "store")
    assert told["trajectories"] + told["left_out"]["damaged"] == 12
    assert len(contents(store)) == told["trajectories"] < 12


def test_a_tar_that_is_gone(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "tars", unchanged)
    (folder / TAR).unlink()
    told, _ = taken(folder, tmp_path / "store")
    assert (told["trajectories"], told["left_out"]) == (0, {"damaged": 12})


# -- hostile ------------------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[tuple[str, bytes]]], None]:
    """Change the JSON of the first trajectory, and seal it again as an attacker would."""

    def edit(members: list[tuple[str, bytes]]) -> None:
        name, data = members[2]
        document = json.loads(data)
        document.pop("seal")
        change(document)
        members[2] = (name, sealed_json(document))

    return edit


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def huge() -> bytes:
    """A header that promises an exabyte."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (4, 2**58)})
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["trajectory"].update(trajectory_id="../../x"), "trajectory_id '../../x' cannot be part of a path"),
        (lambda d: d["trajectory"].update(run_id="../x"), "run_id '../x' cannot be part of a path"),
        (lambda d: d["trajectory"].update(trajectory_id="other"), "it names itself 'other'"),
        (lambda d: d["trajectory"].update(iteration=-1), "is of no iteration of a run: 'run-0', -1"),
        (lambda d: d["trajectory"].update(num_steps=10**6), "has num_steps 1000000; expected 1 to 10000"),
        (lambda d: d["trajectory"].update(num_steps=10**30), "too large"),
        (lambda d: d["trajectory"].update(num_steps=2), "has 3 noise_seeds for 2 steps"),
        (lambda d: d["trajectory"].update(prefix_steps=4), "keeps 4 of 3 steps"),
        (lambda d: d["trajectory"].update(latent_shape=[2**31 - 1] * 8), "more than 17179869184 bytes"),
        (lambda d: d["trajectory"].update(latent_shape=[]), r"has latents of shape \[\]"),
        (lambda d: d["trajectory"].update(latent_shape=[4]), r"its latents are not the .npy of float32 \(4, 4\)"),
        (lambda d: d["trajectory"].update(latent_dtype="object"), "has latents of 'object'; expected one of float32"),
        (lambda d: d["trajectory"].update(media_format="../png"), "has media_format '../png'; expected one of png, webp, mp4"),
        (lambda d: d["trajectory"].update(media_format="mp4"), "mp4"),
        (lambda d: d["trajectory"].update(latents_crc32=[1]), "has no checksum for each of its 4 latents"),
        (lambda d: d["trajectory"].update(latents_crc32=[1] * 4), "latent 0 does not have the checksum 00000001"),
        (lambda d: d["trajectory"].update(sigmas="abc"), "tried to convert to double"),
        (lambda d: d["trajectory"].update(noise_level="1e9"), "1e9"),
        (lambda d: d["trajectory"].update(created_at="yesterday"), "yesterday"),
        (lambda d: d["trajectory"].update(evil=1), r"it has \['evil'\], which no table has"),
        (lambda d: d.pop("trajectory"), "trajectory"),
        (lambda d: d.update(prompt="another"), "is not what its id says"),
        (lambda d: d.update(metadata=[]), "metadata"),
        (lambda d: d.update(split="../x"), "split '../x' cannot be part of a path"),
        (lambda d: d["rewards"][0].update(reward="../x"), "reward '../x' cannot be part of a path"),
        (lambda d: d["rewards"][0].update(version="*"), r"version '\*' cannot be part of a path"),
        (lambda d: d["rewards"][0].update(value=None), "says nothing of trajectory"),
        (lambda d: d.update(rewards="abc"), "mapping|abc|dict"),
    ],
)  # fmt: skip
def test_a_hostile_document_costs_itself(
    change: Callable[[dict[str, Any]], Any], told: str, exported: Path, tmp_path: Path
) -> None:
    samples, left_out = read(copied(exported, tmp_path / "tars", edited(change)))
    assert (len(samples), left_out.counts) == (11, {"damaged": 1})
    [message] = left_out.messages
    assert "\n" not in message
    assert re.search(told, message), message


@pytest.mark.parametrize(
    "member",
    [
        npy(np.array([{"a": 1}], object), allow_pickle=True),
        huge(),
        npy(np.zeros((4, 2, 2), np.float64)),
        npy(np.asfortranarray(np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32))),
        npy(np.zeros((4, 2, 2), np.float32))[:-1],
        b"\x93NUMPY\x02\x00" + b"\xff" * 64,
        b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 65535,
        b"",
    ],
)
def test_hostile_arrays(member: bytes, exported: Path, tmp_path: Path) -> None:
    def change(members: list[tuple[str, bytes]]) -> None:
        members[0] = (members[0][0], member)

    samples, left_out = read(copied(exported, tmp_path / "tars", change))
    assert (len(samples), left_out.counts) == (11, {"damaged": 1})
    assert "its latents are not the .npy of float32 (4, 2, 2) that its row tells of" in left_out.messages[0]


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", ".hidden.json", "a/b.json", "x.sh", "x"])
def test_hostile_member_names_end_the_tar(name: str, exported: Path, tmp_path: Path) -> None:
    samples, left_out = read(copied(exported, tmp_path / "tars", lambda members: members.insert(3, (name, b"x"))))
    assert (len(samples), left_out.counts) == (1, {"damaged": 11})
    assert f"{name!r} is no member of an export" in left_out.messages[0]
    assert {path.name for path in tmp_path.iterdir()} == {"tars"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_hostile_member_types(kind: bytes, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "tars", lambda members: members.clear())
    with tarfile.open(folder / TAR, "w") as tar:
        member = tarfile.TarInfo("x.json")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    samples, left_out = read(folder)
    assert (len(samples), left_out.counts) == (0, {"damaged": 12})


@pytest.mark.parametrize("size", [b"77777777777\x00", b"\x80" + b"\xff" * 11, b"-0000000001\x00", b"\xff" * 12])
def test_hostile_member_sizes(size: bytes, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "tars", unchanged)
    data = bytearray((folder / TAR).read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    (folder / TAR).write_bytes(data)
    samples, left_out = read(folder)
    assert len(samples) + left_out.counts["damaged"] == 12


@pytest.mark.parametrize("seed", range(30))
def test_no_damage_to_a_tar_does_more_than_damage(
    seed: int, exported: Path, there: dict[str, tuple[bytes, bytes]], tmp_path: Path
) -> None:
    """Random bytes at random places: what is still read is what was written."""
    random = np.random.default_rng(seed)
    data = bytearray((exported / TAR).read_bytes())
    for _ in range(random.integers(1, 5)):
        at, put = int(random.integers(len(data))), random.bytes(int(random.integers(1, 40)))
        data[at : at + len(put)] = put
    (tmp_path / TAR).write_bytes(data)
    samples, left_out = read(tmp_path)
    for sample in samples:
        assert there[sample.record.row["trajectory_id"]] == (sample.record.latents.tobytes(), sample.record.media)
    assert len(samples) + left_out.counts["damaged"] >= 12


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (b"", "opgrpo-export.json is not JSON"),
        (b"[" * 10**5, "opgrpo-export.json is not JSON"),
        (b"[]", "opgrpo-export.json holds no JSON object"),
        (b" " * (16 * 2**20 + 1), "opgrpo-export.json is longer than 16777216 bytes"),
        (b"{}", "is of no format that this software knows: None None"),
        (b'{"format": "opgrpo-export", "version": "2.0"}', "is of no format that this software knows: 'opgrpo-export' 2.0"),
        (b'{"format": "opgrpo-export", "version": "1.0", "form": "sft"}', "is an export as sft: pictures without latents "
         "cannot become trajectories. Export the store that they come from with --as webdataset, or import that store"),
        (b'{"format": "opgrpo-export", "version": "1.0", "form": "webdataset"}', "lists no files: it is damaged"),
        (b'{"format": "opgrpo-export", "version": "1.0", "form": "webdataset", "files": [1]}', "lists 1: it is damaged"),
        (b'{"format": "opgrpo-export", "version": "1.0", "form": "webdataset", "files": [{"path": "../x", "rows": 1}]}',
         "cannot be part of a path"),
    ],
)  # fmt: skip
def test_hostile_manifests(manifest: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / MANIFEST).write_bytes(manifest)
    with pytest.raises(ValueError, match=told):
        taken(tmp_path / "tars", tmp_path / "store")


def test_not_finite_numbers_are_legal_json(source: Store, tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"))
    numbers = [math.nan, math.inf, -math.inf]
    records = [record("t0", random_latents(0, 3, (2,)), behaviour_logprob=numbers)]
    write_shard(store.directory, iteration_folder("trajectories", "r", 0), "0", records)
    export_dataset(store, str(tmp_path / "tars"), "webdataset")
    with tarfile.open(tmp_path / "tars" / TAR) as tar:
        data = tar.extractfile("t0.json").read()  # type: ignore[union-attr]
    document = json.loads(data, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert document["trajectory"]["behaviour_logprob"] == ["NaN", "Infinity", "-Infinity"]
