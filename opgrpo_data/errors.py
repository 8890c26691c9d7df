"""Errors a user can cause or meet; the command line prints them in one line."""

from __future__ import annotations


class StoreError(ValueError):
    """The store, or something in it, is not what the command needs. The message says what to do."""


class CorruptionError(StoreError):
    """Stored bytes are not those that were written: names the file, the member, what was expected and what was found.

    reason: checksum (other bytes), truncated (the file ends before it), or missing (there is no such file).
    """

    def __init__(self, file: str, member: str, expected: int, found: int | None, *, missing: bool = False) -> None:
        seen = "no such file" if missing else "the file ends before it" if found is None else f"crc32 {found:08x}"
        super().__init__(f"{file}: member {member}: expected crc32 {expected:08x}, found {seen}")
        self.file = file
        self.member = member
        self.expected = expected
        self.found = found
        self.reason = "missing" if missing else "truncated" if found is None else "checksum"
