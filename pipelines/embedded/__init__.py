"""The embedded world: procedurally drawn scenes, their verifier and a tiny pretrained SD3 pipeline that paints them.

It needs no network, no GPU and no key. `PIPELINE_DIR` is an ordinary `StableDiffusion3Pipeline.save_pretrained`
folder; `python -m pipelines.embedded.pretrain` makes it again from nothing.
"""

from pathlib import Path

PIPELINE_DIR: Path = Path(__file__).parent / "assets" / "sd3_tiny"
"""Folder of the shipped pipeline: `StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, **ABSENT)` loads it."""

ABSENT: dict[str, None] = {"text_encoder_3": None, "tokenizer_3": None}
"""The T5 encoder that this SD3 does without. diffusers wants to be told so, for any SD3 whose folder has none."""
