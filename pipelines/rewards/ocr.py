"""Reward of rendered text: how near what an OCR model reads is to what the prompt asks to be written.

The reward of Flow-GRPO (arXiv 2505.05470, flow_grpo/ocr.py) with another reader: RapidOCR, whose weights lie in its wheel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from pipelines.rewards.base import Media, Reward, Score
from pipelines.rewards.frames import frames

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

QUOTED = re.compile(r'["“”]([^"“”]*)["“”]')


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of one letter that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (left != right), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def plain(text: str) -> str:
    """A text as it is compared: lower case, without spaces."""
    return "".join(text.lower().split())


def asked(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text to be written, plain: metadata["text"], else what stands between the first double quotes of the prompt.

    Raises ValueError when there is neither, or nothing but spaces in it.
    """
    quoted = QUOTED.search(prompt)
    text = metadata.get("text", quoted and quoted[1])
    if not isinstance(text, str) or not plain(text):
        raise ValueError(
            f"no text to look for in the prompt {prompt!r} with metadata {dict(metadata)}: put it between double quotes, "
            f'or into metadata {{"text": ...}}'
        )
    return plain(text)


def distance(found: str, target: str) -> int:
    """0 if `target` occurs in `found`, else their edit distance, at most the length of `target`."""
    return 0 if target in found else min(levenshtein(found, target), len(target))


@dataclass(frozen=True)
class OcrReward:
    """Reads samples and compares with what was asked for. `read` turns a frame (H, W, 3) uint8 into the text in it."""

    name: str
    version: str
    frame_interval: int
    read: Callable[[Media], str]

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample; raises ValueError when a prompt asks for no text."""
        targets = [asked(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        return [self._score(sample, target) for sample, target in zip(media, targets, strict=True)]

    def _score(self, sample: Media, target: str) -> Score:
        found = [plain(self.read(frame)) for frame in frames(sample)[:: self.frame_interval]]
        distances = [distance(text, target) for text in found]
        values = [1 - apart / len(target) for apart in distances if apart < len(target)]
        detail: dict[str, Any] = {"found": found, "target": target, "distance": distances}
        if sample.ndim == 3:
            detail |= {"found": found[0], "distance": distances[0]}
        return Score(float(np.mean(values or 0.0)), detail)


def ocr(*, limit_side_len: int = 320, frame_interval: int = 4) -> Reward:
    """1 - distance / length of the text asked for, in [0, 1]; 1 where it occurs in what is read.

    Case and spaces do not count. What is read are all lines of a frame, joined from top to bottom and left to right. Of a video
    every `frame_interval`-th frame is read, from the first, and the value is the mean over those in which anything right was
    found, as in Flow-GRPO: text in a few frames is enough. The detail says what was found, at what distance: of a video, lists.

    limit_side_len: pixels of the longer side, at least 32, at which text is looked for; it is then read at full size. A larger
    frame is shrunk for the search, so small text in it needs more. Raises ValueError for an option out of range, and when
    the extra `ocr` is not installed.
    """
    if limit_side_len < 32:
        raise ValueError(f"limit_side_len is a number of pixels, at least 32, got {limit_side_len}")
    if frame_interval < 1:
        raise ValueError(f"frame_interval is 1 to read every frame, 2 to read every other, and so on, got {frame_interval}")
    engine = _engine(limit_side_len)

    def read(frame: Media) -> str:
        bgr = np.ascontiguousarray(frame[..., ::-1])
        result = engine(bgr, use_det=True, use_cls=False, use_rec=True)
        return " ".join(getattr(result, "txts", None) or ())

    model = f"{engine.cfg.Rec.ocr_version.value}-{engine.cfg.Rec.model_type.value}"
    named = f"{VERSION}-rapidocr{version('rapidocr')}-{model}-side{limit_side_len}-every{frame_interval}"
    return OcrReward("ocr", named, frame_interval, read)


def _engine(limit_side_len: int) -> Any:
    """RapidOCR on one thread, silent, its models loaded."""
    try:
        import onnxruntime  # noqa: F401 - RapidOCR would miss it only when it reads
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError(f'the reward ocr needs RapidOCR and ONNX Runtime ({error}): pip install "opgrpo[ocr]"') from error
    params: dict[str, Any] = {
        "Det.limit_side_len": limit_side_len,
        "Det.limit_type": "max",  # never enlarged: its own "min" takes 5 times as long and reads no better
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        "Global.log_level": "critical",
    }
    engine = RapidOCR(params=params)
    # It loads a model when it first needs it. Which steps it takes must be said at every call: it remembers the last answer.
    blank = np.zeros((64, 64, 3), np.uint8)
    engine(blank, use_det=True, use_cls=False, use_rec=False)
    engine(blank, use_det=False, use_cls=False, use_rec=True)
    return engine
