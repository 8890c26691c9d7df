"""Detectors: the embedded world's, and models of transformers against their raw outputs in float64."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RTDetrForObjectDetection, YolosForObjectDetection

from pipelines.embedded import scenes
from pipelines.rewards.base import Media
from pipelines.rewards.detection import Detection, EmbeddedDetector, load_detector
from tests.pipelines.rewards import tiny

NAMES = ("bench", "tv remote", "dog")
"""tiny.LABELS under GenEval's names."""


class EverywhereADog:
    """A user's detector, for the import path."""

    version = "dog-1"
    labels = None

    def detect(self, pictures: Sequence[Media]) -> list[list[Detection]]:
        return [[Detection("dog", 0.9, (0.0, 0.0, 1.0, 1.0))] for _ in pictures]


def _rows(found: Sequence[Detection]) -> list[tuple[str, Any, Any]]:
    return [(d.label, pytest.approx(d.score, abs=1e-4), pytest.approx(list(d.box), abs=1e-2)) for d in found]


def test_the_embedded_world() -> None:
    scene = scenes.Scene((("circle", "red"), ("square", "blue")), ((0, 2), (1, 0)))  # cells: (row, column), 8 pixels each
    found, nothing = EmbeddedDetector().detect([scenes.render(scene), np.full((30, 20, 3), scenes.GROUND, np.uint8)])
    assert sorted(found, key=lambda d: d.label) == [
        Detection("blue square", 1.0, (0.0, 8.0, 7.0, 15.0)),
        Detection("red circle", 1.0, (16.0, 0.0, 23.0, 7.0)),
    ]
    assert nothing == []
    assert {d.label for d in found} < EmbeddedDetector().labels
    assert len(EmbeddedDetector().labels) == 4 * 5


def test_the_embedded_world_has_shapeless_things_and_noise() -> None:
    picture = np.full((24, 24, 3), scenes.GROUND, np.uint8)
    picture[4:6, 2:20] = scenes.COLOURS["red"]
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    found, none = EmbeddedDetector().detect([picture, noise])
    assert [d.label for d in found] == ["red ?"]
    assert none == []


def test_yolos_against_its_raw_output(yolos_folder: Path) -> None:
    images = tiny.pictures(3, size=32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    model = YolosForObjectDetection.from_pretrained(yolos_folder).double().eval()
    with torch.no_grad():
        output = model(pixel_values=torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2)))
    logits, boxes = output.logits.numpy(), output.pred_boxes.numpy()
    likely = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    x, y, w, h = np.moveaxis(boxes * 32, -1, 0)
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    found = load_detector(str(yolos_folder), "cpu").detect(list(images))
    for ours, probability, box in zip(found, likely[..., :-1], corners, strict=True):  # the last label is "no object"
        golden = [Detection(NAMES[p.argmax()], p.max(), tuple(b)) for p, b in zip(probability, box, strict=True)]
        assert [(d.label, d.score, list(d.box)) for d in ours] == _rows(golden)


def test_rt_detr_against_its_raw_output(tmp_path: Path) -> None:
    """Sigmoids, and the best six of all pairs of a query and a label."""
    folder = tiny.save_rt_detr(tmp_path / "rt_detr")
    images = tiny.pictures(2, size=64)
    model = RTDetrForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixel_values=torch.from_numpy((images / 255).transpose(0, 3, 1, 2)).float())
    likely, boxes = 1 / (1 + np.exp(-output.logits.double().numpy())), output.pred_boxes.double().numpy() * 64
    found = load_detector(str(folder), "cpu").detect(list(images))
    for ours, probability, box in zip(found, likely, boxes, strict=True):
        best = sorted(((p, q, label) for (q, label), p in np.ndenumerate(probability)), reverse=True)[:6]
        golden = [
            Detection(NAMES[label], p, (*(box[q, :2] - box[q, 2:] / 2), *(box[q, :2] + box[q, 2:] / 2))) for p, q, label in best
        ]
        assert [(d.label, d.score, list(d.box)) for d in sorted(ours, key=lambda d: -d.score)] == _rows(golden)


def test_boxes_are_in_pixels_of_the_picture_and_the_batch_does_not_matter(yolos_folder: Path) -> None:
    detector = load_detector(str(yolos_folder), "cpu")
    pictures = [*tiny.pictures(2, size=24), tiny.pictures(1, size=48)[0], np.repeat(tiny.pictures(1, size=24)[0], 2, axis=1)]
    together = detector.detect(pictures)
    for ours, picture in zip(together, pictures, strict=True):
        alone = detector.detect([picture])[0]
        assert [(d.label, d.score, list(d.box)) for d in ours] == _rows(alone)
    assert detector.detect([]) == []


def test_a_pretrained_detector_knows_its_labels_by_genevals_names(yolos_folder: Path, tmp_path: Path) -> None:
    detector = load_detector(str(yolos_folder), "cpu")
    assert detector.labels == frozenset(NAMES)
    assert re.fullmatch("[0-9a-f]{24}", detector.version)
    assert detector.version != load_detector(str(tiny.save_yolos(tmp_path / "other", seed=1)), "cpu").version


def test_a_detector_by_import_path() -> None:
    detector = load_detector("tests.pipelines.rewards.test_detection:EverywhereADog", None)
    assert detector.detect([np.zeros((4, 4, 3), np.uint8)])[0][0].label == "dog"
    assert isinstance(load_detector("embedded", None), EmbeddedDetector)


def test_what_is_no_detector(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot load the object detector '.*': it holds a model of type clip; name one of .*yolos"
    ):
        load_detector(str(clip_folder), "cpu")
    with pytest.raises(ValueError, match=r"cannot load the object detector '.*none': there is no such folder"):
        load_detector(str(tmp_path / "none"), "cpu")
    with pytest.raises(ValueError, match="detector 'builtins:dict' built dict, which has no version"):
        load_detector("builtins:dict", None)
    with pytest.raises(ValueError, match=r"cannot import detector 'nowhere:detector'"):
        load_detector("nowhere:detector", None)
