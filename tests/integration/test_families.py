"""Every family through the command line: drawn, scored, selected, trained as an adapter, exported, and loaded by diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml

from opgrpo_data.store import Store
from pipelines import sampler
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.restore import restore
from tests.integration.harness import opgrpo, opgrpo_json
from tests.pipelines.policies.families import CASES, NEGATIVE, TEXTS, Case

PROMPTS = [("a red circle", "train"), ("two blue squares", "train"), ("one green diamond", "held_out")]
LORA = {"rank": 4, "alpha": 10}


def _config(case: Case, model: Path, folder: Path) -> Path:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": text, "metadata": {}, "split": split}) for text, split in PROMPTS))
    name = "sd3" if case.name.startswith("sd3") else case.name
    config = {
        "name": case.name.replace("_", "-"),
        "iterations": 2,
        "policy": {
            "family": name,
            "model": str(model),
            "options": {**case.options, "lora": LORA, "guidance_scale": 2.0, "device": "cpu"},
        },
        "prompts": {"source": str(prompts)},
        "rollout": {"prompts_per_iteration": 2, "group_size": 3, "num_steps": 4, "storage_dtype": "float16"},
        "replay": {"prefix_steps": 1},
        "reward": {"name": "jpeg_compressibility"},
        "train": {"window": 2, "optimizer_steps": 1, "lr": 1e-2, "pairs_per_pass": 4, "kl_beta": 0.01, "ema_decay": 0.0},
        "eval": {"samples": 2, "num_steps": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "qwen_image"])
def test_from_prompt_to_diffusers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.build(tmp_path / "model")
    config, store = _config(case, model, tmp_path), tmp_path / "store"
    opgrpo("init", config, "--store", store)
    for iteration in range(2):
        for stage in ("rollout", "score", "select", "train"):
            done = opgrpo_json(stage, config, "--store", store, "--quiet")
            assert (done["iteration"] in (iteration, None), done["done"] > 0) == (True, True), (stage, done)
    result = opgrpo_json("run", config, "--store", store, "--quiet")
    roles = opgrpo_json("sql", "SELECT role, count(*) AS n FROM plans GROUP BY 1 ORDER BY 1", "--store", store)
    assert roles == [{"role": "continuation", "n": 2}, {"role": "fresh", "n": 10}]
    kinds = opgrpo_json("sql", "SELECT DISTINCT media_format FROM trajectories", "--store", store)
    assert kinds == [{"media_format": "mp4" if name == "wan" else "png"}]

    exported = opgrpo_json("export", "--policy", result["policy_id"], "--store", store, "--to", tmp_path / "lora")
    assert exported["kind"] == "lora"
    theirs = case.theirs(model)
    before = _sampled(case, theirs)
    theirs.load_lora_weights(tmp_path / "lora")
    after = _sampled(case, theirs)
    assert not torch.equal(before, after)  # training has moved it
    assert float((after - _ours(store, result["policy_id"])).abs().max()) <= 1e-5


def _start(shape: tuple[int, ...]) -> torch.Tensor:
    return sampler.batch_noise([3], -1, shape, torch.device("cpu"))


def _sampled(case: Case, pipeline: Any) -> torch.Tensor:
    """Last latents of diffusers' own call, guided."""
    assert isinstance(pipeline, diffusers.DiffusionPipeline)
    shape = case.policy(Path(pipeline.config["_name_or_path"])).latent_shape
    return case.path(pipeline, TEXTS[:1], _start(shape), 2.0, 3)[-1]


def _ours(store: Path, policy_id: str) -> torch.Tensor:
    """Last latents of the policy in the store, by our ODE sampler."""
    policy = restore(Store.open(str(store)), policy_id).policy
    assert isinstance(policy, PipelinePolicy)
    policy.negative_prompt = NEGATIVE  # as the other call is given
    grid = sampler.transitions("ode", policy.sigmas(3), 0.0)
    condition = policy.encode(TEXTS[:1])
    path = sampler.draw(
        lambda x, sigma: policy.velocity(x, sigma, condition), _start(policy.latent_shape), grid, [3], "float32"
    )
    return path.latents[:, -1]
