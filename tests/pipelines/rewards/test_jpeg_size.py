"""The size of the JPEG is the number of bytes of a file written as the papers write it."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.rewards import jpeg_size
from pipelines.rewards.base import REWARDS

RNG = np.random.default_rng(0)
FLAT = np.full((64, 48, 3), 90, np.uint8)
RAMP = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None] * 5, (64, 48, 3))
NOISE = RNG.integers(0, 256, (64, 48, 3)).astype(np.uint8)


def file_size(image: np.ndarray) -> int:
    """Bytes of the JPEG that the papers speak of."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return len(buffer.getvalue())


@pytest.mark.parametrize("image", [FLAT, RAMP, NOISE], ids=["flat", "ramp", "noise"])
def test_kilobytes_are_thousands_of_bytes(image: np.ndarray) -> None:
    assert jpeg_size.kilobytes(image) == file_size(image) / 1000


def test_noise_compresses_worse_the_more_there_is_of_it() -> None:
    noisy = [(RAMP + RNG.normal(0, sigma, RAMP.shape)).clip(0, 255).astype(np.uint8) for sigma in (0, 2, 8, 32)]
    sizes = [jpeg_size.kilobytes(image) for image in (FLAT, *noisy)]
    assert sizes == sorted(set(sizes))
    # A flat picture is little more than the header; noise at this quality takes more than 3 bits of each of 3 * 64 * 48 values.
    assert sizes[0] < 0.9
    assert jpeg_size.kilobytes(NOISE) > 3 * 64 * 48 * 3 / 8 / 1000


def test_both_signs_of_images_and_videos() -> None:
    small, large = (REWARDS.build(f"jpeg_{name}") for name in ("compressibility", "incompressibility"))
    media = [FLAT, NOISE, np.stack([FLAT, RAMP, NOISE])]
    expected = [file_size(FLAT), file_size(NOISE), (file_size(FLAT) + file_size(RAMP) + file_size(NOISE)) / 3]
    scores = large.score(media, [""] * 3, [{}] * 3)
    assert [s.value for s in scores] == pytest.approx([size / 1000 for size in expected])
    assert [s.value for s in small.score(media, [""] * 3, [{}] * 3)] == [-s.value for s in scores]
    assert scores[2].detail == {"frames": [file_size(image) / 1000 for image in (FLAT, RAMP, NOISE)]}
    assert (small.name, large.name) == ("jpeg_compressibility", "jpeg_incompressibility")
    assert small.version == large.version == "1"
