"""The GenEval reward as a whole: on the embedded world against its own verifier, on videos, with models, and its errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.embedded import scenes
from pipelines.rewards.base import Media, Reward, build_reward
from pipelines.rewards.detection import Detection
from pipelines.rewards.geneval import from_scene
from tests.pipelines.rewards import tiny

PROMPTS = scenes.prompts("held_out")


class Benches:
    """A user's detector: as many benches as the picture is bright, surer of the first."""

    version = "benches-1"
    labels = frozenset({"bench", "dog"})

    def detect(self, pictures: Sequence[Media]) -> list[list[Detection]]:
        return [
            [Detection("bench", 0.95 - 0.1 * i, (20.0 * i, 0.0, 20.0 * i + 10, 10.0)) for i in range(int(p[0, 0, 0]))]
            for p in pictures
        ]


class Silent(Benches):
    """A detector that answers nothing at all."""

    def detect(self, pictures: Sequence[Media]) -> list[list[Detection]]:
        return []


def _built(detector: str = "embedded", **options: Any) -> Reward:
    return build_reward("geneval", {"detector": detector, **options})


def _bright(*levels: int) -> Media:
    """A video whose frames have these brightnesses."""
    return np.zeros((len(levels), 8, 8, 3), np.uint8) + np.array(levels, np.uint8)[:, None, None, None]


def _by_benches(**options: Any) -> Reward:
    return _built("tests.pipelines.rewards.test_geneval:Benches", **options)


def _pictures(apart: int, right: bool) -> Iterator[tuple[Media, scenes.ScenePrompt]]:
    rng = np.random.default_rng(0)
    for prompt in PROMPTS:
        spec = scenes.Spec.parse(prompt.metadata)
        yield scenes.render(scenes.sample_scene(spec, rng, apart) if right else scenes.near_miss(spec, rng)), prompt


@pytest.mark.parametrize("metadata", ["the world's own", "converted"])
@pytest.mark.parametrize("right", [True, False])
def test_it_agrees_with_the_verifier_of_the_embedded_world(metadata: str, right: bool) -> None:
    """Every held-out prompt. Objects in relation stand two cells apart: GenEval asks for a clearer one than the verifier."""
    pictures, prompts = zip(*_pictures(2, right), strict=True)
    texts, own = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    truth = build_reward("scene_strict", {}).score(pictures, texts, own)
    asked = own if metadata == "the world's own" else [from_scene(record) for record in own]
    ours = _built().score(pictures, texts, asked)
    assert [score.value for score in ours] == [score.value for score in truth] == [float(right)] * len(PROMPTS)
    assert all(bool(score.detail["missing"]) != right for score in ours)
    soft = _built(view="soft").score(pictures, texts, asked)
    assert all(score.value == score.detail["soft"] for score in soft)
    assert all((score.value == 1.0) == right for score in soft)
    json.dumps([dict(score.detail) for score in ours], allow_nan=False)


def test_a_steep_relation_is_none_for_geneval() -> None:
    """One cell left and two cells up: 8 - 1.4 pixels of 17.9, less than half. For the verifier, left is left."""
    objects = (("circle", "red"), ("square", "blue"))
    metadata = scenes.Spec("position", objects, "left of").metadata()
    picture = scenes.render(scenes.Scene(objects, ((0, 0), (2, 1))))
    assert build_reward("scene_strict", {}).score([picture], [""], [metadata])[0].value == 1.0
    score = _built().score([picture], [""], [metadata])[0]
    assert score.value == 0.0
    assert score.detail["missing"] == ["1 red circle left of clause 0: found elsewhere"]


def test_conversion_of_a_scene() -> None:
    converted = from_scene(scenes.Spec("count", (("circle", "red"),) * 3).metadata())
    assert converted["tag"] == "counting"
    assert converted["include"] == [{"class": "red circle", "count": 3, "color": "red"}]
    assert len(converted["exclude"]) == 20
    assert {"class": "red circle", "count": 4} in converted["exclude"]
    assert {"class": "blue ?", "count": 1} in converted["exclude"]


def test_the_tag_counting_has_its_own_threshold() -> None:
    """Scores 0.95, 0.85, 0.75."""
    two = {"include": [{"class": "bench", "count": 2}]}
    counting, other = two | {"tag": "counting"}, two | {"tag": "two_object"}
    default, low, high = _by_benches(), _by_benches(counting_threshold=0.8), _by_benches(threshold=0.9)
    values = [[s.value for s in r.score([_bright(3)] * 2, ["", ""], [counting, other])] for r in (default, low, high)]
    assert values == [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert len({reward.version for reward in (default, low, high)}) == 3


def test_a_video_is_the_mean_of_its_frames() -> None:
    metadata = {"tag": "x", "include": [{"class": "bench", "count": 2}]}
    score = _by_benches(frames=4).score([_bright(0, 1, 1, 2), _bright(2)[0]], ["", ""], [metadata] * 2)
    assert [one.value for one in score] == [0.25, 1.0]
    assert score[0].detail == {
        "strict": 0.25,
        "soft": (0 + 0.5 + 0.5 + 1) / 4,
        "missing": ["2 bench: found 0", "2 bench: found 1"],
    }


def test_one_bad_record_is_one_samples_error() -> None:
    good, odd = (
        {"tag": "x", "include": [{"class": "bench", "count": 1}]},
        {"tag": "x", "include": [{"class": "bank", "count": 1}]},
    )
    ok, none, unknown = _by_benches().score([_bright(1)] * 3, [""] * 3, [good, {}, odd])
    assert (ok.value, ok.error) == (1.0, None)
    assert math.isnan(none.value)
    assert none.error == "not GenEval's metadata: it lacks 'include'; got {}"
    assert unknown.error == "the detector does not know bank; it knows 2 labels: bench, dog, ..."
    assert _by_benches().score([], [], []) == []


def test_a_detector_must_answer_for_every_picture() -> None:
    metadata = {"tag": "x", "include": [{"class": "bench", "count": 1}]}
    with pytest.raises(ValueError, match="the detector returned 0 lists of objects for 1 pictures"):
        _built("tests.pipelines.rewards.test_geneval:Silent").score([_bright(1)], [""], [metadata])


def test_pretrained_models_from_end_to_end(yolos_folder: Path, tmp_path: Path) -> None:
    """The tiny YOLOS sees benches everywhere. Five queries: at least one is asked for, and its colour."""
    clip = tiny.save_clip(tmp_path / "clip", positions=40)
    reward = _built(str(yolos_folder), colour_model=str(clip), device="cpu", counting_threshold=0.0)
    images = list(tiny.pictures(2, size=32))
    many = {"tag": "counting", "include": [{"class": "bench", "count": 5}], "exclude": [{"class": "dog", "count": 1}]}
    red = {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}]}
    counted, coloured = reward.score(images, ["", ""], [many, red])
    found = reward.detector.detect(images)  # type: ignore[attr-defined]
    assert counted.value == float([d.label for d in found[0]] == ["bench"] * 5)
    surest = max((d for d in found[1] if d.label == "bench"), key=lambda d: d.score)
    named = reward.colour_model.name(images[1], [surest])  # type: ignore[attr-defined]
    assert coloured.value == float(named == ["red"])
    assert _built(str(yolos_folder), device="cpu").version != reward.version


def test_versions_name_the_options() -> None:
    named: list[dict[str, Any]] = [{}, {"view": "soft"}, {"frames": 1}, {"max_overlap": 0.5}]
    assert len({_built(**one).version for one in named} | {_by_benches().version}) == 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"view": "half"}, r"reward\.options\.view 'half': choose strict or soft"),
        ({"threshold": 1.5}, r"reward\.options\.threshold must lie in 0\.\.1, got 1\.5"),
        ({"counting_threshold": -1}, r"reward\.options\.counting_threshold must lie in 0\.\.1, got -1"),
        ({"max_overlap": float("nan")}, r"reward\.options\.max_overlap must lie in 0\.\.1, got nan"),
        ({"frames": 0}, r"reward\.options\.frames .* at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _built(**options)
