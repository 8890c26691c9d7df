"""How much an index may decode to. Parquet can be made to fill the memory from a few bytes: runs of equal values cost nothing.

What the footer says of lists and of compressed sizes is not trusted: the headers of all pages are added up before one is
decoded. A plain column has no more values than the footer says it has rows, and Snappy makes of a byte no more than SNAPPY.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from opgrpo_data.thrift import Wanted, struct

DECODED_BYTES = 2**30
"""The most that one index file may decode to."""
VALUE_BYTES = 16
"""Of a value at most, unless it is text, with what says which list and row it is of."""
SNAPPY = 22
"""Its longest copy is 64 bytes and takes 3."""
TAIL_BYTES = 8
UNCOMPRESSED, SNAPPED = 0, 1
TEXT_OR_BYTES = (6, 7)
"""Physical types whose values have any length."""

# Numbers of fields in parquet.thrift.
ROW_GROUPS, COLUMNS, ROWS, METADATA = 4, 1, 3, 3
TYPE, PATH, CODEC, TOTAL_COMPRESSED, DATA_PAGE, DICTIONARY_PAGE = 1, 3, 4, 7, 9, 11
PAGE_UNCOMPRESSED, PAGE_COMPRESSED, PAGE_KINDS, PAGE_VALUES = 2, 3, (5, 7, 8), 1
COLUMN = dict.fromkeys((TYPE, PATH, CODEC, TOTAL_COMPRESSED, DATA_PAGE, DICTIONARY_PAGE))
FOOTER: Wanted = {ROW_GROUPS: {COLUMNS: {METADATA: COLUMN}, ROWS: None}}
PAGE: Wanted = {PAGE_UNCOMPRESSED: None, PAGE_COMPRESSED: None} | {kind: {PAGE_VALUES: None} for kind in PAGE_KINDS}


def read_bounded(data: bytes, columns: Collection[str], *, use_threads: bool = True) -> pa.Table:
    """Those of the columns that a Parquet file has, page checksums verified.

    Raises ValueError where they would take more than DECODED_BYTES, and what pyarrow raises of damaged files.
    """
    parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    fields = {field.name: field.type for field in parquet.schema_arrow if field.name in columns}
    if len(fields) < sum(name in columns for name in parquet.schema_arrow.names):
        raise ValueError("it has a column twice")
    try:
        texts = _check_pages(data, fields)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its footer or a header of a page is not as Parquet has them ({error!r})") from error
    if texts:
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=texts)
    table = parquet.read(columns=list(fields), use_threads=use_threads)
    table.validate(full=True)  # text that is no UTF-8 would be found out by whoever looks at it
    _check(sum(_text_bytes(column) for column in table.columns if pa.types.is_dictionary(column.type)))
    return table


def _check_pages(data: bytes, fields: Mapping[str, pa.DataType]) -> list[str]:
    """Columns of text that few bytes of a dictionary may make long: how long, only their values tell."""
    decoded, texts = 0, set()
    for rows, column in _columns(data):
        name = column[PATH][0].decode(errors="replace")
        if name not in fields:
            continue
        if column[CODEC] in (UNCOMPRESSED, SNAPPED) and not pa.types.is_nested(fields[name]):
            values, size = rows, column[TOTAL_COMPRESSED] * SNAPPY
        else:
            values, size = _pages(data, column)
        decoded += size + values * VALUE_BYTES
        if column[TYPE] in TEXT_OR_BYTES and values * size > DECODED_BYTES:
            texts.add(name)
    _check(decoded)
    return sorted(texts)


def _columns(data: bytes) -> Iterator[tuple[int, Mapping[int, Any]]]:
    """Rows and metadata of each column chunk, as the footer says."""
    end = len(data) - TAIL_BYTES
    start = end - int.from_bytes(data[end : end + 4], "little")
    footer, _ = struct(data, start, end, FOOTER)
    for group in footer[ROW_GROUPS]:
        for column in group[COLUMNS] if group[ROWS] else ():
            yield group[ROWS], column[METADATA]


def _pages(data: bytes, column: Mapping[int, Any]) -> tuple[int, int]:
    """Values in all pages of a column chunk, and bytes of the pages uncompressed."""
    at = column[DATA_PAGE]
    if 0 < column.get(DICTIONARY_PAGE, 0) < at:
        at = column[DICTIONARY_PAGE]
    end = at + column[TOTAL_COMPRESSED]
    if not 0 <= at <= end <= len(data):
        raise ValueError(f"column {column[PATH]} would lie at bytes {at} to {end} of {len(data)}")
    values = size = 0
    while at < end:
        header, at = struct(data, at, end, PAGE)
        count = next((header[kind][PAGE_VALUES] for kind in PAGE_KINDS if kind in header), 0)
        uncompressed, compressed = header[PAGE_UNCOMPRESSED], header[PAGE_COMPRESSED]
        if min(count, uncompressed, compressed) < 0:
            raise ValueError(f"column {column[PATH]} has a page of {count} values in {compressed} bytes")
        values, size, at = values + count, size + uncompressed, at + compressed
    return values, size


def _check(decoded: int) -> None:
    if decoded > DECODED_BYTES:
        raise ValueError(f"it would decode to {decoded} bytes, {DECODED_BYTES} at most are read")


def _text_bytes(column: pa.ChunkedArray) -> int:
    if not (pa.types.is_string(column.type.value_type) or pa.types.is_binary(column.type.value_type)):
        return 0
    lengths = (pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() for chunk in column.chunks)
    return sum(length or 0 for length in lengths)
