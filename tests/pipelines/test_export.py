"""Policies as files: diffusers loads them and draws the very same, and a model card says what they are made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from opgrpo_data.errors import StoreError
from pipelines import export as export_module
from pipelines import sampler
from pipelines.embedded import ABSENT, PIPELINE_DIR
from pipelines.experiment import Experiment
from pipelines.export import export
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.restore import restore
from pipelines.rollout import rollout
from pipelines.score import score
from pipelines.selection import select
from pipelines.train import train
from tests.pipelines.helpers import created, small

TEXT = "two blue squares"


def _trained(folder: Path, **options: Any) -> tuple[Experiment, str]:
    """One iteration of the embedded policy with these options, and the id of its averaged weights."""
    config = small(
        policy={"family": "sd3", "model": "embedded", "options": {"device": "cpu", **options}},
        train={"lr": 1e-2, "ema_decay": 0.0},
    )
    experiment = created(folder, config)
    for stage in (rollout, score, select, train):
        stage(experiment, 0)
    return experiment, experiment.keep_average(1)


def _velocity(transformer: Any, policy: PipelinePolicy) -> Tensor:
    """The transformer's answer to what the policy would ask it."""
    latents = sampler.batch_noise([4], -1, policy.latent_shape, policy.device)
    sigmas = torch.tensor([0.6], dtype=torch.float64)
    condition = policy.encode([TEXT])
    with torch.no_grad():
        return policy.architecture.predict(policy.pipeline, transformer, latents.to(policy.dtype), sigmas, condition)


def _restored(experiment: Experiment, policy_id: str) -> PipelinePolicy:
    policy = restore(experiment.store, policy_id).policy
    assert isinstance(policy, PipelinePolicy)
    return policy


def test_an_adapter_comes_back_exactly(tmp_path: Path) -> None:
    """Alpha is not the rank: without the adapter's metadata diffusers would take alpha = rank, and the scale would be lost."""
    experiment, policy_id = _trained(tmp_path, lora={"rank": 4, "alpha": 10})
    told = export(experiment.store, policy_id, tmp_path / "lora")
    assert told == {"policy_id": policy_id, "kind": "lora", "folder": str(tmp_path / "lora")}
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    theirs, policy = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, **ABSENT), _restored(experiment, policy_id)
    base = _velocity(theirs.transformer, policy)
    theirs.load_lora_weights(tmp_path / "lora")
    ours = _velocity(policy.trainable, policy)
    assert torch.equal(_velocity(theirs.transformer, policy), ours)
    assert not torch.equal(base, ours)


def test_a_whole_transformer_comes_back_exactly(tmp_path: Path) -> None:
    experiment, policy_id = _trained(tmp_path)
    assert export(experiment.store, policy_id, tmp_path / "whole")["kind"] == "transformer"
    theirs, policy = (
        SD3Transformer2DModel.from_pretrained(tmp_path / "whole", subfolder="transformer"),
        _restored(experiment, policy_id),
    )
    assert torch.equal(_velocity(theirs, policy), _velocity(policy.trainable, policy))
    base = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, **ABSENT).transformer
    assert not torch.equal(_velocity(base, policy), _velocity(policy.trainable, policy))


def test_an_adapter_of_a_bfloat16_model(tmp_path: Path) -> None:
    """The file holds the float32 adapter; what differs is the rounding of a model that computes in bfloat16."""
    experiment, policy_id = _trained(tmp_path, lora={"rank": 4, "alpha": 10}, dtype="bfloat16")
    export(experiment.store, policy_id, tmp_path / "lora")
    theirs = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, dtype=torch.bfloat16, **ABSENT)
    policy = _restored(experiment, policy_id)
    base = _velocity(theirs.transformer, policy)
    theirs.load_lora_weights(tmp_path / "lora")
    ours = _velocity(policy.trainable, policy)
    error = float((_velocity(theirs.transformer, policy) - ours).abs().max())
    assert error <= 0.05 < float((base - ours).abs().max())


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    experiment, policy_id = _trained(tmp_path, lora={"rank": 4, "alpha": 10})
    export(experiment.store, policy_id, tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "embedded"
    config = experiment.config.rollout
    drawn = config.prompts_per_iteration * config.group_size
    for said in (
        policy_id,
        experiment.run_id,
        experiment.document["base_policy_id"],
        f"data: {drawn} trajectories of {config.prompts_per_iteration} prompts, 0 of them continuations",
    ):
        assert said in body
    settings = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)[0]
    assert yaml.safe_load(settings) == experiment.config.model_dump(mode="json")
    [code] = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace('"this folder"', repr(str(tmp_path / "lora"))), scope)  # the card's own words, as a reader runs them
    policy = _restored(experiment, policy_id)
    assert torch.equal(_velocity(scope["pipeline"].transformer, policy), _velocity(policy.trainable, policy))


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    experiment, policy_id = _trained(tmp_path)
    target = tmp_path / "there"
    target.mkdir()
    with pytest.raises(ValueError, match=f"{target} is there already: choose another folder"):
        export(experiment.store, policy_id, target)
    assert list(target.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, policy_id = _trained(tmp_path)

    def fails(*_: Any) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr(export_module, "_card", fails)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="the disk is full"):
        export(experiment.store, policy_id, tmp_path / "out" / "whole")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    experiment = created(tmp_path, small())
    with pytest.raises(StoreError, match="the store has no policy 00ff: see the view policies"):
        export(experiment.store, "00ff", tmp_path / "out")
    with pytest.raises(ValueError, match=r"policy_id '\.\./x' cannot be part of a path"):
        export(experiment.store, "../x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
