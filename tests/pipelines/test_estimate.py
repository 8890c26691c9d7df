"""Estimates against what is really there: bytes of the shards, of the modules, of the learner, of autograd's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from torch import Tensor

from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from pipelines import sampler
from pipelines.config import RunConfig
from pipelines.estimate import _saved, estimate, saved_bytes
from pipelines.learner import Learner
from pipelines.policies.conditions import ConditionStore
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from tests.integration.harness import opgrpo, opgrpo_json
from tests.pipelines.helpers import forked, merged, rows_of, small

BF16_LORA: Mapping[str, Any] = {"dtype": "bfloat16", "lora": {"rank": 4}}


def _config(options: Mapping[str, Any] | None = None, **changes: Any) -> RunConfig:
    """The small configuration on a policy that can be outlined."""
    return small(**merged(changes, {"policy": {"family": "sd3", "options": dict(options or {})}}))


# -- what is counted --------------------------------------------------------------------------------------------------


def test_work_is_what_is_left_of_the_run() -> None:
    """Three iterations of two groups of four, five steps each; one of them is done."""
    config = _config(train={"optimizer_steps": 2, "epochs": 3})
    told = estimate(config, 1)
    assert told["run_id"] == config.run_id
    work = ("iterations_done", "iterations_to_do", "trajectories", "denoising_steps", "optimizer_steps")
    assert [told[name] for name in work] == [1, 2, 16, 80, 12]
    assert [estimate(config, 4)[name] for name in work] == [4, 0, 0, 0, 0]


@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16"])
def test_disk_is_what_a_run_writes(rolled: Path, tmp_path: Path, storage_dtype: str) -> None:
    """The run wrote one of three iterations; a half of the bytes in a dtype of half the size."""
    rows = rows_of(forked(rolled, tmp_path), "trajectories")
    sizes = {location.length - location.header for location in map(LatentLocation.of, rows)}
    told = estimate(_config(rollout={"storage_dtype": storage_dtype}), 0)
    each = 6 * 8 * 3 * 3 * 4
    assert sizes == {each}
    scale = 1 if storage_dtype == "float32" else 2
    assert told["latents_bytes_each"] * scale == each
    assert told["latents_bytes"] * scale == 3 * sum(
        location.length - location.header for location in map(LatentLocation.of, rows)
    )
    assert told["media_bytes_each_at_most"] == 24 * 24 * 3
    assert max(row["media_length"] for row in rows) <= 24 * 24 * 3 + 100  # a header of PNG


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_condition_is_as_large_as_those_in_the_store(directory: Directory, dtype: str) -> None:
    policy = load("embedded", device="cpu", dtype=dtype)
    policy.prepare(directory, ["a red circle"])
    condition = ConditionStore(directory, policy.encoder_id).read("a red circle")
    told = estimate(_config({"dtype": dtype}), 0)["condition_bytes_each_at_most"]
    assert told == sum(tensor.nbytes for tensor in condition.values())


def test_videos_count_all_frames() -> None:
    """81 frames are 21 latent frames; 480 x 832 pixels are 60 x 104 latents of 16 channels."""
    options = {"height": 480, "width": 832, "num_frames": 81, "dtype": "bfloat16", "lora": {}, "gradient_checkpointing": True}
    policy = {"family": "wan", "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "options": options}
    told = estimate(small(policy=policy, train={"pairs_per_pass": 1}), 0)
    assert told["latents_bytes_each"] == 6 * 16 * 21 * 60 * 104 * 4
    assert told["media_bytes_each_at_most"] == 81 * 480 * 832 * 3
    assert told["condition_bytes_each_at_most"] == 512 * 4096 * 2
    assert told["trained_parameters"] == 30 * 8 * 32 * (1536 + 1536)  # blocks, projections, rank


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, BF16_LORA, {"offload": True}], ids=str)
def test_weights_are_those_of_the_loaded_model(options: dict[str, Any]) -> None:
    loaded = load("embedded", device="cpu", **options)
    told = estimate(_config(options), 0)
    transformer, autoencoder = (list(module.parameters()) for module in (loaded.trainable, loaded.pipeline.vae))
    on_device = transformer if loaded.offload else transformer + autoencoder
    assert told["weights_bytes"] == sum(parameter.nbytes for parameter in on_device)
    assert told["parameters"] == sum(parameter.numel() for parameter in transformer)
    assert told["trained_parameters"] == sum(parameter.numel() for parameter in transformer if parameter.requires_grad)
    parts = ("weights_bytes", "training_state_bytes", "activations_bytes")
    assert told["device_bytes_training"] == sum(told[part] for part in parts)


@pytest.mark.parametrize("objective", ["clipped", "forward"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, BF16_LORA], ids=str)
def test_training_state_is_what_a_learner_holds(options: dict[str, Any], objective: str) -> None:
    """While it adds the last parameter's gradient: then the model's own gradients are still there."""
    config = _config(options, train={"objective": objective})
    learner = Learner(load("embedded", device="cpu", **options), config.train)
    learner.zero_grad()
    learner.step(1e-3)
    if objective == "forward":
        learner.remember_old()
    held: list[Tensor] = [*learner.base.values(), *learner.average.values(), *getattr(learner, "old", {}).values()]
    for name, parameter in learner.parameters.items():
        moments = learner.optimizer.state[parameter]
        assert parameter.grad is not None
        held += [parameter.grad, moments["exp_avg"], moments["exp_avg_sq"]]
        if learner.model[name] is not parameter:
            held += [parameter, torch.zeros_like(learner.model[name])]
    assert estimate(config, 0)["training_state_bytes"] == sum(tensor.nbytes for tensor in held)


def test_moments_in_8_bits() -> None:
    """A byte for each instead of four; the small parameters, which keep four, are few."""
    whole, small_moments = (estimate(_config(train={"optimizer": name}), 0) for name in ("adamw", "adamw_8bit"))
    assert whole["training_state_bytes"] - small_moments["training_state_bytes"] == 6 * whole["trained_parameters"]
    learner = Learner(load("embedded", device="cpu"), _config(train={"optimizer": "adamw_8bit"}).train)
    learner.zero_grad()
    learner.step(1e-3)
    moments = [learner.optimizer.state[parameter] for parameter in learner.parameters.values()]
    held = sum(moment["state1"].nbytes + moment["state2"].nbytes for moment in moments)
    assert 2 * whole["trained_parameters"] <= held <= 2.5 * whole["trained_parameters"]


def _kept(policy: PipelinePolicy, pairs: int) -> int:
    """Bytes that autograd keeps of one real call: every storage once, parameters not."""
    own = {parameter.untyped_storage()._cdata for parameter in policy.trainable.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := int(tensor.untyped_storage()._cdata)) not in own:
            kept.setdefault(storage, tensor)
        return tensor

    condition = policy.encode(["a red circle"] * pairs)
    latents = sampler.batch_noise(range(pairs), -1, policy.latent_shape, policy.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.velocity(latents, torch.full((pairs,), 0.5, dtype=torch.float64), condition)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 0.0),
        ({"guidance_scale": 2.0}, 0.0),
        ({"lora": {"rank": 4}}, 0.0),
        ({"gradient_checkpointing": True}, 0.0),
        ({"gradient_checkpointing": True, "lora": {"rank": 4}}, 0.0),
        # Norms keep mean and deviation of each token in float32 on CUDA and on the meta device, in the model's dtype on CPU.
        ({"dtype": "bfloat16"}, 0.005),
        (BF16_LORA, 0.005),
        ({"dtype": "float16", "gradient_checkpointing": True}, 0.005),
    ],
    ids=str,
)
@pytest.mark.parametrize("pairs", [1, 5])
def test_activations_are_what_autograd_keeps(options: dict[str, Any], tolerance: float, pairs: int) -> None:
    real, outline = load("embedded", device="cpu", **options), load("embedded", outline=True, **options)
    assert _saved(outline, pairs) == pytest.approx(_kept(real, pairs), rel=tolerance)


def test_with_checkpointing_one_block_comes_on_top() -> None:
    plain, saving = (load("embedded", outline=True, gradient_checkpointing=on) for on in (False, True))
    assert saved_bytes(plain, 3) == _saved(plain, 3)
    assert saved_bytes(saving, 3) == _saved(saving, 3) + _saved(plain, 3) // 4
    assert saved_bytes(saving, 3) < 0.4 * saved_bytes(plain, 3)
    assert saving.trainable.is_gradient_checkpointing


def test_nothing_is_compiled_to_be_counted() -> None:
    """It would take minutes, and shapes cannot be compiled."""
    options = {"lora": {"rank": 4}, "gradient_checkpointing": True}
    assert (
        estimate(_config({**options, "compile": True}), 0)["activations_bytes"]
        == (estimate(_config(options), 0)["activations_bytes"])
    )


def test_activations_grow_with_the_pairs_of_a_pass() -> None:
    """By default all of a microbatch: 64 trajectories with a window of three steps."""
    told = [
        estimate(_config(train=train), 0)["activations_bytes"] for train in ({}, {"pairs_per_pass": 192}, {"pairs_per_pass": 1})
    ]
    assert told[0] == told[1]
    assert told[1] == pytest.approx(192 * told[2], rel=0.1)


# -- models that cannot be outlined -----------------------------------------------------------------------------------


def test_a_model_that_nobody_here_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = estimate(small(policy={"family": "sd3", "model": "nobody/nothing"}), 0)
    assert told["bytes"].startswith("unknown: cannot read the configuration of 'nobody/nothing', transformer: ")
    assert told["trajectories"] == 24
    assert "latents_bytes" not in told


def test_a_family_of_ones_own() -> None:
    told = estimate(small(), 0)["bytes"]
    assert told.startswith("unknown: policy family 'tests.pipelines.helpers:shared_policy' cannot be built with options ")


def test_dry_run_tells_and_exits_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file, store = tmp_path / "run.yaml", tmp_path / "store"
    file.write_text(yaml.safe_dump({"name": "x", "iterations": 2, "policy": {"options": dict(BF16_LORA)}}))
    told = opgrpo_json("run", file, "--store", store, "--dry-run")
    assert told == estimate(_plain(BF16_LORA), 0)
    assert "activations_bytes: " in opgrpo("run", file, "--store", store, "--dry-run").stdout
    unknown = opgrpo_json("run", file, "--store", store, "--dry-run", "--set", "policy.model=nobody/nothing")
    assert unknown["bytes"].startswith("unknown: cannot read the configuration of 'nobody/nothing'")
    assert not store.exists()


def _plain(options: Mapping[str, Any]) -> RunConfig:
    """Two iterations with everything else at its default."""
    return RunConfig.model_validate({"name": "x", "iterations": 2, "policy": {"options": dict(options)}})
