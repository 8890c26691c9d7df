"""The examples for real models: what they ask for fits the machine they name, and everything that needs no network is there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load_config
from pipelines.groups import prompts_of
from pipelines.prompts import load_prompts
from pipelines.rewards.base import build_reward
from pipelines.rewards.geneval_rules import Request
from pipelines.rewards.ocr import asked
from pipelines.settings import RewardConfig
from tests.integration.harness import opgrpo_json
from tests.pipelines.rewards import tiny

ROOT = Path(__file__).parent.parent
GPU_BYTES = 80e9
# Parameters of the published transformers, and bytes of one trajectory: (T + 1) latents of so many float16 numbers.
KNOWN = {
    "sd35_geneval": (2_243_171_520, 11 * 16 * 64 * 64 * 2),
    "sd35_ocr": (2_243_171_520, 11 * 16 * 64 * 64 * 2),
    "sd35_pickscore": (2_243_171_520, 11 * 16 * 64 * 64 * 2),
    "flux_pickscore": (11_901_408_320, 7 * 16 * 64 * 64 * 2),
    "wan21_ocr": (1_418_996_800, 21 * 16 * 9 * 30 * 52 * 2),
    "qwen_image": (20_430_401_088, 11 * 16 * 64 * 64 * 2),
}
COCO = (
    ", person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, "
    "tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, "
    "hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, "
    "tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush, "
)


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples name their prompt files from there."""
    monkeypatch.chdir(ROOT)


@cache
def dry_run(name: str) -> dict[str, Any]:
    """What `opgrpo run --dry-run` says of an example."""
    told: dict[str, Any] = opgrpo_json("run", ROOT / f"examples/{name}.yaml", "--store", "no-such-store", "--dry-run")
    return told


def head(name: str) -> str:
    """The comment that an example begins with, as one line."""
    lines = (ROOT / f"examples/{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[0] != "#")])


def test_all_real_models_are_known() -> None:
    files = {path.stem for path in (ROOT / "examples").glob("*.yaml") if load_config(path).policy.model != "embedded"}
    assert files == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_an_example_says_what_it_needs(name: str) -> None:
    told, config = dry_run(name), load_config(ROOT / f"examples/{name}.yaml")
    transformer, trajectory = KNOWN[name]
    assert told["parameters"] - told["trained_parameters"] == transformer
    assert told["latents_bytes_each"] == trajectory
    assert told["trajectories"] == config.iterations * config.rollout.prompts_per_iteration * config.rollout.group_size
    assert told["latents_bytes"] == told["trajectories"] * trajectory
    assert told["device_bytes_training"] < GPU_BYTES
    said = re.search(r"counts ([\d.]+) GB while training, and writes (\d+) GB of latents", head(name))
    assert said is not None
    assert said.groups() == (f"{told['device_bytes_training'] / 1e9:.1f}", f"{told['latents_bytes'] / 1e9:.0f}")
    assert "Never run on a GPU" in head(name)


@pytest.mark.parametrize("name", KNOWN)
def test_the_page_on_models_says_it_too(name: str) -> None:
    told = dry_run(name)
    each = (told[f"{kind}_bytes_each{limit}"] / 1e6 for kind, limit in (("latents", ""), ("media", "_at_most")))
    cells = [
        f"[{name}](../examples/{name}.yaml)",
        f"{(told['parameters'] - told['trained_parameters']) / 1e9:.2f} B",
        *(f"{told[key] / 1e9:.1f} GB" for key in ("weights_bytes", "activations_bytes", "device_bytes_training")),
        *(f"{size:.2f} MB" for size in each),
        f"{told['latents_bytes'] / 1e9:.0f} GB",
        "no",
    ]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs/models.md").read_text().splitlines()


@pytest.mark.parametrize("name", KNOWN)
def test_its_prompts_are_enough_and_plain(name: str) -> None:
    config = load_config(ROOT / f"examples/{name}.yaml")
    prompts = load_prompts(config.prompts.source)
    chosen = prompts_of(config, prompts["train"], 0, {})
    assert len({prompt.text for prompt in chosen}) == config.rollout.prompts_per_iteration
    assert not {prompt.text for prompt in prompts["train"]} & {prompt.text for prompt in prompts["held_out"]}
    assert config.eval.samples % len(prompts["held_out"]) == 0
    lines = Path(config.prompts.source).read_text().splitlines()
    assert len(lines) == len(prompts["train"]) + len(prompts["held_out"])


def test_no_prompt_file_lies_idle() -> None:
    used = {load_config(ROOT / f"examples/{name}.yaml").prompts.source for name in KNOWN}
    assert used == {f"examples/prompts/{path.name}" for path in (ROOT / "examples/prompts").iterdir()}


def test_prompts_that_ask_for_text_quote_it() -> None:
    for prompt in _all_prompts("ocr"):
        assert 4 <= len(asked(prompt.text, prompt.metadata)) <= 24
        assert prompt.text.count('"') == 2


def test_metadata_of_geneval_is_what_the_text_says() -> None:
    """Its form is GenEval's, its labels are those that a detector of COCO knows, and its text names what it asks for."""
    tags: dict[str, int] = {}
    for prompt in _all_prompts("geneval"):
        request = Request.parse(prompt.metadata)
        tags[request.tag] = tags.get(request.tag, 0) + 1
        for clause in request.include:
            assert f", {clause.label}, " in COCO
            assert clause.label in prompt.text
            assert (clause.colour or "") in prompt.text
            assert clause.position is None or clause.position[0] in prompt.text
        assert request.exclude == tuple((c.label, c.count + 1) for c in request.include if c.count > 1)
    assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert min(tags.values()) >= 10


@pytest.mark.parametrize("name", KNOWN)
def test_its_rewards_can_be_built(name: str, tmp_path: Path) -> None:
    """With tiny models in place of those that come from a hub."""
    config = load_config(ROOT / f"examples/{name}.yaml")
    for reward in [config.reward, *([config.eval.reward] if config.eval.reward else ())]:
        built = build_reward(reward.name, reward.options | _local(reward, tmp_path))
        assert built.name == reward.name


def _local(reward: RewardConfig, folder: Path) -> dict[str, Any]:
    if reward.name == "ocr":
        return {}
    clip = str(tiny.save_clip(folder / "clip"))
    if reward.name == "pickscore":
        return {"model": clip, "processor": clip, "device": "cpu"}
    return {"detector": str(tiny.save_yolos(folder / "yolos")), "colour_model": clip, "device": "cpu"}


def _all_prompts(name: str) -> list[Any]:
    prompts = load_prompts(f"examples/prompts/{name}.jsonl")
    return [*prompts["train"], *prompts["held_out"]]
