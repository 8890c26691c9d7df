"""Time, memory and FLOP of an iteration's stages, and what they cost over bare diffusers and bare PyTorch.

python -m benchmarks.gpu --size tiny       all families in miniature: says that it works, not how fast
python -m benchmarks.gpu --size 2b         an SD3 of 2.2 B random parameters, bfloat16, 512x512: for a GPU of 40 GB or more
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from pipelines.policies.loading import quiet_libraries


def table(told: dict[str, Any]) -> str:
    """One case as Markdown."""
    whole, trained = (f"{told[name] / 1e6:,.2f} M" for name in ("parameters", "trained_parameters"))
    lines = [
        f"{told['case']}: {whole} parameters, {trained} of them trained, {told['dtype']}, {told['trajectories']} trajectories; "
        f"{told['device']}, torch {torch.__version__}",
        "| stage | seconds | peak memory, GB | TFLOP | share of the peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, stage in told["stages"].items():
        share = "" if stage["share_of_peak"] is None else f"{stage['share_of_peak']:.3f}"
        numbers = f"{stage['seconds']:.3f} | {stage['peak_bytes'] / 1e9:.2f} | {stage['flop'] / 1e12:.3g} | {share}"
        lines.append(f"| {name} | {numbers} |")
    ratios = (
        f"rollout / bare diffusers {told['rollout_over_diffusers']:.2f} ({told['diffusers_seconds']:.3f} s), "
        f"train / bare PyTorch {told['train_over_pytorch']:.2f} ({told['pytorch_seconds']:.3f} s)"
    )
    if told["estimated_over_measured"] is not None:
        ratios += f", memory while training: estimated / measured {told['estimated_over_measured']:.2f}"
    return "\n".join([*lines, "", ratios, ""])


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "2b"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and case")
    arguments = parser.parse_args()
    quiet_libraries()
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.runner import measure

    for case in cases(arguments.size):
        told = measure(case, arguments.device)
        print(json.dumps(told) if arguments.json else table(told), flush=True)


if __name__ == "__main__":
    main()
