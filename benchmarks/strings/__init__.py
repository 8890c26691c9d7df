"""The world of strings: prompts that ask for a few letters, a reader of pictures, and a tiny SD3 pipeline that writes them.

A text-rendering task small enough for one core. `PIPELINE_DIR` is an ordinary `StableDiffusion3Pipeline.save_pretrained`
folder without a T5 encoder, to be loaded with `policy.options: {max_sequence_length: 0}`; `PROMPTS` is its prompt file.
"""

from pathlib import Path

PIPELINE_DIR: Path = Path(__file__).parent / "assets" / "pipeline"
"""Folder of the pretrained pipeline; `python -m benchmarks.strings.pretrain` makes it again from nothing."""

PROMPTS: Path = Path(__file__).parent / "prompts.jsonl"
"""The prompt file; `python -m benchmarks.strings.world` prints it."""
