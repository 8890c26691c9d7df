"""The benchmark of a device works, on a CPU and on models in miniature: what it measures is there, and adds up."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.cases import TINY, cases
from benchmarks.gpu.runner import measure, peak_flops
from pipelines.policies import outline
from tests.pipelines.helpers import shared_policy

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def test_every_family_in_miniature(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--size", "tiny", "--device", "cpu", "--json"])
    command.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["case"] for one in told] == ["tiny-sd3", "tiny-flux", "tiny-wan", "tiny-qwen-image"]
    for one in told:
        assert list(one["stages"]) == ["rollout", "score", "select", "train"]
        assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 1e8 for stage in one["stages"].values())
        assert one["stages"]["rollout"]["flop"] > 0
        assert one["stages"]["train"]["flop"] > 0
        assert one["rollout_over_diffusers"] == one["stages"]["rollout"]["seconds"] / one["diffusers_seconds"]
        assert one["train_over_pytorch"] == one["stages"]["train"]["seconds"] / one["pytorch_seconds"]
        assert 0 < one["trained_parameters"] < one["parameters"]
        assert one["stages"]["train"]["share_of_peak"] is None
        assert one["estimated_over_measured"] is None
        assert f"| train | {one['stages']['train']['seconds']:.3f} |" in command.table(one)


def test_the_large_model_on_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one layer and 64 pixels; random conditions stand for the text encoders that it does not have."""
    (case,) = cases("2b")
    assert case.options["dtype"] == "bfloat16"
    shapes = {
        "transformer": {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64, "dual_attention_layers": (0,)},
        "vae": {**outline.PUBLISHED[MEDIUM]["vae"], "block_out_channels": (32, 32, 32, 32)},
    }
    monkeypatch.setattr("benchmarks.gpu.cases.PUBLISHED", {MEDIUM: shapes})
    options = {**case.options, "height": 64, "width": 64, "max_sequence_length": 8}
    told = measure(dataclasses.replace(case, options=options, settings=TINY), "cpu")
    assert told["dtype"] == "bfloat16"
    assert told["latents_bytes_each"] == 5 * 16 * 8 * 8 * 4  # float32, as the small settings store it
    assert told["stages"]["train"]["flop"] > told["trained_parameters"]


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("NVIDIA L4", torch.bfloat16, None),
    ],
)
def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    policy = dataclasses.replace(shared_policy(), device=torch.device("cuda"), dtype=dtype)
    assert peak_flops(policy) == peak
