"""Samples as files: what goes in comes out, and damaged bytes never raise anything but a ValueError."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines import media
from pipelines.rewards.base import Media

FORMATS = ("png", "webp")


def _noise(height: int = 24, width: int = 16, seed: int = 0) -> Media:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("media_format", FORMATS)
def test_lossless(media_format: str) -> None:
    for picture in (_noise(), _noise(1, 1), np.zeros((8, 8, 3), np.uint8), np.full((5, 7, 3), 255, np.uint8)):
        data = media.encode(picture, media_format)
        back = media.decode(data)
        assert back.dtype == np.uint8
        assert np.array_equal(back, picture)
        assert media.encode(picture, media_format) == data
        assert Image.open(io.BytesIO(data)).format == media_format.upper()


@pytest.mark.parametrize("media_format", FORMATS)
def test_damage_is_a_value_error_or_another_picture(media_format: str) -> None:
    """Checksums catch damage before this; but media may also come from elsewhere."""
    data = media.encode(_noise(8, 8), media_format)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        for candidate in (bytes(damaged), data[:position]):
            try:
                assert media.decode(candidate).ndim == 3
            except ValueError as error:
                assert str(error).startswith("not a picture: ")  # noqa: PT017  most damage raises, some does not


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"],
    ids=["empty", "text", "head", "cut"],
)
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a picture: "):
        media.decode(data)


def test_a_chunk_that_is_no_chunk_is_no_picture() -> None:
    """Pillow raises a SyntaxError for it, and only when the pixels are read."""
    data = media.encode(_noise(), "png")
    at = data.index(b"IDAT")
    shorter = int.from_bytes(data[at - 4 : at], "big") - 100
    with pytest.raises(ValueError, match="not a picture: broken PNG file"):
        media.decode(data[: at - 4] + shorter.to_bytes(4, "big") + data[at:])


def test_comparison_grid_shows_every_picture_in_its_frame() -> None:
    captions = ["one", "two", "three"]
    colours = iter(range(10, 250, 20))
    pictures = [[[np.full((24, 24, 3), next(colours), np.uint8) for _ in range(2)] for _ in captions] for _ in range(2)]
    columns = [
        (title, [[(picture, (row + i) % 2 == 0) for i, picture in enumerate(pair)] for row, pair in enumerate(rows)])
        for title, rows in zip(("before", "after"), pictures, strict=True)
    ]
    canvas = media.decode(media.encode(media.decode(media.comparison_grid(captions, columns)), "png"))
    flat = canvas.reshape(-1, 3)
    for level in range(10, 250, 20):
        assert (flat == level).all(1).sum() == pytest.approx(64 * 64, abs=30)  # letters have soft edges of all greys
    green, red = ((flat == colour).all(1).sum() for colour in ((46, 160, 67), (215, 58, 73)))
    assert green == red > 0
