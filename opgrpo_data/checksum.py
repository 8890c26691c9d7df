"""The checksum of all stored bytes: crc32 as in zlib and gzip (ISO 3309)."""

from __future__ import annotations

try:
    # ISA-L uses the processor's carry-less multiplication: 65 GB/s in cache, where zlib does 7. The same numbers.
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this platform
    from zlib import crc32

__all__ = ["crc32"]
