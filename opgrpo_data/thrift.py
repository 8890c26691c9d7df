"""Thrift's compact protocol, as far as Parquet uses it (parquet-format, parquet.thrift): footers and headers of pages.

pyarrow tells what is in a footer too, but ends the process where some of it contradicts (apache/arrow, ColumnChunkMetaData).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)
DEEPEST = 8


def struct(data: bytes, at: int, end: int, wanted: Collection[int] = (), depth: int = 0) -> tuple[dict[int, Any], int]:
    """The struct at byte `at`: its fields by number, and where it ends, which is before `end`.

    Integers, text, lists and structs; of a struct within it the same, of lists their elements. wanted: only these fields, the
    others are passed over; none: all. Raises ValueError where there is no such struct.
    """
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    found: dict[int, Any] = {}
    number = 0
    try:
        while kind := data[at]:
            at += 1
            if kind >> 4:
                number += kind >> 4
            else:
                number, at = _signed(data, at)
            kind &= 15
            if wanted and number not in wanted:
                at = _skip(data, at, end, kind, depth)
            elif kind <= FALSE:
                found[number] = kind == TRUE
            else:
                found[number], at = _value(data, at, end, kind, depth)
            if at >= end:
                raise ValueError("it is cut off")
    except IndexError as error:
        raise ValueError("it is cut off") from error
    return found, at + 1


def _value(data: bytes, at: int, end: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in INTEGERS:
        return _signed(data, at)
    if kind == BINARY:
        length, at = _unsigned(data, at)
        return bytes(data[at : at + length]), at + length
    if kind == STRUCT:
        return struct(data, at, end, (), depth + 1)
    if kind in (LIST, SET):
        count, kind, at = _list(data, at)
        values = []
        for _ in range(count):
            value, at = _value(data, at, end, kind, depth + 1)
            values.append(value)
            if at >= end:
                raise ValueError("it is cut off")
        return values, at
    return None, _skip(data, at, end, kind, depth)


def _list(data: bytes, at: int) -> tuple[int, int, int]:
    """Count and kind of a list's elements, and where they begin."""
    count, kind = data[at] >> 4, data[at] & 15
    if count < 15:
        return count, kind, at + 1
    count, at = _unsigned(data, at + 1)
    return count, kind, at


def _skip(data: bytes, at: int, end: int, kind: int, depth: int) -> int:
    if kind in INTEGERS:
        while data[at] & 128:
            at += 1
        return at + 1
    if kind == BINARY:
        length, at = _unsigned(data, at)
        return at + length
    if kind == STRUCT:
        return struct(data, at, end, (-1,), depth + 1)[1]
    if kind in (LIST, SET):
        count, kind, at = _list(data, at)
        for _ in range(count):
            at = _skip(data, at, end, max(kind, BYTE), depth + 1)  # in a list, a boolean takes a byte
            if at >= end:
                raise ValueError("it is cut off")
        return at
    if kind <= FALSE:
        return at
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    raise ValueError(f"it has a field of type {kind}")


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[at]) & 128:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise ValueError("a number is too long")
    return value | byte << shift, at + 1


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return value >> 1 ^ -(value & 1), at
