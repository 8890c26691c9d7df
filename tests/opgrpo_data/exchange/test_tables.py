"""Parquet datasets: pairs as a plain derivation has them, pictures byte for byte, a schema that Hugging Face reads."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from opgrpo_data.errors import StoreError
from opgrpo_data.exchange import export_dataset, tables
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store, iteration_folder
from tests.opgrpo_data.exchange.made import TEXTS, contents, damage, filled, quarantined
from tests.opgrpo_data.factories import random_latents, record, reward_row, rewards, shard_rows

VALUES: dict[str, list[float | None]] = {
    "g0": [0.5, 0.25, 1.0, 0.25],
    "g1": [0.5, 0.5, 0.5, 0.5],
    "g2": [1.0, 0.0, 1.0, 0.0],
    "g3": [float("nan"), None, 0.75, 0.5],
    "g4": [0.75, None, None, None],
    "g5": [-1.0, float("inf"), -2.0, -3.0],
}
"""Rewards by group and member: ties, no difference, no value, one value, what is not finite."""


def judged(url: str, groups: dict[str, list[float | None]] = VALUES, media_format: str = "png") -> Store:
    """A store with groups of these rewards, two groups a shard."""
    store = Store.create(url)
    names = list(groups)
    for shard in range(0, len(names), 2):
        records, rows = [], []
        for group in names[shard : shard + 2]:
            for member, value in enumerate(groups[group]):
                name = f"{group}m{member}"
                latents = random_latents(member, 3, (2,))
                records.append(record(name, latents, group_id=group, member_index=member, media_format=media_format))
                rows.append(reward_row(name, value, error="no picture" if value is None else None))
        write_shard(store.directory, iteration_folder("trajectories", "run-0", 0), f"{shard:05d}", records)
        store.publish_table(f"rewards/reward=taste/run=run-0/iter=000000/{shard:05d}.v1.000.parquet", rewards(rows))
    return store


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """All rows of a dataset, in the order of its files."""
    files = sorted((folder / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Head and text of the dataset card."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


# -- preferences ----------------------------------------------------------------------------------------------------------


def test_pairs_are_the_best_and_worst_of_each_group(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"))
    told = export_dataset(store, str(tmp_path / "pairs"), "preferences")
    media = {name: data for name, (_, data) in contents(store).items()}
    expected = [
        ("g0m2", "g0m1", 1.0, 0.25),
        ("g2m0", "g2m1", 1.0, 0.0),
        ("g3m2", "g3m3", 0.75, 0.5),
        ("g5m0", "g5m3", -1.0, -3.0),
    ]
    assert [
        (row["chosen_id"], row["rejected_id"], row["chosen_reward"], row["rejected_reward"])
        for row in rows_in(tmp_path / "pairs")
    ] == expected
    for row in rows_in(tmp_path / "pairs"):
        assert row["margin"] == row["chosen_reward"] - row["rejected_reward"] > 0
        assert row["group_id"] == row["chosen_id"][:2]
        for side in ("chosen", "rejected"):
            assert row[side] == {"bytes": media[row[f"{side}_id"]], "path": f"{row[f'{side}_id']}.png"}
    assert told["left_out"] == {"groups without a difference": 2, "without a reward": 6}
    assert (told["rows"], told["files"], told["reward"]) == (4, 1, "taste@1")


def test_pairs_of_a_filled_store_by_plain_python(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    export_dataset(store, str(tmp_path / "pairs"), "preferences")
    values = {row["trajectory_id"]: row["value"] for row in store.read_tables("rewards", store.files("rewards")).to_pylist()}
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in shard_rows(store):
        if values[row["trajectory_id"]] is not None:
            groups[row["group_id"]][row["trajectory_id"]] = values[row["trajectory_id"]]
    expected = {
        group: (min(members, key=lambda name: (-members[name], name)), min(members, key=lambda name: (members[name], name)))
        for group, members in groups.items()
    }
    found = {row["group_id"]: (row["chosen_id"], row["rejected_id"]) for row in rows_in(tmp_path / "pairs")}
    assert found == expected
    assert {row["prompt"] for row in rows_in(tmp_path / "pairs")} == set(TEXTS)
    assert {row["metadata"] for row in rows_in(tmp_path / "pairs")} == {'{"kind":"single"}', '{"kind":"count","n":2}'}


def test_the_next_best_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"), {"g0": [0.0, 0.25, 0.5, 1.0], "g1": [0.0, 1.0]})
    damage(store, "g0m3", "media")
    quarantined(store, "g0m0")
    damage(store, "g1m1", "media")
    told = export_dataset(store, str(tmp_path / "pairs"), "preferences")
    assert [(row["chosen_id"], row["rejected_id"]) for row in rows_in(tmp_path / "pairs")] == [("g0m2", "g0m1")]
    assert told["left_out"] == {"damaged": 2, "quarantined": 1, "groups without a difference": 1}
    assert "g0m3.png: expected crc32" in told["left_out_because"][0]


def test_a_condition_comes_before_the_pairs(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"))
    export_dataset(store, str(tmp_path / "pairs"), "preferences", where="member_index < 2 AND value < 100")
    assert [(row["chosen_id"], row["rejected_id"]) for row in rows_in(tmp_path / "pairs")] == [
        ("g0m0", "g0m1"),
        ("g2m0", "g2m1"),
    ]


# -- sft --------------------------------------------------------------------------------------------------------------------


def test_the_best_of_each_group(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"))
    damage(store, "g0m2", "media")
    told = export_dataset(store, str(tmp_path / "best"), "sft")
    found = {row["trajectory_id"]: row["value"] for row in rows_in(tmp_path / "best")}
    assert found == {"g0m0": 0.5, "g1m0": 0.5, "g2m0": 1.0, "g3m2": 0.75, "g4m0": 0.75, "g5m0": -1.0}
    assert told["left_out"] == {"damaged": 1, "without a reward": 6}


def test_all_that_match_a_condition(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"))
    told = export_dataset(store, str(tmp_path / "good"), "sft", where="isfinite(value) AND value >= 0.75")
    media = {name: data for name, (_, data) in contents(store).items()}
    found = rows_in(tmp_path / "good")
    assert {row["trajectory_id"] for row in found} == {"g0m2", "g2m0", "g2m2", "g3m2", "g4m0"}
    assert all(row["image"]["bytes"] == media[row["trajectory_id"]] for row in found)
    assert told["where"] == "isfinite(value) AND value >= 0.75"


# -- huggingface --------------------------------------------------------------------------------------------------------------


def test_pictures_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    export_dataset(store, str(tmp_path / "pictures"), "huggingface")
    there = {row["trajectory_id"]: row for row in shard_rows(store)}
    media = {name: data for name, (_, data) in contents(store).items()}
    found = rows_in(tmp_path / "pictures")
    assert len(found) == len(there) == 12
    for row in found:
        source = there[row["trajectory_id"]]
        assert row["image"] == {"bytes": media[row["trajectory_id"]], "path": f"{row['trajectory_id']}.png"}
        assert all(row[name] == source[name] for name in row.keys() & source.keys())
        assert row["split"] == ("train" if row["prompt"] == "a red square" else "held_out")
        judged_as = {} if row["value"] is None else {"taste@1": row["value"]}
        assert json.loads(row["rewards"]) == judged_as
        assert row["value"] == (None if row["trajectory_id"].endswith("g1m2") else row["member_index"] / 4 + row["iteration"])


@pytest.mark.parametrize("form", ["huggingface", "preferences", "sft"])
def test_what_hugging_face_reads(form: str, tmp_path: Path) -> None:
    """Features in the schema, as datasets 5.2 writes them itself, and the same in the card."""
    export_dataset(filled(str(tmp_path / "store")), str(tmp_path / "out"), form)
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    pictures = {"chosen", "rejected"} if form == "preferences" else {"image"}
    assert {name for name, feature in features.items() if feature == {"_type": "Image"}} == pictures
    dtypes = {
        "string": "string",
        "int64": "int64",
        "int32": "int32",
        "double": "float64",
        "timestamp[us, tz=UTC]": "timestamp[us, tz=UTC]",
    }
    for name in set(features) - pictures:
        assert features[name] == {"dtype": dtypes[str(schema.field(name).type)], "_type": "Value"}
    head, text = card_of(tmp_path / "out")
    expected = [{"name": name, "dtype": "image" if name in pictures else features[name]["dtype"]} for name in schema.names]
    assert head["dataset_info"]["features"] == expected
    rows = rows_in(tmp_path / "out")
    size = sum(len(row[name]["bytes"]) for row in rows for name in pictures)
    assert head["dataset_info"]["splits"] == [{"name": "train", "num_examples": len(rows), "num_bytes": size}]
    assert head["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
    assert head["size_categories"] == ["n<1K"]
    assert "license" not in head
    for name in schema.names:
        assert f"| `{name}` |" in text


def test_the_card_says_how_it_was_made(tmp_path: Path) -> None:
    store = filled(str(tmp_path / "store"))
    quarantined(store, "run-0-i0g0m0")
    export_dataset(store, str(tmp_path / "out"), "huggingface", where="value < 1 AND text <> '|`\n'")
    _, text = card_of(tmp_path / "out")
    assert "4 rows, drawn by generative models for 2 prompts" in text
    assert "as `huggingface`, those for which `value < 1 AND text <> '/' '`." in text
    assert "5 trajectories of 1 runs match; 0 of them continue" in text
    assert "| `none` | `flow_sde` | `3` | `0.7` | `1.0` | `5` |" in text
    assert "The reward `taste@1` has judged 5 of them: from 0 to 0.5, 0.2 on average." in text
    assert "Left out: 1 quarantined." in text


def test_many_files_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(str(tmp_path / "store"), iterations=3)
    damage(store, "run-0-i1g0m1", "media")
    size = sum(row["media_length"] for row in shard_rows(store))
    monkeypatch.setattr(tables, "FILE_BYTES", size // 4 + 1)
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 2)
    told = export_dataset(store, str(tmp_path / "out"), "huggingface")
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert [file.name for file in files] == [f"train-{n:05d}-of-00004.parquet" for n in range(4)]
    assert [pq.read_metadata(file).num_rows for file in files] == [4, 4, 4, 5]
    assert [pq.read_metadata(file).num_row_groups for file in files] == [2, 2, 2, 3]
    expected = [row["trajectory_id"] for row in shard_rows(store) if row["trajectory_id"] != "run-0-i1g0m1"]
    assert sorted(row["trajectory_id"] for row in rows_in(tmp_path / "out")) == sorted(expected)
    assert told["rows"] == 17


def test_videos(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"), {"g0": [0.0, 1.0]}, media_format="mp4")
    export_dataset(store, str(tmp_path / "out"), "sft")
    [row] = rows_in(tmp_path / "out")
    assert row["video"]["path"] == "g0m1.mp4"
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"]["video"] == {"_type": "Video"}
    assert card_of(tmp_path / "out")[0]["task_categories"] == ["text-to-video"]


def test_pictures_and_videos_are_exported_apart(tmp_path: Path) -> None:
    store = judged(str(tmp_path / "store"), {"g0": [0.0, 1.0]})
    records = [record("v0", random_latents(0, 3, (2,)), media_format="mp4")]
    write_shard(store.directory, iteration_folder("trajectories", "run-0", 0), "videos", records)
    with pytest.raises(StoreError, match=r"^there are pictures and videos: export each with --where, .*media_format = 'mp4'"):
        export_dataset(store, str(tmp_path / "out"), "huggingface")
    export_dataset(store, str(tmp_path / "pictures"), "huggingface", where="media_format = 'png'")
    assert len(rows_in(tmp_path / "pictures")) == 2
