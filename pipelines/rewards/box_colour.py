"""The colour of the object in a box, out of GenEval's ten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.rewards.base import Media
from pipelines.rewards.detection import Detection

if TYPE_CHECKING:
    from pipelines.rewards.clip import Clip

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (229, 0, 0),
    "orange": (249, 115, 6),
    "yellow": (255, 255, 20),
    "green": (21, 176, 26),
    "blue": (3, 67, 223),
    "purple": (126, 30, 156),
    "pink": (255, 129, 192),
    "brown": (101, 55, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
"""GenEval's colours, in its order: sRGB, as people use the words (xkcd colour survey, xkcd.com/color/rgb, CC0)."""
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
"""Texts that GenEval gives to CLIP."""

_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _TO_XYZ.sum(1)


class ColourModel(Protocol):
    """Names colours. `version` names what can change an answer."""

    @property
    def version(self) -> str: ...

    def name(self, picture: Media, objects: Sequence[Detection]) -> list[str]:
        """The colour, out of COLOURS, of each object in a picture (H, W, 3) uint8."""
        ...


def crop(picture: Media, box: tuple[float, float, float, float]) -> Media:
    """The pixels that a box touches, of those in the picture; at least one."""
    height, width = picture.shape[:2]
    left, top = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    right, bottom = int(np.ceil(box[2])), int(np.ceil(box[3]))
    return picture[top : max(bottom, top + 1), left : max(right, left + 1)]


def lab(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB (D65) of sRGB colours (..., 3) in 0..255: there, distance is about how different two colours look."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_NAMES = list(COLOURS)
_PALETTE = lab(np.array(list(COLOURS.values()), float))


@dataclass(frozen=True)
class NearestColour:
    """The nearest of ten colours to the median of the box's middle, half as wide and as high. No weights; an approximation.

    It knows nothing of light, and takes for the object whatever is in the middle of the box.
    """

    version: str = "nearest-1"

    def name(self, picture: Media, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object."""
        middles = [np.median(crop(picture, _middle(o.box)).reshape(-1, 3), axis=0) for o in objects]
        return [_NAMES[int(((lab(middle) - _PALETTE) ** 2).sum(-1).argmin())] for middle in middles]


def _middle(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x, y = (box[2] - box[0]) / 4, (box[3] - box[1]) / 4
    return (box[0] + x, box[1] + y, box[2] - x, box[3] - y)


@dataclass(frozen=True)
class ClipColour:
    """CLIP's choice among ten colours, of the whole box. GenEval blanks what is in the box but not of the object: that takes
    masks, which these detectors do not give."""

    clip: Clip
    _known: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @property
    def version(self) -> str:
        return self.clip.digest

    def name(self, picture: Media, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, whose label is in the texts that CLIP chooses from."""
        if not objects:
            return []
        seen = self.clip.image_features([crop(picture, o.box) for o in objects]).double().cpu().numpy()
        return [_NAMES[int((self._texts(o.label) @ one).argmax())] for o, one in zip(objects, seen, strict=True)]

    def _texts(self, label: str) -> NDArray[np.float64]:
        """Per colour the mean of its texts' features, of length 1: (colours, D); once per label."""
        if label in self._known:
            return self._known[label]
        texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
        features = self.clip.text_features(texts).double().cpu().numpy()
        means = features.reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
        self._known[label] = means / np.linalg.norm(means, axis=-1, keepdims=True)
        return self._known[label]


def load_colour_model(model: str | None, device: str | None) -> ColourModel:
    """ClipColour with the CLIP of a hub id or folder (GenEval: openai/clip-vit-large-patch14); NearestColour for None."""
    if model is None:
        return NearestColour()
    from pipelines.rewards.clip import load_clip

    return ClipColour(load_clip(model, device=device))
