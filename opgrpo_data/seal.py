"""A file's checksum inside the file itself: whoever copies the file copies its checksum, and no bit of it can flip unseen.

Parquet checks its pages alone, and JSON nothing: a footer or a stored setting could change its meaning without a sign. A
sealed file holds the text `opgrpo-seal:` and the crc32 of the whole file, eight hexadecimal digits, which count as zeros in
it. Where a file holds that text several times, the last is the seal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opgrpo_data.checksum import crc32

MARK = b"opgrpo-seal:"
DIGITS = 8
UNSEALED = f"{MARK.decode()}{'0' * DIGITS}"
"""What a file holds before `sealed` fills it in."""
KEY = "seal"
JSON_BYTES = 64 * 2**20
"""The longest JSON file that is read. As objects it may take 25 times as much."""


def sealed(data: bytes) -> bytes:
    """The file with its checksum in the place of the last UNSEALED. Raises ValueError where it has none."""
    at = data.rindex(MARK) + len(MARK)
    return data[:at] + _checksum(data, at) + data[at + DIGITS :]


def check_seal(data: bytes) -> bool:
    """Whether a file carries a seal. Raises ValueError when it carries one that does not hold."""
    at = data.rfind(MARK) + len(MARK)
    if at < len(MARK):
        return False
    told, found = data[at : at + DIGITS], _checksum(data, at)
    if told != found:
        raise ValueError(f"its seal says crc32 {told.decode(errors='replace')!r}, found {found.decode()!r}")
    return True


def sealed_json(document: Mapping[str, Any], **style: Any) -> bytes:
    """A JSON object with its seal, as the key `seal`. style: of json.dumps."""
    return sealed(json.dumps({**document, KEY: UNSEALED}, **style).encode())


def read_json(data: bytes) -> dict[str, Any]:
    """The object of a JSON file, without its seal. Raises ValueError whose message goes on after the file's name."""
    if len(data) > JSON_BYTES:
        raise ValueError(f"has {len(data)} bytes, {JSON_BYTES} at most are read")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError("holds no JSON object")
    try:
        check_seal(data)
    except ValueError as error:
        raise ValueError(f"is not as it was written ({error})") from error
    document.pop(KEY, None)
    return document


def _checksum(data: bytes, at: int) -> bytes:
    view = memoryview(data)
    checksum = crc32(view[at + DIGITS :], crc32(b"0" * DIGITS, crc32(view[:at])))
    return f"{checksum:08x}".encode()
