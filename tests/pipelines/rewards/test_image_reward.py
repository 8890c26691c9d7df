"""ImageReward against its formula, on the raw BLIP's output in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import BlipForImageTextRetrieval

from pipelines.rewards.base import Reward, build_reward
from tests.pipelines.rewards import tiny

IMAGES = tiny.pictures(4)
SIZES = (16, 6, 5, 4, 3, 1)
TEXTS = {"a red cat": [2, 5, 6, 8, 3], "blue dog": [2, 7, 9, 3]}
"""[CLS] words [SEP], counted in tiny.BERT_VOCAB by hand."""


@pytest.fixture
def head(tmp_path: Path) -> Path:
    tiny.save_head(tmp_path / "head.safetensors", SIZES)
    return tmp_path / "head.safetensors"


def _built(folder: Path, head: Path, **options: object) -> Reward:
    return build_reward("image_reward", {"model": str(folder), "head": str(head), "device": "cpu", **options})


def _golden(folder: Path, head: Path, text: str) -> NDArray[np.float64]:
    """(head([CLS]) - mean) / std per picture: one at a time, in float64, without any padding."""
    model = BlipForImageTextRetrieval.from_pretrained(folder).double()
    outputs = []
    with torch.no_grad():
        for one in tiny.pixels(IMAGES):
            seen = model.vision_model(pixel_values=one[None]).last_hidden_state
            output = model.text_encoder(input_ids=torch.tensor([TEXTS[text]]), encoder_hidden_states=seen)
            outputs.append(output.last_hidden_state[0, 0].numpy())
    raw = tiny.head_value(load_file(head), np.stack(outputs))
    return (raw - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("text", TEXTS)
def test_the_formula(blip_folder: Path, head: Path, text: str) -> None:
    golden = _golden(blip_folder, head, text)
    scores = _built(blip_folder, head).score(list(IMAGES), [text] * 4, [{}] * 4)
    np.testing.assert_allclose([score.value for score in scores], golden, rtol=1e-3, atol=1e-4)
    assert np.ptp(golden) > 0.1


def test_every_picture_meets_its_own_prompt(blip_folder: Path, head: Path) -> None:
    red, blue = (_golden(blip_folder, head, text) for text in TEXTS)
    first, second, video = _built(blip_folder, head, frames=2).score(
        [IMAGES[0], IMAGES[0], IMAGES], [*TEXTS, "blue dog"], [{}] * 3
    )
    assert abs(red[0] - blue[0]) > 1e-2
    assert first.value == pytest.approx(red[0], abs=1e-3)
    assert second.value == pytest.approx(blue[0], abs=1e-3)
    assert video.value == pytest.approx((blue[1] + blue[3]) / 2, abs=1e-3)


def test_a_long_prompt_is_cut_to_35_tokens(blip_folder: Path, head: Path) -> None:
    reward = _built(blip_folder, head)
    cut, same, other = reward.score([IMAGES[0]] * 3, ["red " * 33, "red " * 33 + "cat", "red " * 32 + "cat"], [{}] * 3)
    assert same.value == pytest.approx(cut.value, abs=1e-4)
    assert other.value != pytest.approx(cut.value, abs=1e-2)


def test_what_the_reward_does_not_run_may_be_missing(blip_folder: Path, head: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    shutil.copytree(blip_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    needed = {name: t for name, t in tensors.items() if name.startswith(("vision_model.", "text_encoder."))}
    assert len(tensors) - len(needed) == 6  # itm_head, vision_proj and text_proj
    save_file(needed, folder / "model.safetensors", metadata={"format": "pt"})
    assert _built(folder, head).version == _built(blip_folder, head).version
    del needed["text_encoder.encoder.layer.0.crossattention.self.query.bias"]
    save_file(needed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot load the BLIP model '.*': 1 of its weights are missing, .*crossattention"):
        _built(folder, head)


def test_another_model(clip_folder: Path, blip_folder: Path, head: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the BLIP model '.*': it holds a model of type clip; name one of blip"):
        _built(clip_folder, head)
    tiny.save_head(tmp_path / "wide.safetensors", (768, 1))
    with pytest.raises(ValueError, match="its input has 16 numbers"):
        _built(blip_folder, tmp_path / "wide.safetensors")
