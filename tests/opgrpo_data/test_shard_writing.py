"""Writing a shard: the bytes that WebDataset would write, memory that does not grow with them, and a disk that begins early."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

from opgrpo_data.io import Directory
from opgrpo_data.places import local
from opgrpo_data.seal import sealed_json
from opgrpo_data.shards import INDEX_BYTES, Record, write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder, random_latents, record, records, shard_rows


def test_the_tars_are_those_webdataset_writes(tmp_path: Path) -> None:
    written = [
        record("t0", random_latents(0, 3, (2, 2, 2))),
        record("x" * 88, random_latents(1, 1, (3,))),  # the longest that a plain header holds
        record("x" * 89, random_latents(2, 1, (16, 8, 8), "float16"), dtype="float16", media=b""),
        record("x" * 128, random_latents(3, 1, (1,), "bfloat16"), dtype="bfloat16", media=bytes(512)),
    ]
    store = Store.create(str(tmp_path))
    write_shard(store.directory, folder(), "00000", written)
    latents, media = io.BytesIO(), io.BytesIO()
    latents_tar, media_tar = (TarWriter(file, encoder=False, mtime=0) for file in (latents, media))
    for one in written:
        key, array = one.row["trajectory_id"], io.BytesIO()
        np.save(array, one.latents)
        latents_tar.write({"__key__": key, "latents.npy": array.getvalue()})
        media_tar.write({"__key__": key, "png": one.media})
        media_tar.write({"__key__": key, "json": sealed_json({**one.note, "trajectory_id": key}, sort_keys=True)})
    latents_tar.close()
    media_tar.close()
    row = shard_rows(store)[0]
    assert (tmp_path / row["latents_file"]).read_bytes() == latents.getvalue()
    assert (tmp_path / row["media_file"]).read_bytes() == media.getvalue()


def test_memory_does_not_grow_with_the_bytes_written(tmp_path: Path) -> None:
    count, latents = 40, random_latents(0, 10, (16, 32, 32))

    def drawn() -> Iterator[Record]:
        return (record(f"t{i}", latents.copy(), media=bytes(100_000)) for i in range(count))

    directory = Directory(str(tmp_path))
    write_shard(directory, folder(), "first", records(1))  # imports
    tracemalloc.start()
    write_shard(directory, folder(), "00000", drawn())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    in_hand = 2 * (latents.nbytes + 100_000)  # the next record is drawn before the last is let go
    assert peak < in_hand + count * INDEX_BYTES + 2 * local.BUFFER_BYTES + 100_000
    assert count * latents.nbytes > 10 * peak


@pytest.mark.parametrize("system", ["linux", "other"])
def test_a_large_file_is_sent_to_the_disk_as_it_comes(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []

    def sync_file_range(descriptor: int, offset: Any, length: Any, flags: int) -> None:
        assert flags == 2  # SYNC_FILE_RANGE_WRITE
        sent.append((offset.value, length.value))

    monkeypatch.setattr(local, "SYNC_FILE_RANGE", sync_file_range if system == "linux" else None)
    monkeypatch.setattr(local, "DRAIN_BYTES", 1_000_000)
    directory = Directory(str(tmp_path))
    pieces = [bytes([i]) * size for i, size in enumerate([700_000, 100, 600_000, 3_000_000, 5])]
    with directory.write_atomic("file") as file:
        for piece in pieces:
            file.write(piece)
    assert directory.read("file") == b"".join(pieces)
    assert [offset for offset, _ in sent] == [sum(length for _, length in sent[:i]) for i in range(len(sent))]
    assert all(length >= 1_000_000 for _, length in sent)
    assert (sum(length for _, length in sent) > 4_000_000) == (system == "linux")
