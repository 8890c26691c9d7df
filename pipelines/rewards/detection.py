"""Objects in pictures: what a detector is, and the detectors that can be named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipelines.registry import Registry
from pipelines.rewards.base import Media
from pipelines.rewards.sampled import by_size

if TYPE_CHECKING:
    from pipelines.rewards.pretrained import Pretrained

SYNONYMS = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names that detectors give to COCO's classes -> the names in GenEval's prompts."""


@dataclass(frozen=True)
class Detection:
    """One object. score: 0..1. box: left, top, right, bottom in pixels, from the picture's upper left corner."""

    label: str
    score: float
    box: tuple[float, float, float, float]


class Detector(Protocol):
    """Finds objects. `version` names what can change a detection; `labels` are all that it knows, None where it is open."""

    @property
    def version(self) -> str: ...

    @property
    def labels(self) -> frozenset[str] | None: ...

    def detect(self, pictures: Sequence[Media]) -> list[list[Detection]]:
        """The objects of each picture (H, W, 3) uint8, in any order, however unsure."""
        ...


@dataclass(frozen=True)
class EmbeddedDetector:
    """The embedded world's own segmentation (pipelines.embedded.verifier): labels like "red circle", always sure.

    What has no known shape is "red ?". The verifier gives centres, and objects of this world are all of one size, so the boxes
    are of that size. A picture that the verifier takes for noise shows nothing.
    """

    version: str = "embedded-1"

    @property
    def labels(self) -> frozenset[str]:
        """Every colour with every shape and with "?"."""
        from pipelines.embedded.scenes import COLOURS, SHAPES

        return frozenset(f"{colour} {shape}" for colour in COLOURS for shape in (*SHAPES, "?"))

    def detect(self, pictures: Sequence[Media]) -> list[list[Detection]]:
        """The objects of each picture, of any size."""
        from pipelines.embedded.scenes import SHAPE_SIZE
        from pipelines.embedded.verifier import MAX_UNCLEAR, segment

        found: list[list[Detection]] = [[] for _ in pictures]
        for indices, images in by_size(pictures):
            for index, segments, unclear in zip(indices, *segment(images), strict=True):
                for s in segments if unclear <= MAX_UNCLEAR else ():
                    left, top = s.x - (SHAPE_SIZE - 1) / 2, s.y - (SHAPE_SIZE - 1) / 2
                    box = (left, top, left + SHAPE_SIZE, top + SHAPE_SIZE)
                    found[index].append(Detection(f"{s.colour} {s.shape}", 1.0, box))
        return found


@dataclass(frozen=True)
class PretrainedDetector:
    """A detection model of transformers."""

    loaded: Pretrained

    @property
    def version(self) -> str:
        return self.loaded.digest

    @property
    def labels(self) -> frozenset[str]:
        """The model's own labels, under GenEval's names."""
        return frozenset(self._name(index) for index in self.loaded.model.config.id2label)

    def _name(self, index: int) -> str:
        name = str(self.loaded.model.config.id2label[index])
        return SYNONYMS.get(name, name)

    def detect(self, pictures: Sequence[Media]) -> list[list[Detection]]:
        """All that the model proposes, sure or not, in pixels of the picture."""
        import torch

        from pipelines.rewards.pretrained import CHUNK

        found: list[list[Detection]] = [[] for _ in pictures]
        for indices, images in by_size(pictures):
            for start in range(0, len(images), CHUNK):
                chunk = images[start : start + CHUNK]
                with torch.inference_mode():
                    output = self.loaded.model(**self.loaded.pixels(chunk))
                    sizes = [picture.shape[:2] for picture in chunk]
                    results = self.loaded.images.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
                for index, result in zip(indices[start : start + CHUNK], results, strict=True):
                    columns = (result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist())
                    found[index] = [Detection(self._name(i), s, tuple(box)) for i, s, box in zip(*columns, strict=True)]
        return found


DETECTORS: Registry[Detector] = Registry("detector", {"embedded": "pipelines.rewards.detection:EmbeddedDetector"})


def load_detector(name: str, device: str | None) -> Detector:
    """The detector of a name: `embedded`, the import path `module:attribute` of what builds a Detector, or else the hub id
    or folder of a transformers object-detection model. Raises ValueError when it cannot be had."""
    if name in DETECTORS.known or ":" in name:
        detector = DETECTORS.build(name)
        for attribute in ("version", "labels", "detect"):
            if not hasattr(detector, attribute):
                raise ValueError(f"detector {name!r} built {type(detector).__name__}, which has no {attribute}")
        return detector
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as KNOWN

    from pipelines.rewards.pretrained import load

    loaded = load("object detector", "AutoModelForObjectDetection", KNOWN, name, text=False, device=device)
    return PretrainedDetector(loaded)
