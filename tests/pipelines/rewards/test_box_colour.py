"""The colour in a box: the conversion to CIELAB, the nearest of ten, and CLIP's choice against its formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.embedded import scenes
from pipelines.rewards.box_colour import COLOURS, ClipColour, NearestColour, crop, lab, load_colour_model
from pipelines.rewards.detection import Detection
from tests.pipelines.rewards import tiny
from tests.pipelines.rewards.test_clip import raw_features

GREY = np.full((20, 30, 3), 128, np.uint8)


def _boxed(colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    picture = GREY.copy()
    picture[box[1] : box[3], box[0] : box[2]] = colour
    return picture


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (100, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((10, 10, 10), (2.74, 0, 0)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    """Published values of the sRGB primaries (D65); the last is below both linear thresholds: L = 903.3 x 10 / 255 / 12.92."""
    np.testing.assert_allclose(lab(np.array(rgb, float)), expected, atol=0.03)


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_its_own_nearest(colour: str) -> None:
    box = (4, 5, 24, 17)
    assert NearestColour().name(_boxed(COLOURS[colour], box), [Detection("thing", 1.0, box)]) == [colour]


def test_the_colours_of_the_embedded_world_and_others() -> None:
    box = (4, 5, 24, 17)
    seen = {
        **scenes.COLOURS,
        "brown": (120, 72, 32),
        "pink": (255, 182, 193),
        "purple": (110, 40, 140),
        "orange": (255, 140, 0),
    }
    for colour, rgb in seen.items():
        assert NearestColour().name(_boxed(rgb, box), [Detection("thing", 1.0, box)]) == [colour]


def test_only_the_middle_of_the_box_counts() -> None:
    """A box of 16 x 8: its middle are columns 4..12 and rows 2..6."""
    picture = _boxed(COLOURS["green"], (0, 0, 16, 8))
    picture[2:6, 4:12] = COLOURS["red"]
    assert NearestColour().name(picture, [Detection("thing", 1.0, (0, 0, 16, 8)), Detection("thing", 1.0, (0, 0, 4, 8))]) == [
        "red",
        "green",
    ]


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        ((2.0, 3.0, 5.0, 7.0), (4, 3)),
        ((2.6, 3.1, 5.2, 6.9), (4, 4)),  # every pixel that it touches
        ((-5.0, -5.0, 400.0, 400.0), (20, 30)),
        ((4.0, 4.0, 4.0, 4.0), (1, 1)),
        ((40.0, 40.0, 50.0, 50.0), (1, 1)),  # beyond the picture: its nearest pixel
        ((-9.0, -9.0, -3.0, -3.0), (1, 1)),
    ],
)
def test_crops_stay_in_the_picture(box: tuple[float, float, float, float], shape: tuple[int, int]) -> None:
    assert crop(GREY, box).shape == (*shape, 3)
    assert NearestColour().name(GREY, [Detection("thing", 1.0, box)])[0] in COLOURS


def test_clip_chooses_by_the_mean_of_three_texts(tmp_path: Path) -> None:
    """Boxes of the model's own size. 40 tokens, letter by letter, hold every text."""
    folder = tiny.save_clip(tmp_path / "clip", positions=40)
    model = load_colour_model(str(folder), "cpu")
    assert isinstance(model, ClipColour)
    images = tiny.pictures(6)
    picture = np.concatenate(list(images), axis=1)
    objects = [Detection("cat" if i % 2 else "dog", 1.0, (16.0 * i, 0.0, 16.0 * i + 16, 16.0)) for i in range(6)]
    tokenizer = model.clip.loaded.tokenizer
    templates = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")
    texts = [template.format(colour, label) for label in ("dog", "cat") for colour in COLOURS for template in templates]
    seen, read = raw_features(folder, images, tokenizer(texts)["input_ids"])
    means = read.reshape(2, 10, 3, -1).mean(2)
    scores = means / np.linalg.norm(means, axis=-1, keepdims=True) @ seen.T  # (label, colour, picture)
    golden = [list(COLOURS)[scores[i % 2, :, i].argmax()] for i in range(6)]
    assert model.name(picture, objects) == golden
    assert len(set(golden)) > 1
    assert model.name(picture, []) == []
    assert model.version == model.clip.digest


def test_none_is_the_nearest_colour() -> None:
    assert isinstance(load_colour_model(None, None), NearestColour)
    with pytest.raises(ValueError, match="cannot load the CLIP model '/none': there is no such folder"):
        load_colour_model("/none", "cpu")
