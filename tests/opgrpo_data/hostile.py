"""Data made to harm: Parquet files that would fill the memory, tars that reach elsewhere; and a watch over opened files."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opgrpo_data.errors import StoreError
from opgrpo_data.shards import write_shard
from opgrpo_data.store import Store
from tests.opgrpo_data.factories import folder, records, rewards

MANY = 2**26 + 2**16


def parquet(column: pa.Array, name: str = "sigmas", **style: Any) -> bytes:
    """A file of one column."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: column}), buffer, row_group_size=len(column), **style)
    return buffer.getvalue()


def _zeros(count: int) -> pa.Array:
    return pa.Array.from_buffers(pa.bool_(), count, [None, pa.py_buffer(bytes(count // 8))])


def _one_list() -> bytes:
    return parquet(pa.ListArray.from_arrays(pa.array([0, MANY], pa.int32()), _zeros(MANY)))


def _varint(number: int, length: int = 0) -> bytes:
    """Zigzag and base 128, as Thrift writes it; longer than it needs to be where `length` says so."""
    number *= 2
    groups = [number >> shift & 127 for shift in range(0, max(7 * length, number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _lying_list() -> bytes:
    """One list of MANY values, of which the footer says that there are 3."""
    honest = _one_list()
    footer = len(honest) - 8 - int.from_bytes(honest[-8:-4], "little")
    told = _varint(MANY)
    assert told in honest[footer:]
    return honest[:footer] + honest[footer:].replace(told, _varint(3, len(told)))


def _one_text_many_times(**style: Any) -> bytes:
    """A million rows of one text of a million letters."""
    codes = pa.array(np.zeros(2**20, np.int8))
    return parquet(pa.DictionaryArray.from_arrays(codes, pa.array(["x" * 10**6])), "trajectory_id", **style)


def _compressed() -> bytes:
    """Nine texts of 128 MB."""
    buffer = io.BytesIO()
    text = pa.table({"trajectory_id": ["x" * 2**27]})
    with pq.ParquetWriter(buffer, text.schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for _ in range(9):
            writer.write_table(text)
    return buffer.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "rows": lambda: parquet(_zeros(MANY), "iteration"),
    "one list": _one_list,
    "one list, and a footer that lies": _lying_list,
    "one text many times": lambda: _one_text_many_times(store_schema=False),
    "one text many times, as a dictionary": _one_text_many_times,
    "compressed": _compressed,
}
"""A megabyte or less each, that would take 1.2 GB to 1 TB."""


def tar(*members: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """A tar of these headers, each with `data` behind it, whatever its header says."""
    blocks = [info.tobuf(format=tarfile.GNU_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0") for info in members]
    return b"".join(blocks) + bytes(1024)


def member(name: str, size: int = 0, **fields: Any) -> tarfile.TarInfo:
    """A header."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


TARS: dict[str, bytes] = {
    "nothing": b"",
    "no tar": b"\xff" * 5000,
    "half a header": tar(member("a.latents.npy"))[:300],
    "reaches up": tar(member("../../escaped.latents.npy", 7), data=b"escaped"),
    "absolute": tar(member("/tmp/escaped.latents.npy", 7), data=b"escaped"),
    "a link": tar(member("t0.latents.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a hard link": tar(member("t0.latents.npy", type=tarfile.LNKTYPE, linkname="../../store.json")),
    "a device": tar(member("t0.latents.npy", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "a pipe": tar(member("t0.latents.npy", type=tarfile.FIFOTYPE)),
    "huge": tar(member("t0.latents.npy", 2**60), data=b"x"),
    "negative": tar(member("t0.latents.npy", -512), data=b"x"),
    "sparse": tar(member("t0.latents.npy", 10, type=tarfile.GNUTYPE_SPARSE), data=b"x"),
    "a long name": tar(member("././@LongLink", 2**40, type=tarfile.GNUTYPE_LONGNAME), data=b"x" * 512),
    "a pax size": tar(member("x", 20, type=tarfile.XHDTYPE), member("t0.latents.npy"), data=b"20 size=99999999999\n"),
    "pickled": tar(
        member("t0.latents.npy", 128), data=b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    ),
    "endless array": tar(
        member("t0.latents.npy", 128),
        data=b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }",
    ),
}

_watching: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in (
        "open",
        "os.remove",
        "os.rename",
        "os.link",
        "os.symlink",
        "os.mkdir",
        "subprocess.Popen",
        "os.system",
    ):
        _watching[-1].append(f"{event} {arguments[0]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What Python opens, changes or starts in the block; a hook of the interpreter, of which there is only one."""
    if not _watching:
        sys.addaudithook(_hook)
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.append([])


def small_store(url: str) -> Store:
    """A store with one shard of two trajectories, their rewards, a run and a policy."""
    store = Store.create(url)
    write_shard(store.directory, folder(), "00000", records(2))
    store.publish_table("rewards/reward=taste/run=run-0/iter=000000/00000.v1.000.parquet", rewards({"t0": 0.5, "t1": 1.0}))
    store.add_run("run-0", {"config": {"name": "run", "seed": 0}, "command": [], "software": {}})
    store.add_policy("policy-0", {"kind": "base", "run_id": "run-0", "iteration": 0}, None)
    return store


def one_line(error: BaseException | str) -> bool:
    """Whether an error is short and in one line."""
    return "\n" not in str(error) and len(str(error)) < 2500


def refusal(read: Callable[[], object]) -> str | None:
    """What the error says with which `read` refuses to go on; None when it does not. Other errors are not ours."""
    try:
        read()
    except (StoreError, IndexError) as error:
        return str(error)
    return None


def outside(store: Store, events: list[str]) -> list[str]:
    """Files that were opened or changed outside the store; Python's own and the tests' are not meant."""
    ours = (store.directory.root, *sys.path, str(Path(__file__).parents[2]), "/proc", "/dev/shm", "/tmp/.")
    named = (event.partition(" ")[2] for event in events)
    return [name for name in named if name.startswith("/") and not name.startswith(tuple(filter(None, ours)))]
