"""The verifier accepts what is right, refuses what is not, and its soft score agrees with its strict one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.embedded import scenes, verifier
from pipelines.embedded.scenes import Scene, Spec

SPECS = [spec for kind in scenes.KINDS for spec in scenes.specs(kind)]
SEEDS = st.integers(0, 2**32 - 1)
POSITION = Spec("position", (("circle", "red"), ("square", "blue")), "left of")
ONE = Spec("single", (("circle", "red"),))


def judge(image: NDArray[np.uint8], spec: Spec) -> verifier.Verdict:
    return verifier.verify(image[None], [spec.metadata()])[0]


def test_clean_pictures_of_every_spec_are_right() -> None:
    rng = np.random.default_rng(0)
    pictures = scenes.batch([scenes.sample_scene(spec, rng) for spec in SPECS * 2])
    verdicts = verifier.verify(pictures, [spec.metadata() for spec in SPECS * 2])
    assert [(v.strict, v.soft) for v in verdicts] == [(1, 1.0)] * len(verdicts)


def test_near_misses_of_every_spec_are_wrong_but_earn_something() -> None:
    rng = np.random.default_rng(1)
    pictures = scenes.batch([scenes.near_miss(spec, rng) for spec in SPECS * 2])
    verdicts = verifier.verify(pictures, [spec.metadata() for spec in SPECS * 2])
    assert not any(v.strict for v in verdicts)
    assert all(0.0 < v.soft < 1.0 for v in verdicts)


@given(spec=st.sampled_from(SPECS), seed=SEEDS, channel_noise=st.integers(0, 12))
def test_slightly_noisy_pictures_are_still_right(spec: Spec, seed: int, channel_noise: int) -> None:
    rng = np.random.default_rng(seed)
    clean = scenes.render(scenes.sample_scene(spec, rng)).astype(int)
    noisy = clean + rng.integers(-channel_noise, channel_noise + 1, clean.shape)
    assert judge(noisy.clip(0, 255).astype(np.uint8), spec).strict == 1


@given(spec=st.sampled_from(SPECS), seed=SEEDS, other=st.sampled_from(SPECS))
def test_soft_is_one_exactly_when_strict_is(spec: Spec, seed: int, other: Spec) -> None:
    verdict = judge(scenes.render(scenes.sample_scene(other, np.random.default_rng(seed))), spec)
    assert (verdict.soft == 1.0) == (verdict.strict == 1)
    assert 0.0 <= verdict.soft <= 1.0
    json.dumps(verdict.detail)


@given(spec=st.sampled_from(SPECS), seed=SEEDS, data=st.data())
def test_each_corruption_is_refused(spec: Spec, seed: int, data: st.DataObject) -> None:
    scene = scenes.sample_scene(spec, np.random.default_rng(seed))
    at = data.draw(st.integers(0, len(scene.objects) - 1))
    shape, colour = scene.objects[at]
    free = [(r, c) for r in range(scenes.GRID) for c in range(scenes.GRID) if (r, c) not in scene.cells]
    swap = {"a": (data.draw(st.sampled_from([s for s in scenes.SHAPES if s != shape])), colour)}
    swap["b"] = (shape, data.draw(st.sampled_from([c for c in scenes.COLOURS if c != colour])))
    extra = (data.draw(st.sampled_from(list(scenes.SHAPES))), data.draw(st.sampled_from(list(scenes.COLOURS))))
    for new in swap.values():
        objects = tuple(new if i == at else o for i, o in enumerate(scene.objects))
        if sorted(objects) != sorted(scene.objects):
            assert judge(scenes.render(replace(scene, objects=objects)), spec).strict == 0
    without = Scene(scene.objects[:at] + scene.objects[at + 1 :], scene.cells[:at] + scene.cells[at + 1 :])
    assert judge(scenes.render(without), spec).strict == 0
    crowded = Scene((*scene.objects, extra), (*scene.cells, data.draw(st.sampled_from(free))))
    assert judge(scenes.render(crowded), spec).strict == 0


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (((0, 0), (0, 1)), 1),
        (((2, 0), (0, 2)), 1),
        (((0, 1), (0, 0)), 0),
        (((0, 0), (1, 0)), 0),
    ],
)
def test_the_relation_is_between_columns_whatever_the_rows(cells: tuple[scenes.Cell, ...], expected: int) -> None:
    verdict = judge(scenes.render(Scene(POSITION.objects, cells)), POSITION)
    assert verdict.strict == expected
    assert verdict.detail["objects_score"] == 1.0


def test_the_relation_earns_more_the_nearer_it_comes() -> None:
    soft = [judge(scenes.render(Scene(POSITION.objects, ((0, c), (1, 1)))), POSITION).soft for c in (2, 1, 0)]
    assert soft == sorted(soft)
    assert soft[0] < soft[1] < soft[2] == 1.0


def test_blank_noise_and_filled_pictures_are_refused() -> None:
    size = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    blank = np.broadcast_to(np.array(scenes.GROUND, np.uint8), size)
    filled = np.broadcast_to(np.array(scenes.COLOURS["red"], np.uint8), size)
    for image in (noise, blank, filled, np.zeros(size, np.uint8), np.full(size, 255, np.uint8)):
        for spec in SPECS[::17]:
            assert judge(image, spec).strict == 0


def test_objects_need_not_stand_on_the_grid() -> None:
    image = np.roll(scenes.render(Scene(ONE.objects, ((1, 1),))), (3, -2), axis=(0, 1))
    assert judge(image, ONE).strict == 1


def test_a_damaged_shape_has_no_name() -> None:
    image = scenes.render(Scene(ONE.objects, ((1, 1),)))
    image[11:, :] = scenes.GROUND
    verdict = judge(image, ONE)
    assert verdict.strict == 0
    assert verdict.detail["objects"] == ["red ?"]


def test_wrong_input_is_named() -> None:
    image = scenes.render(Scene(ONE.objects, ((1, 1),)))
    with pytest.raises(ValueError, match=r"uint8, got .* float64"):
        verifier.verify(image[None] / 255.0, [ONE.metadata()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 1 pictures but 2 metadata"):
        verifier.verify(image[None], [ONE.metadata()] * 2)
    assert verifier.verify(np.empty((0, 24, 24, 3), np.uint8), []) == []
