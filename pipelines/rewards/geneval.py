"""GenEval (Ghosh et al., arXiv 2310.11513): are the objects asked for in the picture, as many, of that colour, in that place?

A detector finds objects, a colour model names their colours, and geneval_rules judges. GenEval's thresholds fit its own
detector, Mask2Former, which is none of transformers' object-detection classes: set them to suit another one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.embedded.scenes import Spec
from pipelines.rewards.base import Media, Reward, Score
from pipelines.rewards.box_colour import ColourModel, load_colour_model
from pipelines.rewards.detection import Detection, Detector, EmbeddedDetector, load_detector
from pipelines.rewards.geneval_rules import Judgement, Request, judge, kept, to_be_named
from pipelines.rewards.sampled import by_sample, checked_count, chosen, versioned

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

VIEWS = ("strict", "soft")
SCENE_TAGS = {"single": "colors", "count": "counting", "two": "color_attr", "position": "position"}
"""Kinds of the embedded world's prompts -> the tags of GenEval that ask for the like."""


@dataclass(frozen=True)
class GenevalReward:
    """Detects, names colours, judges."""

    version: str
    detector: Detector
    colour_model: ColourModel
    view: str
    frames: int
    threshold: float
    counting_threshold: float
    max_overlap: float
    name: str = "geneval"

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample. Metadata of another form, or with labels unknown to the detector, is that sample's error."""
        requests = [self._request(record) for record in metadata]
        pictures, owners = chosen(media, self.frames)
        found = self.detector.detect(pictures) if pictures else []
        if len(found) != len(pictures):
            raise ValueError(f"the detector returned {len(found)} lists of objects for {len(pictures)} pictures")
        detected, shown = (by_sample(values, owners, len(media)) for values in (found, pictures))
        return [
            Score(math.nan, {}, request) if isinstance(request, str) else self._score(shown[i], detected[i], request)
            for i, request in enumerate(requests)
        ]

    def _request(self, record: Mapping[str, Any]) -> Request | str:
        """What is asked for, or what is wrong with the metadata."""
        try:
            request = Request.parse(
                from_scene(record) if isinstance(self.detector, EmbeddedDetector) and "kind" in record else record
            )
        except ValueError as error:
            return str(error)
        known = self.detector.labels
        if known is not None and not request.labels <= known:
            unknown, some = ", ".join(sorted(request.labels - known)), ", ".join(sorted(known)[:5])
            return f"the detector does not know {unknown}; it knows {len(known)} labels: {some}, ..."
        return request

    def _score(self, pictures: Sequence[Media], detected: Sequence[Sequence[Detection]], request: Request) -> Score:
        judged = [self._judge(picture, found, request) for picture, found in zip(pictures, detected, strict=True)]
        strict, soft = float(np.mean([j.strict for j in judged])), float(np.mean([j.soft for j in judged]))
        missing = list(dict.fromkeys(fault for j in judged for fault in j.missing))
        return Score(strict if self.view == "strict" else soft, {"strict": strict, "soft": soft, "missing": missing})

    def _judge(self, picture: Media, detected: Sequence[Detection], request: Request) -> Judgement:
        threshold = self.counting_threshold if request.tag == "counting" else self.threshold
        objects = kept(detected, threshold, self.max_overlap)
        unnamed = to_be_named(objects, request)
        colours = dict(zip(unnamed, self.colour_model.name(picture, unnamed), strict=True))
        return judge(objects, request, colours)


def geneval(
    *,
    detector: str,
    view: str = "strict",
    colour_model: str | None = None,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_overlap: float = 1.0,
    frames: int = 4,
    device: str | None = None,
) -> Reward:
    """Is what GenEval's metadata asks for in the picture? Of a video, the mean over `frames` evenly spaced frames.

    The metadata of a prompt is a record of GenEval's evaluation_metadata.jsonl: {"tag": ..., "include": [{"class": "bench",
    "count": 1, "color": "red", "position": ["left of", 0]}], "exclude": [{"class": ..., "count": ...}]}. The detail holds both
    views and, in words, what is missing.

    detector: `embedded` (which also takes the embedded world's own metadata); a hub id or folder of a transformers
    object-detection model (`hustvl/yolos-tiny`, `PekingU/rtdetr_r50vd`); or `module:attribute`, which builds a Detector.
    view: `strict`, GenEval's 0 or 1, or `soft`, Flow-GRPO's partial credit, which also counts what is too many, and may be
    negative. colour_model: hub id or folder of a CLIPModel (GenEval: openai/clip-vit-large-patch14); None takes the nearest
    of ten colours, an approximation. threshold: of a detection's score; counting_threshold: the same for the tag `counting`.
    max_overlap: intersection over union, 0 to 1, from which two boxes of one label are one object; 1 keeps all.
    Raises ValueError for an option out of range and a model that cannot be loaded.
    """
    if view not in VIEWS:
        raise ValueError(f"reward.options.view {view!r}: choose strict or soft")
    numbers = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
    for option, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"reward.options.{option} must lie in 0..1, got {value}")
    checked_count(frames)
    finder, namer = load_detector(detector, device), load_colour_model(colour_model, device)
    version = versioned(VERSION, finder.version, namer.version, view, frames, numbers)
    return GenevalReward(version, finder, namer, view, frames, threshold, counting_threshold, max_overlap)


def from_scene(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GenEval metadata of a prompt of the embedded world (pipelines.embedded.scenes), for the detector `embedded`.

    Every object is a class of its own ("red circle"), and one more of it, or any other, is excluded: these prompts say exactly
    what is to be seen.
    """
    spec = Spec.parse(metadata)
    counts = Counter(f"{colour} {shape}" for shape, colour in spec.objects)
    include = [{"class": label, "count": count, "color": label.split()[0]} for label, count in counts.items()]
    if spec.relation is not None:
        first, second = include
        include = [second, first | {"position": [spec.relation, 0]}]
    exclude = [{"class": label, "count": counts[label] + 1} for label in sorted(EmbeddedDetector().labels)]
    return {"tag": SCENE_TAGS[spec.kind], "include": include, "exclude": exclude}
