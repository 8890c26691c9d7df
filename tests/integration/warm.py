"""What every command of the compute plane imports: loaded once, so that a test's processes begin where the work does."""

import gc

import diffusers
from diffusers import AutoencoderKL, SD3Transformer2DModel

import cli
from pipelines import evaluation, loop, restore
from pipelines.policies import pipeline_policy

__all__ = ["AutoencoderKL", "SD3Transformer2DModel", "cli", "diffusers", "evaluation", "loop", "pipeline_policy", "restore"]

gc.collect()
gc.freeze()  # a collection would go through all that was imported
