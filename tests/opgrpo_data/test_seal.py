"""Seals: every flipped bit of a file is noticed, wherever it is; files without a seal are told apart."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data.schema import to_parquet
from opgrpo_data.seal import UNSEALED, check_seal, read_json, sealed, sealed_json
from tests.opgrpo_data.factories import rewards

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))


def flipped(data: bytes, position: int, bit: int) -> bytes:
    """The bytes with one bit flipped."""
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_a_seal_is_the_crc32_of_the_file_with_zeros_in_its_place() -> None:
    data = sealed(b"head " + UNSEALED.encode() + b" tail")
    assert data == f"head opgrpo-seal:{zlib.crc32(b'head opgrpo-seal:00000000 tail'):08x} tail".encode()
    assert check_seal(data)


def test_the_last_mark_is_the_seal() -> None:
    """A prompt may hold the text of a seal."""
    data = sealed_json({"text": f"say {UNSEALED}"})
    assert data.count(UNSEALED.encode()) == 1
    assert read_json(data) == {"text": f"say {UNSEALED}"}


def test_without_a_mark_there_is_no_seal() -> None:
    assert not check_seal(b"anything")
    with pytest.raises(ValueError, match="not found"):
        sealed(b"anything")


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_no_bit_can_flip_unseen(kind: str) -> None:
    data = sealed_json({"lr": 1e-4, "name": "a b"}, indent=1) if kind == "json" else to_parquet(rewards({"t": 0.5}))
    for position in range(len(data)):
        for bit in range(8):
            try:
                assert not check_seal(flipped(data, position, bit)), (position, bit)  # the mark is gone, so there is no seal
            except ValueError as error:
                assert "its seal says crc32" in str(error)  # noqa: PT017  either is noticed


@given(st.dictionaries(st.text(max_size=5).filter("seal".__ne__), JSON, max_size=4), st.sampled_from([None, 1]))
def test_documents_come_back_without_their_seal(document: dict[str, object], indent: int | None) -> None:
    data = sealed_json(document, indent=indent)
    assert read_json(data) == document
    assert json.loads(data).keys() == document.keys() | {"seal"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", r"^is not JSON \(Expecting"),
        (b"\xff\xfe", r"^is not JSON \("),
        (b"[" * 100_000, r"^is not JSON \(maximum recursion|^is not JSON \("),
        (b"[]", "^holds no JSON object$"),
        (b'{"seal": "opgrpo-seal:00000000"}', r"^is not as it was written \(its seal says crc32 '00000000', found '"),
    ],
)
def test_what_is_wrong_with_a_document(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(data)


def test_documents_without_a_seal_are_read() -> None:
    """Older software sealed nothing."""
    assert read_json(b'{"a": 1}') == {"a": 1}
