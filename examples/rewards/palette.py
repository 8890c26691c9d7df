"""A reward as a class: how much of a picture has a colour."""

from dataclasses import dataclass

import numpy as np

from pipelines.rewards.base import Score

VERSION = "1"
"""Bump whenever a sample's score can change."""


@dataclass(frozen=True)
class Palette:
    """The share of pixels within `distance` of a colour."""

    colour: tuple[int, int, int]
    distance: float

    @property
    def name(self):
        """What it is called in the store."""
        return "palette"

    @property
    def version(self):
        """Options that change a score belong into the version."""
        return f"{VERSION}-{'-'.join(map(str, self.colour))}-{self.distance:g}"

    def score(self, media, prompts, metadata):
        """One Score per sample: a value, and whatever should be stored beside it."""
        return [self._one(sample) for sample in media]

    def _one(self, sample):
        away = np.linalg.norm(sample.astype(float) - self.colour, axis=-1)
        share = float((away <= self.distance).mean())
        return Score(share, {"nearest": float(away.min())})


def palette(colour, distance=100.0):
    """The factory: called once, with `reward.options`. Load models here."""
    return Palette(tuple(colour), distance)
