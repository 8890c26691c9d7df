"""Every family through the command line: a tiny real pipeline is trained, exported, and drawn with by diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from torch import Tensor

from opgrpo_data.store import Store
from pipelines import sampler
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.restore import restore
from tests.integration.harness import opgrpo, opgrpo_json
from tests.pipelines.policies.families import CASES, NEGATIVE, TEXTS, Case

STEPS = 4
FAMILIES = [name for name in CASES if name != "sd3_without_t5"]


def _config(case: Case, folder: Path, model: Path) -> Path:
    """Two groups of three, guidance, small passes, and an adapter whose alpha is not its rank."""
    lora = {"rank": 2, "alpha": 3}
    options = {**case.options, "device": "cpu", "lora": lora, "guidance_scale": 2.0, "negative_prompt": NEGATIVE}
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:2]))
    document = {
        "name": case.name,
        "iterations": 2,
        "policy": {"family": case.name, "model": str(model), "options": options},
        "prompts": {"source": str(prompts)},
        "rollout": {"prompts_per_iteration": 2, "group_size": 3, "num_steps": STEPS, "groups_per_shard": 2},
        "replay": {"prefix_steps": 2},
        "reward": {"name": "sharpness"},
        "train": {"window": 2, "lr": 0.02, "optimizer_steps": 1, "pairs_per_pass": 5},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_from_init_to_diffusers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case, store = CASES[name], tmp_path / "store"
    model = case.build(tmp_path / "model")
    config = _config(case, tmp_path, model)
    opgrpo("init", config, "--store", store)
    for _ in range(2):
        for stage in ("rollout", "score", "select", "train"):
            assert opgrpo_json(stage, config, "--store", store, "--quiet")["done"] > 0
    _check_the_store(case, store)
    trained = opgrpo_json("sql", "--store", store, "SELECT policy_id FROM policies WHERE kind = 'trained' AND iteration = 2")
    told = opgrpo_json("export", "--policy", trained[0]["policy_id"], "--store", store, "--to", tmp_path / "out")
    assert told == {"policy_id": trained[0]["policy_id"], "kind": "lora", "folder": str(tmp_path / "out")}
    policy = restore(Store.open(str(store)), told["policy_id"]).policy
    assert isinstance(policy, PipelinePolicy)
    ours, base = _ours(policy), _theirs(case, policy, model, None)
    theirs = _theirs(case, policy, model, tmp_path / "out")
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) <= 1e-5
    assert float((theirs[-1] - base[-1]).abs().max()) > 1e-3  # the adapter is there, and matters


def _check_the_store(case: Case, store: Path) -> None:
    query = (
        "SELECT iteration, count(*) AS n, count(parent_id) AS replayed, min(media_format) AS format, "
        "min(len(list_filter(behaviour_logprob, lambda x: isfinite(x)))) AS steps FROM trajectories GROUP BY ALL ORDER BY ALL"
    )
    common = {"n": 6, "format": "mp4" if case.name == "wan" else "png", "steps": STEPS}
    golden = [{"iteration": 0, **common, "replayed": 0}, {"iteration": 1, **common, "replayed": 2}]
    assert opgrpo_json("sql", "--store", store, query) == golden
    ratios = "SELECT max(abs(ratio - 1)) AS off FROM (SELECT unnest(ratio) AS ratio FROM updates)"
    assert opgrpo_json("sql", "--store", store, ratios)[0]["off"] <= 1e-5
    losses = opgrpo_json("sql", "--store", store, "SELECT count(*) AS n FROM updates WHERE loss <> 0 AND grad_norm > 0")
    assert losses[0]["n"] >= 8


def _start(policy: PipelinePolicy) -> Tensor:
    return sampler.batch_noise(range(2), -1, policy.latent_shape, policy.device)


def _ours(policy: PipelinePolicy) -> list[Tensor]:
    """Latents after each step of our deterministic sampler."""
    condition, start = policy.encode(TEXTS[:2]), _start(policy)
    grid = sampler.transitions("ode", policy.sigmas(STEPS), 0.0)
    drawn = sampler.draw(lambda x, sigma: policy.velocity(x, sigma, condition), start, grid, range(2), "float32")
    return list(drawn.latents[:, 1:].unbind(1))


def _theirs(case: Case, policy: PipelinePolicy, model: Path, adapter: Path | None) -> list[Tensor]:
    """Latents after each step of the pipeline's own call, with the exported adapter or without."""
    pipeline = case.theirs(model)
    assert isinstance(pipeline, diffusers.DiffusionPipeline)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    with torch.no_grad():
        return case.path(pipeline, TEXTS[:2], _start(policy), 2.0, STEPS)
