"""Errors a user can cause or meet; the command line prints them in one line."""

from __future__ import annotations


class StoreError(ValueError):
    """The store, or something in it, is not what the command needs. The message says what to do."""


class CorruptionError(StoreError):
    """Stored bytes do not match their checksum: names the file, the member, what was expected and what was found."""

    def __init__(self, file: str, member: str, expected: int, found: int | None) -> None:
        seen = "the file ends before it" if found is None else f"crc32 {found:08x}"
        super().__init__(f"{file}: member {member}: expected crc32 {expected:08x}, found {seen}")
        self.file = file
        self.member = member
        self.expected = expected
        self.found = found
