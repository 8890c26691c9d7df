"""CLIP behind rewards: its features against the raw model in float64, and everything that can be wrong with a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from pipelines.rewards.clip import Clip, load_clip
from tests.pipelines.rewards import tiny

A_RED_CAT = [54, 26, 53, 2, 0, 45, 55]
"""<|startoftext|> a</w> red</w> c a t</w> <|endoftext|>, counted in tiny.CLIP_VOCAB by hand."""


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return load_clip(str(clip_folder), device="cpu")


def raw_features(
    folder: Path, images: NDArray[np.uint8], ids: list[list[int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit features of pictures of the model's size and of token ids, from the raw model in float64, one at a time."""
    model = CLIPModel.from_pretrained(folder).double()
    with torch.no_grad():
        seen = [model.get_image_features(pixel_values=one[None]).pooler_output[0].numpy() for one in tiny.pixels(images)]
        read = [model.get_text_features(input_ids=torch.tensor([one])).pooler_output[0].numpy() for one in ids]
    return tuple(np.stack(x) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (seen, read))


def test_features_are_the_raw_models(clip: Clip, clip_folder: Path) -> None:
    images = tiny.pictures(5)
    seen, read = raw_features(clip_folder, images, [A_RED_CAT, [54, 53, 55]])
    features = clip.image_features(list(images))
    assert (features.dtype, features.shape, clip.width) == (torch.float32, (5, 8), 8)
    np.testing.assert_allclose(features, seen, atol=2e-6)
    np.testing.assert_allclose(clip.text_features(["a red cat", "red", "A  red cat"]), read[[0, 1, 0]], atol=2e-6)
    assert np.ptp(seen @ read.T) > 0.1  # the tiny model tells its inputs apart
    np.testing.assert_allclose(
        clip.cosines(list(images[:2]), ["red", "a red cat"]), [seen[0] @ read[1], seen[1] @ read[0]], atol=2e-6
    )
    assert clip.scale == pytest.approx(np.exp(3.0), rel=1e-6)


def test_features_do_not_depend_on_the_batch(clip: Clip) -> None:
    images = [*tiny.pictures(40), *tiny.pictures(2, size=24)]
    texts = ["red", "a red cat", "dog"]
    together, alone = clip.image_features(images), torch.cat([clip.image_features([one]) for one in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    words = torch.cat([clip.text_features([text]) for text in texts])
    torch.testing.assert_close(clip.text_features(texts), words, rtol=0, atol=2e-6)


def test_a_long_text_is_cut(clip: Clip) -> None:
    """12 positions: the start, ten letters and the end; so the eleventh word changes nothing."""
    ten = " ".join("abcdefghij")
    assert torch.equal(clip.text_features([ten + " k"]), clip.text_features([ten + " z z"]))
    assert not torch.equal(clip.text_features([ten]), clip.text_features(["z" + ten[1:]]))


def test_the_model_is_frozen(clip: Clip) -> None:
    assert not clip.loaded.model.training
    assert not any(parameter.requires_grad for parameter in clip.loaded.model.parameters())
    assert not clip.image_features([tiny.pictures(1)[0]]).requires_grad


def test_low_precision_is_near(clip: Clip, clip_folder: Path) -> None:
    low = load_clip(str(clip_folder), dtype="bfloat16", device="cpu")
    assert low.loaded.model.dtype == torch.bfloat16
    features = low.image_features([tiny.pictures(1)[0]])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, clip.image_features([tiny.pictures(1)[0]]), rtol=0, atol=0.05)
    assert low.digest != clip.digest


def test_the_digest_names_what_counts(clip: Clip, clip_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(clip_folder, moved)
    assert load_clip(str(moved), device="cpu").digest == clip.digest
    digests = {clip.digest}
    tensors = load_file(moved / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    digests.add(load_clip(str(moved), device="cpu").digest)
    swapped = {'"a": 0': '"b": 0', '"b": 1': '"a": 1'}
    for file, edits in [
        ("processor_config.json", {'"resample": 3': '"resample": 2'}),
        ("tokenizer.json", swapped),
        ("config.json", {'"layer_norm_eps": 1e-05': '"layer_norm_eps": 1e-06'}),
    ]:
        text = (moved / file).read_text()
        for old, new in edits.items():
            assert old in text
            text = text.replace(old, new)
        (moved / file).write_text(text)
        digests.add(load_clip(str(moved), device="cpu").digest)
    assert len(digests) == 5


def test_the_processor_may_lie_elsewhere(clip: Clip, clip_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / file, tmp_path)
    apart = load_clip(str(tmp_path), processor=str(clip_folder), device="cpu")
    assert apart.digest == clip.digest
    with pytest.raises(ValueError, match=r"cannot load the processor of the CLIP model '.*none': there is no such folder"):
        load_clip(str(tmp_path), processor=str(tmp_path / "none"), device="cpu")


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load the CLIP model '/.*none': there is no such folder"):
        load_clip(str(tmp_path / "none"), device="cpu")
    with pytest.raises(ValueError, match=r"cannot load the CLIP model '\.\./none/\.\./clip': there is no such folder"):
        load_clip("../none/../clip", device="cpu")
    with pytest.raises(ValueError, match=r"cannot load the CLIP model 'none/such': no such folder, and from the hub: "):
        load_clip("none/such", device="cpu")
    with pytest.raises(ValueError, match=r"cannot load the CLIP model '.*': .*config\.json") as told:
        load_clip(str(tmp_path), device="cpu")
    assert "\n" not in str(told.value)


def test_another_model_in_the_folder(blip_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot load the CLIP model '.*blip': it holds a model of type blip; name one of clip"
    ):
        load_clip(str(blip_folder), device="cpu")


@pytest.mark.parametrize("damage", ["torn", "missing", "lacking", "pickle"])
def test_weights_that_cannot_be_used(clip_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "lacking":
        del tensors["visual_projection.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.unlink()
    if damage == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
    told = "1 of its weights are missing, for example visual_projection.weight" if damage == "lacking" else ""
    with pytest.raises(ValueError, match=rf"cannot load the CLIP model '.*clip': {told}") as error:
        load_clip(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_options_out_of_range(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.options\.dtype 'int8': choose one of \['bfloat16', 'float16', 'float32'\]"):
        load_clip(str(clip_folder), dtype="int8", device="cpu")
    with pytest.raises(ValueError, match=r"reward\.options\.device 'abacus' cannot be used: "):
        load_clip(str(clip_folder), device="abacus")
