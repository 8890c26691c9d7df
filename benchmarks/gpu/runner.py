"""One case through the stages: the first iteration warms up and has its FLOP counted, the second is timed."""

from __future__ import annotations

import gc
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import bare
from benchmarks.gpu.cases import Case, random_conditions
from opgrpo_data.store import Store
from pipelines.estimate import estimate
from pipelines.experiment import Experiment
from pipelines.loop import STAGES
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.progress import Progress

# Dense bfloat16 or float16 with tensor cores, as NVIDIA's data sheets say. The longer name first.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def measure(case: Case, device: str) -> dict[str, Any]:
    """Everything about one case, in seconds, bytes and FLOP."""
    with tempfile.TemporaryDirectory() as folder:
        case.build(Path(folder, "model"))
        gc.collect()
        config, store = case.config(Path(folder), device), Store.create(str(Path(folder, "store")))
        if case.family == "sd3" and not Path(folder, "model", "text_encoder").exists():
            random_conditions(store, config)
            gc.collect()
        experiment = Experiment.init(store.directory.url, config, Progress(quiet=True))
        policy = experiment.policy
        assert isinstance(policy, PipelinePolicy)
        flops = count(experiment)
        stages = time_stages(experiment)
        texts = [prompt.text for prompt in experiment.prompts["train"] for _ in range(config.rollout.group_size)]
        alone = {
            "diffusers_seconds": bare.diffusers_seconds(policy, config, texts),
            "pytorch_seconds": bare.pytorch_seconds(policy, config, texts),
        }
        told = estimate(config, 0)
    peak, on_gpu = peak_flops(policy), policy.device.type == "cuda"
    for name, stage in stages.items():
        stage["flop"] = flops[name]
        stage["share_of_peak"] = flops[name] / stage["seconds"] / peak if peak else None
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name(policy.device) if on_gpu else "cpu",
        "dtype": str(policy.dtype).removeprefix("torch."),
        "trajectories": len(texts),
        **{name: told[name] for name in ("parameters", "trained_parameters", "latents_bytes_each")},
        "stages": stages,
        **alone,
        "rollout_over_diffusers": stages["rollout"]["seconds"] / alone["diffusers_seconds"],
        "train_over_pytorch": stages["train"]["seconds"] / alone["pytorch_seconds"],
        "estimated_bytes_training": told["device_bytes_training"],
        "estimated_over_measured": told["device_bytes_training"] / stages["train"]["peak_bytes"] if on_gpu else None,
    }


def count(experiment: Experiment) -> dict[str, int]:
    """FLOP of each stage. On a CPU without those of attention, which torch's counter does not know there."""
    found = {}
    for stage in STAGES:
        with FlopCounterMode(display=False) as counter:
            stage(experiment, 0)
        found[stage.__name__] = counter.get_total_flops()
    return found


def time_stages(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of each stage."""
    device, found = experiment.policy.device, {}
    for stage in STAGES:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = bare.synchronised(device)
        stage(experiment, 1)
        found[stage.__name__] = {"seconds": bare.synchronised(device) - began, "peak_bytes": peak_bytes(device)}
    return found


def peak_bytes(device: torch.device) -> int:
    """Of the device since the last reset; of a CPU, what the whole process has ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(policy: PipelinePolicy) -> float | None:
    """FLOP a second that the device can do in the model's dtype; None where that is not known."""
    if policy.device.type != "cuda" or policy.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(policy.device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
