"""The verifier: does a picture show exactly the scene that a prompt asks for?

In the manner of GenEval: segment the picture by colour, name the shape of every segment, compare the multiset of
objects with the prompt's, then the relation of the two centres. Nothing in it knows the grid of the renderer, so an
object may stand anywhere. All pictures of a call are segmented in one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.embedded.scenes import COLOURS, GROUND, RELATIONS, SHAPE_SIZE, SHAPES, Spec, related, shape_mask

MIN_AREA = 5
"""Pixels; smaller segments are specks left by the decoder, not objects."""
MIN_IOU = 0.8
"""Intersection over union with a shape's template below which a segment has no shape."""
MIN_OFFSET = 5.0
"""Pixels between two centres, along the relation's direction, from which the relation holds."""
MAX_UNCLEAR = 0.08
"""Share of pixels far from every known colour from which a picture counts as noise."""
UNCLEAR_DISTANCE = 60.0
"""Euclidean distance in RGB (0..255) to the nearest known colour from which a pixel is unclear."""

_PALETTE = np.array([GROUND, *COLOURS.values()], np.float32)
_NAMES = list(COLOURS)
_WINDOW = SHAPE_SIZE + 4


@dataclass(frozen=True)
class Segment:
    """One connected region of one colour. `shape` is "?" when it fits no template; x and y are its centre in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    iou: float


@dataclass(frozen=True)
class Verdict:
    """strict: 1 if the picture is exactly right, else 0. soft: partial credit in [0, 1], 1 exactly when strict is 1."""

    strict: int
    soft: float
    detail: dict[str, Any]


def _templates() -> tuple[list[str], NDArray[np.float32]]:
    """Every shape at the nine offsets around the window's centre: names (9 * shapes), masks (9 * shapes, window^2)."""
    names, masks = [], []
    for shape in SHAPES:
        for dy in (1, 2, 3):
            for dx in (1, 2, 3):
                canvas = np.zeros((_WINDOW, _WINDOW), np.float32)
                canvas[dy : dy + SHAPE_SIZE, dx : dx + SHAPE_SIZE] = shape_mask(shape)
                names.append(shape)
                masks.append(canvas.ravel())
    return names, np.stack(masks)


_TEMPLATE_NAMES, _TEMPLATES = _templates()


def nearest_colours(images: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Per pixel the nearest palette entry (0 = ground): (B, H, W); and per picture the share of unclear pixels: (B,)."""
    pixels = images.reshape(-1, 3).astype(np.float32)
    distance = (pixels**2).sum(1, keepdims=True) - 2 * pixels @ _PALETTE.T + (_PALETTE**2).sum(1)
    unclear = distance.min(1).reshape(len(images), -1) > UNCLEAR_DISTANCE**2
    return distance.argmin(1).reshape(images.shape[:3]), unclear.mean(1)


def segment(images: NDArray[np.uint8]) -> tuple[list[list[Segment]], NDArray[np.float64]]:
    """Segments of every picture, and the share of unclear pixels (B,). images: (B, H, W, 3) uint8."""
    nearest, unclear = nearest_colours(images)
    found: list[list[Segment]] = [[] for _ in images]
    colours = np.arange(1, len(_PALETTE))[None, :, None, None]
    masks = (nearest[:, None] == colours).reshape(-1, *nearest.shape[1:])  # (B * colours, H, W)
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = ndimage.generate_binary_structure(2, 1)  # touching by a corner, or in another picture, is not touching
    labels, count = ndimage.label(masks, plane)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    owners, windows, corners = [], [], []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if areas[label] < MIN_AREA:
            continue
        mask = labels[box][0] == label
        owners.append(box[0].start)
        corners.append((box[1].start, box[2].start, *mask.shape))
        windows.append(_centred(mask))
    if not owners:
        return found, unclear
    names, scores = _name_shapes(np.stack(windows))
    for owner, corner, name, score in zip(owners, corners, names, scores, strict=True):
        top, left, height, width = corner
        picture, colour = divmod(owner, len(_NAMES))
        x, y = left + (width - 1) / 2, top + (height - 1) / 2
        found[picture].append(Segment(name, _NAMES[colour], x, y, round(float(score), 3)))
    return found, unclear


def _centred(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The mask in the middle of a window, flat (window^2); one too big for it leaves the window full: no shape."""
    window = np.zeros((_WINDOW, _WINDOW), np.float32)
    height, width = mask.shape
    if max(height, width) > _WINDOW:
        window[:] = 1
    else:
        top, left = (_WINDOW - height) // 2, (_WINDOW - width) // 2
        window[top : top + height, left : left + width] = mask
    return window.ravel()


def _name_shapes(windows: NDArray[np.float32]) -> tuple[list[str], NDArray[np.float32]]:
    """Best template of every window (M, window^2) and its intersection over union (M,)."""
    overlap = windows @ _TEMPLATES.T
    iou = overlap / (windows.sum(1, keepdims=True) + _TEMPLATES.sum(1) - overlap)
    best, score = iou.argmax(1), iou.max(1)
    return [_TEMPLATE_NAMES[b] if s >= MIN_IOU else "?" for b, s in zip(best, score, strict=True)], score


def verify(images: NDArray[np.uint8], metadata: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Judge each picture against its prompt's metadata. images: (B, H, W, 3) uint8."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be (B, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if len(images) != len(metadata):
        raise ValueError(f"got {len(images)} pictures but {len(metadata)} metadata records; pass one of each per picture")
    if not len(images):
        return []
    segments, unclear = segment(images)
    return [_judge(*item) for item in zip(segments, unclear.tolist(), map(Spec.parse, metadata), strict=True)]


def _judge(segments: list[Segment], unclear: float, spec: Spec) -> Verdict:
    wanted, seen = Counter(spec.objects), Counter((s.shape, s.colour) for s in segments)
    exact = wanted == seen
    noisy = unclear > MAX_UNCLEAR
    objects = _objects_score(list(spec.objects), segments)
    offset = _offset(segments, spec)
    holds = offset is None or offset >= MIN_OFFSET
    soft = objects
    if spec.relation is not None:
        nearness = 0.0 if offset is None else min(max(0.5 + offset / (2 * MIN_OFFSET), 0.0), 1.0)
        soft = objects * (0.5 + 0.5 * nearness)
        holds = holds and offset is not None
    if noisy:
        soft *= 0.5
    detail = {
        "kind": spec.kind,
        "objects": [f"{s.colour} {s.shape}" for s in segments],
        "objects_score": round(objects, 4),
        "relation_offset": offset,
        "unclear": round(unclear, 4),
    }
    return Verdict(int(exact and holds and not noisy), soft, detail)


def _objects_score(wanted: list[tuple[str, str]], segments: list[Segment]) -> float:
    """Share of objects matched, in [0, 1]: 1 for an exact match, half for the colour or the shape alone."""
    left = [(s.shape, s.colour) for s in segments]
    open_wishes, total = [], 0.0
    for wish in wanted:
        if wish in left:
            left.remove(wish)
            total += 1.0
        else:
            open_wishes.append(wish)
    for shape, colour in open_wishes:
        close = next((other for other in left if other[0] == shape or other[1] == colour), None)
        if close is not None:
            left.remove(close)
            total += 0.5
    return total / max(len(wanted), len(segments))


def _offset(segments: list[Segment], spec: Spec) -> float | None:
    """Pixels by which objects[0] lies from objects[1] in the relation's direction; None unless both are seen once."""
    if spec.relation is None:
        return None
    centres = []
    for wish in spec.objects:
        matching = [s for s in segments if (s.shape, s.colour) == wish]
        if len(matching) != 1:
            return None
        centres.append((matching[0].x, matching[0].y))
    assert spec.relation in RELATIONS
    return related(centres[0], centres[1], spec.relation)
