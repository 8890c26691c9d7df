"""Three iterations with everything replay has, against frozen numbers: a change that moves them has to mean it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integration.golden_curve import GOLDEN, curve

INEXACT = ("weight", "loss", "grad_norm", "path_variance")
EXACT = ("iteration", "role", "rows", "reward")


def test_three_iterations_give_the_golden_curve(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        found, golden = curve(tmp_path), json.loads(GOLDEN.read_text())
    finally:
        torch.set_num_threads(threads)
    assert found["held_out"] == pytest.approx(golden["held_out"], abs=2 / 128)  # two of 128 samples on the edge
    assert len(found["updates"]) == len(golden["updates"])
    for ours, theirs in zip(found["updates"], golden["updates"], strict=True):
        assert [ours[name] for name in EXACT] == [theirs[name] for name in EXACT]
        assert [ours[name] for name in INEXACT] == pytest.approx([theirs[name] for name in INEXACT], rel=2e-3, abs=1e-6)
