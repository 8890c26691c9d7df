"""The rows of a store's indexes, piece by piece: out of the generation in force as far as it goes, else out of index files."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from opgrpo_data.bounds import read_bounded
from opgrpo_data.errors import StoreError
from opgrpo_data.generations import Generation, in_force, warn
from opgrpo_data.io import Directory
from opgrpo_data.schema import conform
from opgrpo_data.seal import check_seal
from opgrpo_data.store import TABLES, Store

MANY_FILES = 32
"""From so many index files on it pays to look for a generation, and to make one."""

BATCH_ROWS = 65_536
READ_AT_ONCE = 32

DAMAGE = (pa.ArrowException, OSError, ValueError)
"""What reading a damaged Parquet file raises, depending on which byte it is."""

Piece = tuple[list[tuple[str, int]], pa.Table]
"""Some rows, and which index files they are of: (path, count), in their order."""


class RangedFile(io.RawIOBase):
    """A file of a store for pyarrow, which reads the ranges it needs."""

    def __init__(self, directory: Directory, path: str, size: int) -> None:
        super().__init__()
        self._directory, self._path, self._size, self._at = directory, path, size, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; see io.IOBase."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, at most `size`."""
        rest = max(0, self._size - self._at)
        length = rest if size is None or size < 0 else min(size, rest)
        data = self._directory.read_range(self._path, self._at, length) if length else b""
        self._at += len(data)
        return data


def open_generation(store: Store, generation: Generation) -> pa.PythonFile:
    """The Parquet file of a generation, for pyarrow."""
    return pa.PythonFile(RangedFile(store.directory, generation.parquet, generation.bytes), mode="r")


def read_pieces(
    store: Store,
    kind: str,
    columns: Sequence[str] | None = None,
    wanted: Collection[str] | None = None,
    damaged: Callable[[str], None] | None = None,
) -> Iterator[Piece]:
    """The rows of a kind's index files, through the generation in force as far as it holds them, verified.

    columns: only these; None: all, as in the schema. wanted: only these files; None: all there are. damaged: is told of files
    that are damaged, which are then left out; None: they raise StoreError. Memory: one row group, or the rows of index files
    up to BATCH_ROWS and READ_AT_ONCE files.
    """
    schema = TABLES[kind].schema
    schema = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    generation, mine = None, sorted(wanted or ())
    if wanted is None or len(wanted) >= MANY_FILES:
        generation, files = in_force(store, kind)
        mine = files if wanted is None else mine
    read: Counter[str] = Counter()
    held = generation.files if generation else {}
    if generation is not None:
        try:
            for segments, table in _of_generation(store, generation, schema, set(mine)):
                yield segments, table
                for path, count in segments:
                    read[path] += count
        except DAMAGE as error:
            warn(generation.path, error)
    # What a damaged generation did not give any more is read from the index files: the same rows in the same order.
    rest = {path: read[path] for path in mine if path not in held or read[path] < held[path]}
    yield from read_files(store, kind, rest, schema, damaged)


def _of_generation(store: Store, generation: Generation, schema: pa.Schema, wanted: set[str]) -> Iterator[Piece]:
    paths, ends = list(generation.files), list(accumulate(generation.files.values()))
    if wanted.isdisjoint(paths):
        return
    parquet = pq.ParquetFile(open_generation(store, generation), page_checksum_verification=True)
    if parquet.metadata.num_rows != generation.rows:
        raise ValueError(f"{generation.parquet} has {parquet.metadata.num_rows} rows, not {generation.rows}")
    names = _held(parquet, schema)
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        last = first + parquet.metadata.row_group(group).num_rows
        segments, slices, at = [], [], first
        for which in range(bisect_right(ends, first), len(ends)):
            stop = min(ends[which], last)
            if paths[which] in wanted and stop > at:
                segments.append((paths[which], stop - at))
                slices.append((at - first, stop - at))
            at = stop
            if at == last:
                break
        if segments:
            table = conform(parquet.read_row_group(group, columns=names), schema)
            whole = sum(count for _, count in segments) == table.num_rows
            yield segments, table if whole else pa.concat_tables([table.slice(start, count) for start, count in slices])
        first = last


def read_files(
    store: Store, kind: str, skip: Mapping[str, int], schema: pa.Schema, damaged: Callable[[str], None] | None = None
) -> Iterator[Piece]:
    """Rows of index files, verified. skip: for each, how many of its first rows to leave out. damaged: see read_pieces."""

    segments: list[tuple[str, int]] = []
    tables: list[pa.Table] = []
    rows = 0
    for path, data in _contents(store, list(skip)):
        try:
            table = _parsed(store, kind, path, data, schema).slice(skip[path])
        except StoreError:
            if damaged is None:
                raise
            damaged(path)
            continue
        segments.append((path, table.num_rows))
        tables.append(table)
        rows += table.num_rows
        if rows >= BATCH_ROWS:
            yield segments, pa.concat_tables(tables)
            segments, tables, rows = [], [], 0
    if segments:
        yield segments, pa.concat_tables(tables)


def _contents(store: Store, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Files and their bytes; of an object store, several at once."""
    if store.directory.local:
        yield from ((path, store.read(path)) for path in paths)
        return
    with ThreadPoolExecutor(READ_AT_ONCE, "opgrpo-read") as pool:
        for start in range(0, len(paths), READ_AT_ONCE):
            some = paths[start : start + READ_AT_ONCE]
            yield from zip(some, pool.map(store.read, some), strict=True)


def _parsed(store: Store, kind: str, path: str, data: bytes, schema: pa.Schema) -> pa.Table:
    """Some columns of an index file. Raises StoreError when it is damaged."""
    try:
        check_seal(data)
        # A thread for each column of so few rows would cost more than it does.
        return conform(read_bounded(data, schema.names, use_threads=False), schema)
    except DAMAGE:
        store.parse(kind, path, data)  # tells what is wrong in the words of every other reader
        raise


def _held(parquet: pq.ParquetFile, schema: pa.Schema) -> list[str]:
    """Those columns of a schema that a file has."""
    names = set(parquet.schema_arrow.names)
    return [name for name in schema.names if name in names]
