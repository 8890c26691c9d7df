"""Heads from safetensors files: the value in float64 NumPy, and every kind of wrong file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines.rewards.linear_head import load_head
from tests.pipelines.rewards import tiny

CPU = torch.device("cpu")
FEATURES = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [(8, 1), (8, 6, 4, 3, 2, 1)])
def test_the_value(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    tensors = tiny.save_head(tmp_path / "head.safetensors", sizes)
    golden = tiny.head_value(tensors, FEATURES.double().numpy())
    np.testing.assert_allclose(load_head(str(tmp_path / "head.safetensors"), 8, CPU)(FEATURES), golden, rtol=1e-4)


def test_layers_are_taken_by_number_and_in_half_precision(tmp_path: Path) -> None:
    """As text, 10 stands before 2."""
    tensors = tiny.save_head(tmp_path / "head.safetensors", (8, 4, 1))
    halves = {key.replace(".0.", ".2.") if ".0." in key else key.replace(".2.", ".10."): t.half() for key, t in tensors.items()}
    save_file(halves, tmp_path / "half.safetensors")
    golden = load_head(str(tmp_path / "head.safetensors"), 8, CPU)
    half = load_head(str(tmp_path / "half.safetensors"), 8, CPU)
    np.testing.assert_allclose(half(FEATURES), golden(FEATURES), atol=0.05)
    assert half.digest != golden.digest


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"head{suffix}"
    tensors = {"layers.0.weight": torch.ones(1, 8), "layers.0.bias": torch.ones(1)}
    torch.save(tensors, path)
    told = rf"the head '.*head\{suffix}' is a pickle, .*: convert it once with safetensors\.torch\.save_file\(torch\.load\("
    with pytest.raises(ValueError, match=told):
        load_head(str(path), 8, CPU)
    save_file(torch.load(path, map_location="cpu", weights_only=True), tmp_path / "head.safetensors")  # what it says
    assert load_head(str(tmp_path / "head.safetensors"), 8, CPU)(torch.ones(1, 8)) == [9.0]


def test_files_that_are_no_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no head '.*none\.safetensors': name a \.safetensors file"):
        load_head(str(tmp_path / "none.safetensors"), 8, CPU)
    path = tmp_path / "head.safetensors"
    tiny.save_head(path, (8, 1))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"the head '.*head\.safetensors' is damaged, or no safetensors file: ") as told:
        load_head(str(path), 8, CPU)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, r"must hold layers\.<i>\.weight and layers\.<i>\.bias, got "),
        ({"layers.0.weight": (1, 8)}, r"must hold .*, got layers\.0\.weight"),
        ({"layers.0.weight": (1, 8), "layers.1.bias": (1,)}, r"must hold .*, got layers\.0\.weight, layers\.1\.bias"),
        ({"layers.0.weight": (1, 8), "layers.0.bias": (1,), "extra": (1,)}, r"must hold .*, got extra, layers"),
        (
            {"layers.0.weight": (1, 7), "layers.0.bias": (1,)},
            r"is of another model: layers\.0 is \(1, 7\) and \(1,\), its input has 8",
        ),
        ({"layers.0.weight": (1, 8), "layers.0.bias": (2,)}, r"is of another model: layers\.0 is \(1, 8\) and \(2,\)"),
        ({"layers.0.weight": (8,), "layers.0.bias": (8,)}, r"is of another model: layers\.0 is \(8,\) and \(8,\)"),
        ({"layers.0.weight": (3, 8), "layers.0.bias": (3,)}, "ends in 3 numbers instead of 1"),
    ],
)
def test_tensors_that_are_no_head(tmp_path: Path, tensors: dict[str, tuple[int, ...]], told: str) -> None:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=rf"the head '.*' {told}"):
        load_head(str(tmp_path / "head.safetensors"), 8, CPU)
