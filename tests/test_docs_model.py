"""docs/new_model.md is true: its file is the example, its check holds, and its configuration trains."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import yaml

from pipelines import sampler
from pipelines.config import build_config
from pipelines.loop import STAGES
from pipelines.policies.base import POLICIES
from pipelines.policies.loading import quiet_libraries
from pipelines.policies.pipeline_policy import PipelinePolicy
from tests.pipelines.helpers import created, merged, rows_of
from tests.pipelines.policies.randomised import randomised
from tests.pipelines.policies.tiny_text import FEATURES, t5, t5_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "new_model.md").read_text()
FILES = {name: text for _, name, text in re.findall(r"```(python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)}
EXAMPLE = "examples/models/aura_flow.py"
SIZE = {"height": 16, "width": 24, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AuraFlow of random weights: 4 pixels a latent, 2x2 patches, shift 1.73 as published."""
    quiet_libraries()
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=FEATURES,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    pipeline = diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5("UMT5EncoderModel", FEATURES, 2),
        vae=randomised(vae, 1),
        transformer=randomised(transformer, 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    path = tmp_path_factory.mktemp("model") / "aura"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_file_on_the_page_is_the_example() -> None:
    assert FILES[EXAMPLE] == (ROOT / EXAMPLE).read_text()
    assert set(FILES) == {EXAMPLE, "aura_flow.yaml", "parity.py"}


def test_the_check_on_the_page_holds(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "parity.py"
    script.write_text(FILES["parity.py"])
    done = runpy.run_path(str(script), {"folder": str(folder)})
    assert float((done["theirs"] - done["start"]).abs().mean()) > 0.1  # it went somewhere


def test_the_check_finds_a_wrong_sign(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.models.aura_flow import AuraFlow

    right = AuraFlow.predict
    monkeypatch.setattr(AuraFlow, "predict", lambda *arguments: -right(*arguments))
    script = tmp_path / "parity.py"
    script.write_text(FILES["parity.py"])
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        runpy.run_path(str(script), {"folder": str(folder)})


def test_decode_is_the_pipelines_own(folder: Path) -> None:
    policy = _built(folder)
    pipeline = diffusers.AuraFlowPipeline.from_pretrained(folder)
    start = sampler.batch_noise([0], -1, policy.latent_shape, policy.device)
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, **SIZE}
    latents = pipeline("a red circle", latents=start, output_type="latent", **settings).images
    shown = pipeline("a red circle", latents=start, output_type="np", **settings).images[0] * 255
    assert shown.std() > 10  # there is something to see
    assert np.abs(policy.decode(latents)[0] - shown).max() <= 1


def test_the_configuration_trains(folder: Path, tmp_path: Path) -> None:
    """One iteration of it, on the tiny pipeline; its ratios are 1 before the first optimizer step."""
    document = yaml.safe_load(FILES["aura_flow.yaml"])
    build_config(document, "docs/new_model.md")
    shorter = {
        "policy": {"model": str(folder), "options": {**SIZE, "dtype": "float32", "device": "cpu"}},
        "rollout": {"prompts_per_iteration": 2, "group_size": 3, "storage_dtype": "float32"},
        "reward": {"name": "jpeg_compressibility"},
    }
    experiment = created(tmp_path, build_config(merged(document, shorter), "docs/new_model.md"))
    for stage in STAGES:
        assert stage(experiment, 0).done > 0
    updates = rows_of(experiment, "updates", 0)
    first = [ratio for row in updates if row["optimizer_step"] == 0 for ratio in row["ratio"]]
    assert first == pytest.approx([1.0] * len(first), abs=1e-6)
    later = [abs(ratio - 1) for row in updates if row["optimizer_step"] == 1 for ratio in row["ratio"]]
    assert max(later) > 1e-6
    assert experiment.policy.family == "aura_flow"


def _built(folder: Path) -> PipelinePolicy:
    policy = POLICIES.build("examples.models.aura_flow:load", model=str(folder), device="cpu", **SIZE)
    assert isinstance(policy, PipelinePolicy)
    return policy
