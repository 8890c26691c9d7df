"""Datasets as Parquet with the pictures inside, as Hugging Face `datasets` loads them: huggingface, sft, preferences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from opgrpo_data.errors import StoreError
from opgrpo_data.exchange.card import Column, card
from opgrpo_data.exchange.left_out import LeftOut
from opgrpo_data.exchange.plain import plain
from opgrpo_data.exchange.reward_keys import RewardKey
from opgrpo_data.exchange.selection import Selection
from opgrpo_data.exchange.target import CARD, Target
from opgrpo_data.schema import TRAJECTORIES

FILE_BYTES = 400 * 2**20
ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 64 * 2**20
"""Of pictures in memory at a time."""

MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""As `datasets` stores an image or video."""
_ABOUT = {
    "prompt": "what was drawn",
    "metadata": "JSON object: what rewards know about the prompt besides its text",
    "split": "train or held_out: whether the prompt was trained on",
    "rewards": "JSON object: value by reward@version",
    "trajectory_id": "in the store",
    "group_id": "names the pictures that were drawn together for one prompt, to be compared with one another",
    "member_index": "place in the group",
    "run_id": "the run that drew it",
    "iteration": "of the run, from 0",
    "policy_id": "hash of the weights that drew it",
    "base_model": "what those weights were trained from",
    "parent_id": "trajectory whose first steps this one shares; empty for most",
    "prefix_steps": "how many steps it shares",
    "sampler": "how noise was taken away, step by step",
    "num_steps": "denoising steps",
    "noise_level": "strength of the noise that the sampler adds; 0: none",
    "guidance_scale": "strength of classifier-free guidance; 1: none",
    "seed": "of its noise",
    "created_at": "when it was drawn",
}
_TYPES = {"prompt": pa.string(), "metadata": pa.string(), "split": pa.string(), "rewards": pa.string()}
_PICTURES = tuple(name for name in _ABOUT if name not in ("prompt", "metadata", "split", "rewards"))
_SFT = ("trajectory_id", "group_id", "run_id", "iteration", "policy_id", "base_model")

Rows = Iterator[dict[str, Any] | None]


@dataclass(frozen=True)
class _Form:
    """A dataset to be written. rows: one for each unit (trajectory or group), None where that is left out. units, size: how
    many there are at most, and about how many bytes."""

    name: str
    columns: Sequence[Column]
    rows: Callable[[LeftOut], Rows]
    units: int
    size: int


def write_pictures(selection: Selection, target: Target, left_out: LeftOut) -> list[dict[str, Any]]:
    """One row a trajectory: its picture or video, prompt, rewards and where it comes from. Without latents.

    Raises StoreError where there are pictures and videos, as the others do.
    """
    media = _media_column(selection)

    def rows(left_out: LeftOut) -> Rows:
        for page in selection.pages:
            rewards = selection.rewards(page)
            for row, data in _pictures(selection, selection.rows(page), left_out):
                told = rewards.get(row["trajectory_id"], []) if row else []
                values = {str(RewardKey(it["reward"], it["version"])): plain(it["value"]) for it in told if it["error"] is None}
                yield row and _picture_row(row, media, data) | {"rewards": json.dumps(values)}

    columns = [media, *_named("prompt", "metadata", "split", "rewards"), *_value(selection), *_named(*_PICTURES)]
    units, size = _sum(selection, "trajectories"), _sum(selection, "size")
    return _write(selection, target, left_out, _Form("huggingface", columns, rows, units, size))


def write_sft(selection: Selection, target: Target, left_out: LeftOut) -> list[dict[str, Any]]:
    """Pictures to be imitated: all that match the condition, or, where there is none, the best of each group."""
    media = _media_column(selection)
    best = selection.where is None

    def rows(left_out: LeftOut) -> Rows:
        for page in selection.pages:
            if best:
                for members in _groups(selection, selection.rows(page), left_out):
                    found = _first(selection, _from_best(members), left_out, {})
                    yield found and _picture_row(found[0], media, found[1])
            else:
                for row, data in _pictures(selection, selection.rows(page), left_out):
                    yield row and _picture_row(row, media, data)

    columns = [media, *_named("prompt", "metadata"), *_value(selection), *_named(*_SFT)]
    units = _sum(selection, "groups" if best else "trajectories")
    size = _largest(selection) if best else _sum(selection, "size")
    return _write(selection, target, left_out, _Form("sft", columns, rows, units, size))


def write_preferences(selection: Selection, target: Target, left_out: LeftOut) -> list[dict[str, Any]]:
    """One row a group: its best picture and its worst, by the reward; of equals the one with the lowest trajectory_id.

    Groups of one picture or of equal rewards are left out.
    """
    media = _media_column(selection)

    def rows(left_out: LeftOut) -> Rows:
        for page in selection.pages:
            for members in _groups(selection, selection.rows(page), left_out):
                read: dict[str, bytes | None] = {}
                chosen = _first(selection, _from_best(members), left_out, read)
                rejected = _first(selection, _from_worst(members), left_out, read)
                if chosen and rejected and chosen[0]["value"] > rejected[0]["value"]:
                    yield _pair(chosen, rejected)
                else:
                    left_out.add("groups without a difference")
                    yield None

    reward = f"by the reward {selection.reward}"
    columns = [
        *_named("prompt"),
        Column("chosen", MEDIA, f"the best of the group {reward}", media.media),
        Column("rejected", MEDIA, f"the worst of the group {reward}", media.media),
        Column("chosen_reward", pa.float64(), "its reward"),
        Column("rejected_reward", pa.float64(), "its reward"),
        Column("margin", pa.float64(), "chosen_reward - rejected_reward, above 0"),
        *_named("metadata", "group_id"),
        Column("chosen_id", pa.string(), "trajectory_id of the chosen one"),
        Column("rejected_id", pa.string(), "trajectory_id of the rejected one"),
        *_named("run_id", "iteration"),
    ]
    form = _Form("preferences", columns, rows, _sum(selection, "groups"), 2 * _largest(selection))
    return _write(selection, target, left_out, form)


def _pair(chosen: tuple[dict[str, Any], bytes], rejected: tuple[dict[str, Any], bytes]) -> dict[str, Any]:
    (best, best_data), (worst, worst_data) = chosen, rejected
    return {
        "prompt": best["text"],
        **{name: best[name] for name in ("metadata", "group_id", "run_id", "iteration")},
        "chosen": _file(best, best_data),
        "rejected": _file(worst, worst_data),
        "chosen_reward": best["value"],
        "rejected_reward": worst["value"],
        "margin": best["value"] - worst["value"],
        "chosen_id": best["trajectory_id"],
        "rejected_id": worst["trajectory_id"],
    }


# -- rows -------------------------------------------------------------------------------------------------------------------


def _pictures(
    selection: Selection, rows: list[dict[str, Any]], left_out: LeftOut
) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Each row with its media; None for what is left out."""
    for row in rows:
        present = next(selection.present([row], left_out), None)
        data = None if present is None else selection.media(row, left_out)
        yield (None, b"") if data is None else (row, data)


def _groups(selection: Selection, rows: list[dict[str, Any]], left_out: LeftOut) -> list[list[dict[str, Any]]]:
    """The rows that have a reward, by group, in the order of the first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        members = groups.setdefault(row["group_id"], [])
        if next(selection.present([row], left_out), None) is None:
            continue
        if row["value"] is None or not math.isfinite(row["value"]):
            left_out.add("without a reward")
        else:
            members.append(row)
    return list(groups.values())


def _from_best(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(members, key=lambda row: (-row["value"], row["trajectory_id"]))


def _from_worst(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(members, key=lambda row: (row["value"], row["trajectory_id"]))


def _first(
    selection: Selection, members: Iterable[dict[str, Any]], left_out: LeftOut, read: dict[str, bytes | None]
) -> tuple[dict[str, Any], bytes] | None:
    """The first whose media are not damaged. read: what was read before; each is read, and counted, once."""
    for row in members:
        name = row["trajectory_id"]
        if name not in read:
            read[name] = selection.media(row, left_out)
        if (data := read[name]) is not None:
            return row, data
    return None


def _picture_row(row: dict[str, Any], media: Column, data: bytes) -> dict[str, Any]:
    return {**row, "prompt": row["text"], media.name: _file(row, data)}


def _file(row: dict[str, Any], data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": f"{row['trajectory_id']}.{row['media_format']}"}


# -- columns and files --------------------------------------------------------------------------------------------------------


def _media_column(selection: Selection) -> Column:
    """`image` or `video`. Raises StoreError where there are both."""
    formats = {row["media_format"] for row in selection.ask("DISTINCT media_format")}
    if "mp4" not in formats:
        return Column("image", MEDIA, "the picture, lossless", {"_type": "Image"})
    if len(formats) > 1:
        raise StoreError("there are pictures and videos: export each with --where, for example \"media_format = 'mp4'\"")
    return Column("video", MEDIA, "the video, lossless H.264 in RGB", {"_type": "Video"})


def _named(*names: str) -> list[Column]:
    return [Column(name, _TYPES.get(name) or TRAJECTORIES.field(name).type, _ABOUT[name]) for name in names]


def _value(selection: Selection) -> list[Column]:
    if selection.reward is None:
        return []
    return [Column("value", pa.float64(), f"the reward {selection.reward}; empty where it could not judge")]


def _sum(selection: Selection, what: str) -> int:
    return sum(getattr(page, what) for page in selection.pages)


def _largest(selection: Selection) -> int:
    """Bytes of one picture a group, if each is as large as any."""
    return sum(page.groups * page.largest for page in selection.pages)


def _write(selection: Selection, target: Target, left_out: LeftOut, form: _Form) -> list[dict[str, Any]]:
    """data/train-*.parquet, each with its share of the units, and README.md."""
    fields = [pa.field(column.name, column.type) for column in form.columns]
    features = {"info": {"features": {column.name: column.feature for column in form.columns}}}
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})
    count = min(max(1, -(-form.size // FILE_BYTES)), form.units)
    rows, total = form.rows(left_out), 0
    files: list[dict[str, Any]] = []
    for number in range(count):
        path = f"data/train-{number:05d}-of-{count:05d}.parquet"
        share = (number + 1) * form.units // count - number * form.units // count
        with target.write_atomic(path) as file:
            written, size = _write_file(file, schema, (row for row in islice(rows, share) if row is not None))
        files.append({"path": path, "rows": written})
        total += size
    text = card(selection, form.name, form.columns, sum(file["rows"] for file in files), total, left_out)
    with target.write_atomic(CARD) as file:
        file.write(text.encode())
    return files


def _write_file(file: BinaryIO, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> tuple[int, int]:
    """Write rows as one Parquet file; returns how many there were, and the bytes of their media."""
    written = size = total = 0
    waiting: list[dict[str, Any]] = []
    media: list[str] = [name for name in schema.names if schema.field(name).type.equals(MEDIA)]
    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        for row in rows:
            waiting.append({name: row[name] for name in schema.names})
            size += sum(len(row[name]["bytes"]) for name in media)
            if len(waiting) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                written, total, size, waiting = written + len(waiting), total + size, 0, []
        if waiting or not written:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
    return written + len(waiting), total + size
