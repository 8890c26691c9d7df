"""Joined checksums against zlib's own over the joined bytes."""

from __future__ import annotations

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data.checksum import joined_crc32


@given(st.integers(0, 40), st.integers(1, 5000), st.integers(0, 2**32))
def test_blocks_joined(count: int, size: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(count * size)
    parts = np.array([zlib.crc32(data[i * size : (i + 1) * size]) for i in range(count)], np.uint32)
    assert joined_crc32(parts, size) == zlib.crc32(data)


def test_blocks_of_the_sizes_of_latents() -> None:
    """16 x 16 x 4 float16 of the embedded world, 16 x 64 x 64 float16 of SD3; and a ring's buffer full."""
    for count, size in ((11, 2048), (11, 131_072), (7_701, 2048)):
        block = bytes(range(256)) * (size // 256)
        parts = np.full(count, zlib.crc32(block), np.uint32)
        assert joined_crc32(parts, size) == zlib.crc32(block * count)
