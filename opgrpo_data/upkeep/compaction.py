"""`opgrpo compact`: merge index files into a generation (opgrpo_data.generations). Tars and index files are not touched.

The Parquet file comes first, under a name of its own; then the JSON is published: the commit. Killed anywhere, either the
old or the new generation is in force. Of two at once, whose JSON comes first wins, and the other leaves nothing.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from opgrpo_data.checksum import crc32
from opgrpo_data.generations import (
    COMPACTED,
    Generation,
    check_bytes,
    documents,
    in_force,
    number_of,
    read_footer,
    read_generation,
    warn,
)
from opgrpo_data.pieces import MANY_FILES, Piece, read_files, read_pieces
from opgrpo_data.seal import sealed_json
from opgrpo_data.store import TABLES, Store, now, require_current

ROW_GROUP_ROWS = 131_072
ROW_GROUP_BYTES = 64 * 1024 * 1024
"""A row group is written at so many rows or bytes of Arrow data: about four times that is the memory of a compaction."""


@dataclass(frozen=True)
class Compacted:
    """What was done, or would be, for one kind: a new generation that holds `files` index files, `new` of them for the first
    time, of `rows` rows (None: not counted). committed: False in a dry run, and where another compaction was faster."""

    kind: str
    generation: str
    files: int
    new: int
    rows: int | None
    committed: bool


def compact(store: Store, *, dry_run: bool = False) -> dict[str, Any]:
    """Merge the index files of every kind that has MANY_FILES or more outside its newest generation, or a damaged generation.

    Returns compacted: what was done per kind (fields of Compacted); nothing_to_do: the other kinds, with the reason;
    damaged: index files that could not be merged and stay as they are; dry_run. Raises StoreError in a store of an older
    format version, whose software does not know generations.
    """
    require_current(store, "compacting")
    done: list[Compacted] = []
    idle: list[str] = []
    damaged: list[str] = []
    for kind in COMPACTED:
        generation, files = in_force(store, kind)
        held = generation.files if generation else {}
        new = len(files) - len(held)
        newest = max(map(number_of, documents(store, kind)), default=0)
        whole = generation is None or _is_whole(store, generation)
        sound = whole and newest == (generation.number if generation else 0)
        if not files or (new < MANY_FILES and sound):
            idle += [f"{kind}: {new} index files outside a generation, {MANY_FILES} make one worth while"] if files else []
            continue
        path = f"catalog/{kind}/gen-{newest + 1:06d}.json"
        if dry_run:
            done.append(Compacted(kind, path, len(files), new, None, committed=False))
        else:
            done.append(_compact(store, kind, path, new, _rows(store, kind, whole, damaged)))
    return {
        "compacted": [asdict(each) for each in done],
        "nothing_to_do": idle,
        "damaged": damaged,
        "dry_run": dry_run,
    }


def superseded_generations(store: Store) -> list[str]:
    """Files below catalog/ that no reader needs: generations older than the one in force, and what killed compactions left.

    An older one stays while it holds an index file that the one in force does not, or does not say what it holds: where that
    index file is gone or damaged, it may have the last copy of the rows. In the order in which to remove them: a JSON before
    its Parquet file. Whoever removes them must leave young files alone: a compaction under way has written its Parquet file
    and not yet its JSON, and a reader may still be in an older one.
    """
    found = []
    for kind in COMPACTED:
        parquets = store.directory.list(f"catalog/{kind}/gen-*.parquet")  # before the JSON files, which come after them
        published = documents(store, kind)
        generation, _ = in_force(store, kind)
        superseded = [path for path in published if generation and _replaces(store, generation, path)]
        current, keep = ({generation.number}, {generation.parquet}) if generation else (set(), set())
        stay = {0} | {number_of(path) for path in published if path not in superseded} - current
        found += superseded
        found += [path for path in parquets if path not in keep and number_of(path) not in stay]
    return found


def _replaces(store: Store, generation: Generation, path: str) -> bool:
    """Whether a generation holds all that the older one at `path` holds."""
    try:
        older = number_of(path) < generation.number
        return older and read_generation(store.directory, path).files.keys() <= generation.files.keys()
    except (ValueError, OSError):
        return False


def _is_whole(store: Store, generation: Generation) -> bool:
    try:
        check_bytes(store.directory, generation)
    except (ValueError, FileNotFoundError) as error:
        warn(generation.path, error)
        return False
    return True


def _rows(store: Store, kind: str, whole: bool, damaged: list[str]) -> Iterator[Piece]:
    """What a new generation is to hold. whole: the one in force is, so that rows may come from it."""
    if whole:
        return read_pieces(store, kind, damaged=damaged.append)
    return read_files(store, kind, dict.fromkeys(store.files(kind), 0), TABLES[kind].schema, damaged.append)


def _compact(store: Store, kind: str, path: str, new: int, pieces: Iterable[Piece]) -> Compacted:
    """Write the generation `path` of a kind."""
    parquet = f"{path.removesuffix('.json')}.{secrets.token_hex(4)}.parquet"
    files: Counter[str] = Counter()
    with store.directory.write_atomic(parquet) as raw:
        sink = _Checksummed(raw)
        with _Merged(sink, TABLES[kind].schema) as merged:
            for segments, table in pieces:
                merged.add(table)
                for file, count in segments:
                    files[file] += count
    footer = read_footer(store.directory, parquet, sink.size)
    document = {
        "kind": kind,
        "created_at": now().isoformat(),
        "parquet": parquet,
        "rows": sum(files.values()),
        "bytes": sink.size,
        "crc32": f"{sink.crc32:08x}",
        "footer_bytes": len(footer),
        "footer_crc32": f"{crc32(footer):08x}",
        "files": files,
    }
    committed = store.directory.publish(path, sealed_json(document))
    if not committed:
        store.directory.remove(parquet)
    return Compacted(kind, path, len(files), new, sum(files.values()), committed)


class _Checksummed:
    """A file for pyarrow to write that counts and checksums what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = self.crc32 = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._file.write(view)
        self.size += view.nbytes
        self.crc32 = crc32(view, self.crc32)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class _Merged:
    """A Parquet file of row groups of ROW_GROUP_ROWS rows or ROW_GROUP_BYTES bytes."""

    def __init__(self, sink: _Checksummed, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(pa.PythonFile(cast(Any, sink), mode="w"), schema, write_page_checksum=True)
        self._tables: list[pa.Table] = []

    def __enter__(self) -> _Merged:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, table: pa.Table) -> None:
        self._tables.append(table)
        rows, size = sum(each.num_rows for each in self._tables), sum(each.nbytes for each in self._tables)
        if rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            table = pa.concat_tables(self._tables)
            self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            self._tables = []
