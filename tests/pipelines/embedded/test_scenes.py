"""The procedural world: prompts, splits, scenes and pictures."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.embedded import scenes

SPECS = [spec for kind in scenes.KINDS for spec in scenes.specs(kind)]


def test_splits_are_balanced_disjoint_and_free_of_repeats() -> None:
    train, held_out = scenes.prompts("train"), scenes.prompts("held_out")
    for split, prompts in (("train", train), ("held_out", held_out)):
        by_kind = Counter(p.metadata["kind"] for p in prompts)
        assert set(by_kind.values()) == {scenes.PROMPTS_PER_KIND[split]}  # type: ignore[index]
        assert len({p.text for p in prompts}) == len(prompts)
    assert not {json.dumps(p.metadata) for p in train} & {json.dumps(p.metadata) for p in held_out}
    assert not {p.text for p in train} & {p.text for p in held_out}


def test_prompts_are_deterministic_and_callers_cannot_damage_them() -> None:
    first = scenes.prompts("train")
    first[0].metadata["kind"] = "damaged"
    assert scenes.prompts("train")[0].metadata["kind"] == "single"
    assert [p.text for p in scenes.prompts("train")] == [p.text for p in first]


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown split 'test'; known: \['train', 'held_out'\]"):
        scenes.prompts("test")  # type: ignore[arg-type]


def test_metadata_survives_json() -> None:
    for spec in SPECS:
        assert scenes.Spec.parse(json.loads(json.dumps(spec.metadata()))) == spec


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"objects": [{"shape": "heart", "colour": "red"}]}, "unknown object 'red heart'"),
        ({"kind": "poem"}, "kind 'poem'"),
        ({"relation": "inside"}, "relation 'inside'"),
        ({"relation": None}, "relation None"),
    ],
)
def test_metadata_of_another_world_is_refused(damage: dict[str, object], message: str) -> None:
    good = scenes.specs("position")[0].metadata()
    with pytest.raises(ValueError, match=message):
        scenes.Spec.parse(good | damage)
    with pytest.raises(ValueError, match="lacks"):
        scenes.Spec.parse({"kind": "single"})


def test_every_word_is_in_the_vocabulary() -> None:
    words = {w for spec in SPECS for t in range(8) for swap in (False, True) for w in scenes.text(spec, t, swap).split()}
    assert words == set(scenes.vocabulary())


def test_swapping_inverts_the_relation() -> None:
    spec = scenes.Spec("position", (("circle", "red"), ("square", "blue")), "left of")
    assert scenes.text(spec) == "a red circle left of a blue square"
    assert scenes.text(spec, swap=True) == "a blue square right of a red circle"


@given(spec=st.sampled_from(SPECS), seed=st.integers(0, 2**32 - 1))
def test_scenes_hold_what_the_spec_says(spec: scenes.Spec, seed: int) -> None:
    scene = scenes.sample_scene(spec, np.random.default_rng(seed))
    assert scene.objects == spec.objects
    assert len(set(scene.cells)) == len(spec.objects)
    image = scenes.render(scene)
    assert image.shape == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    drawn = sum(int(scenes.shape_mask(shape).sum()) for shape, _ in spec.objects)
    assert int((image != np.array(scenes.GROUND, np.uint8)).any(-1).sum()) == drawn
