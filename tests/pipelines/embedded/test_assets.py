"""The shipped pipeline: a genuine diffusers folder that paints scenes, some of them right."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from pipelines.embedded import ABSENT, PIPELINE_DIR, autoencoder, scenes, text, verifier

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, local_files_only=True, **ABSENT)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_folder_is_small_and_holds_nothing_that_can_run() -> None:
    files = [f for f in PIPELINE_DIR.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt"}


def test_each_word_is_one_token(pipeline: StableDiffusion3Pipeline) -> None:
    for prompt in scenes.prompts("train") + scenes.prompts("held_out"):
        words = prompt.text.split()
        assert pipeline.tokenizer.tokenize(prompt.text) == [f"{word}</w>" for word in words]
        assert len(words) + 2 <= pipeline.tokenizer_max_length


def test_text_encoding_is_the_pipelines_own(pipeline: StableDiffusion3Pipeline) -> None:
    prompts = [p.text for p in scenes.prompts("held_out")[:4]]
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=0
    )
    encoders: list[CLIPTextModelWithProjection] = [pipeline.text_encoder, pipeline.text_encoder_2]
    ours = text.encode(encoders, text.tokenize(pipeline.tokenizer, prompts))
    torch.testing.assert_close(ours.tokens, tokens)
    torch.testing.assert_close(ours.pooled, pooled)


def test_autoencoder_is_lossless_for_the_verifier(pipeline: StableDiffusion3Pipeline) -> None:
    rng = np.random.default_rng(0)
    vae: AutoencoderKL = pipeline.vae
    chosen = [spec for kind in scenes.KINDS for spec in scenes.specs(kind)[::3]]
    images = scenes.batch([scenes.sample_scene(spec, rng) for spec in chosen])
    latents = autoencoder.encode(vae, images)
    assert 0.8 < float(latents.std()) < 1.2
    verdicts = verifier.verify(autoencoder.decode(vae, latents), [spec.metadata() for spec in chosen])
    assert np.mean([v.strict for v in verdicts]) >= 0.995


def test_plain_pipeline_call_paints_scenes(pipeline: StableDiffusion3Pipeline) -> None:
    prompts = scenes.prompts("held_out")
    pictures = pipeline(
        [p.text for p in prompts],
        num_inference_steps=10,
        guidance_scale=0.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    images = (pictures * 255).round().astype(np.uint8)
    assert images.shape == (len(prompts), scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
    verdicts = verifier.verify(images, [p.metadata for p in prompts])
    assert 0.2 < np.mean([v.strict for v in verdicts]) < 0.6


def test_log_tells_how_it_was_made() -> None:
    log = json.loads((PIPELINE_DIR / "pretrain_log.json").read_text())
    assert log["lossless"] >= 0.995
    held_out = log["success_noisy"]["held_out"]
    assert 0.25 <= held_out["strict"] <= 0.50
    assert all(held_out[kind] >= 0.2 for kind in scenes.KINDS)
