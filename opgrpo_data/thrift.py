"""Thrift's compact protocol, as far as Parquet uses it (parquet-format, parquet.thrift): footers and headers of pages.

pyarrow tells what is in a footer too, but ends the process where some of it contradicts itself: its ColumnChunkMetaData throws
where Python does not catch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)
DEEPEST = 8

Wanted = Mapping[int, Any]
"""Numbers of fields; of one that is a struct, or a list of structs, which of its fields."""


def struct(data: bytes, at: int, end: int, wanted: Wanted, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The wanted fields of the struct at byte `at`, by number, and where it ends, which is before `end`.

    Integers, truths, bytes, lists and structs. Raises ValueError where there is no such struct.
    """
    found: dict[int, Any] = {}
    number = 0
    try:
        while kind := data[at]:
            if kind >> 4:
                number, at = number + (kind >> 4), at + 1
            else:
                number, at = _signed(data, at + 1)
            kind &= 15
            if number in wanted:
                found[number], at = _value(data, at, end, kind, wanted[number], depth)
            else:
                at = _skip(data, at, end, kind, depth)
            if at >= end:
                raise ValueError("it is cut off")
    except IndexError as error:
        raise ValueError("it is cut off") from error
    return found, at + 1


def _value(data: bytes, at: int, end: int, kind: int, wanted: Wanted, depth: int) -> tuple[Any, int]:
    if kind in INTEGERS:
        return _signed(data, at)
    if kind == BINARY:
        length, at = _unsigned(data, at)
        return bytes(data[at : at + length]), at + length
    if kind == STRUCT:
        return struct(data, at, end, wanted or {}, _deeper(depth))
    if kind in (LIST, SET):
        count, kind, at = _list(data, at)
        values = []
        for _ in range(count):
            value, at = _value(data, at, end, kind, wanted, _deeper(depth))
            values.append(value)
            if at >= end:
                raise ValueError("it is cut off")
        return values, at
    return kind == TRUE, _skip(data, at, end, kind, depth)


def _skip(data: bytes, at: int, end: int, kind: int, depth: int) -> int:
    if kind in INTEGERS:
        while data[at] & 128:
            at += 1
        return at + 1
    if kind == BINARY:
        length, at = _unsigned(data, at)
        return at + length
    if kind == STRUCT:
        return _skip_struct(data, at, end, _deeper(depth))
    if kind in (LIST, SET):
        count, kind, at = _list(data, at)
        for _ in range(count):
            at = _skip(data, at, end, max(kind, BYTE), _deeper(depth))  # in a list, a truth takes a byte
            if at >= end:
                raise ValueError("it is cut off")
        return at
    if kind in (TRUE, FALSE):
        return at
    if kind in (BYTE, DOUBLE):
        return at + (1 if kind == BYTE else 8)
    raise ValueError(f"it has a field of type {kind}")


def _skip_struct(data: bytes, at: int, end: int, depth: int) -> int:
    while kind := data[at]:
        at += 1
        if not kind >> 4:
            _, at = _signed(data, at)
        kind &= 15
        if kind in INTEGERS:
            while data[at] & 128:
                at += 1
            at += 1
        else:
            at = _skip(data, at, end, kind, depth)
        if at >= end:
            raise ValueError("it is cut off")
    return at + 1


def _deeper(depth: int) -> int:
    if depth == DEEPEST:
        raise ValueError("it is nested too deeply")
    return depth + 1


def _list(data: bytes, at: int) -> tuple[int, int, int]:
    """Count and kind of a list's elements, and where they begin."""
    count, kind = data[at] >> 4, data[at] & 15
    if count < 15:
        return count, kind, at + 1
    count, at = _unsigned(data, at + 1)
    return count, kind, at


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
