"""Make the embedded pipeline from nothing: `python -m pipelines.embedded.pretrain --out DIR --seed N`.

Autoencoder, then a clean phase, then a noisy phase (see `denoiser`). Writes a `StableDiffusion3Pipeline` folder with
`pretrain_log.json` beside the weights. Deterministic for a seed, a device and a thread count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from pipelines.embedded import autoencoder, denoiser, scenes, verifier

WRONG: dict[scenes.Kind, float] = {"single": 0.6, "count": 0.5, "two": 0.5, "position": 0.5}
"""Share of wrong pictures per kind in the noisy phase."""


def measure(models: denoiser.Models, vae: AutoencoderKL, split: scenes.Split, repeats: int, seed: int) -> dict[str, float]:
    """Verifier success by kind and over all ("strict", "soft"), ODE sampler with 10 steps, `repeats` pictures a prompt."""
    chosen = scenes.prompts(split) * repeats
    latents = denoiser.sample(models, [p.text for p in chosen], steps=10, seed=seed)
    verdicts = verifier.verify(autoencoder.decode(vae, latents), [p.metadata for p in chosen])
    by_kind = defaultdict(list)
    for prompt, verdict in zip(chosen, verdicts, strict=True):
        by_kind[prompt.metadata["kind"]].append(verdict.strict)
    result = {"strict": float(np.mean([v.strict for v in verdicts])), "soft": float(np.mean([v.soft for v in verdicts]))}
    return {k: round(v, 4) for k, v in result.items()} | {k: round(float(np.mean(v)), 4) for k, v in by_kind.items()}


def lossless(vae: AutoencoderKL, rng: np.random.Generator, per_kind: int = 500) -> float:
    """Share of clean scenes that the verifier still accepts after encoding and decoding."""
    specs = [s[rng.integers(len(s))] for kind in scenes.KINDS for s in [scenes.specs(kind)] for _ in range(per_kind)]
    images = scenes.batch([scenes.sample_scene(spec, rng) for spec in specs])
    decoded = autoencoder.decode(vae, autoencoder.encode(vae, images))
    return float(np.mean([v.strict for v in verifier.verify(decoded, [s.metadata() for s in specs])]))


def save(models: denoiser.Models, vae: AutoencoderKL, folder: Path) -> None:
    """Write a genuine diffusers pipeline folder, safetensors only."""
    pipeline = StableDiffusion3Pipeline(
        transformer=models.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=models.encoders[0],
        tokenizer=models.tokenizer,
        text_encoder_2=models.encoders[1],
        tokenizer_2=models.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


@dataclass(frozen=True)
class Schedule:
    """How long each part trains (steps of 64 pictures for the autoencoder, of 256 pairs for the denoiser), on how many
    prompt-picture pairs a phase, and on how many pictures a prompt success is measured."""

    vae_steps: int = 1500
    clean_steps: int = 2000
    noisy_steps: int = 800
    pairs: int = 60_000
    repeats: int = 8


Pretraining = Callable[[Path, int, Schedule, torch.device], dict[str, Any]]
"""(folder to write, seed, schedule, device) -> the log that is written beside the weights."""


def pretrain(folder: Path, seed: int, schedule: Schedule, device: torch.device) -> dict[str, Any]:
    """Train everything and write it to `folder`; returns the log that is written beside it."""
    start = time.monotonic()
    log: dict[str, Any] = {"seed": seed, "device": device.type, "torch": torch.__version__, "wrong": WRONG}
    vae, log["autoencoder"] = autoencoder.train(schedule.vae_steps, seed, device)
    rng = np.random.default_rng(seed + 1)
    log["lossless"] = lossless(vae, rng)
    torch.manual_seed(seed)
    models = denoiser.build(device)
    log["parameters"] = denoiser.count_parameters(models.transformer)
    phases = (("clean", denoiser.CLEAN, schedule.clean_steps, 5e-3, 0.99), ("noisy", WRONG, schedule.noisy_steps, 1.5e-3, 0.99))
    for label, wrong, steps, lr, ema in phases:
        data = denoiser.make_pairs(schedule.pairs, wrong, vae, models.tokenizer, rng)
        log[label] = denoiser.train(models, data, steps, lr, ema, label)
        log[f"success_{label}"] = {s: measure(models, vae, s, schedule.repeats, seed) for s in ("train", "held_out")}
        print(json.dumps(log[f"success_{label}"]), flush=True)
    log["seconds"] = round(time.monotonic() - start, 1)
    save(models, vae, folder)
    (folder / "pretrain_log.json").write_text(json.dumps(log, indent=1) + "\n")
    return log


def command_line(description: str, make: Pretraining, defaults: Schedule) -> None:
    """Parse the command line of a world's pretraining script, and run it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    for part in fields(Schedule):
        parser.add_argument(f"--{part.name.replace('_', '-')}", type=int, default=getattr(defaults, part.name))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule = Schedule(**{part.name: getattr(options, part.name) for part in fields(Schedule)})
    log = make(options.out, options.seed, schedule, device)
    print(f"wrote {options.out} in {log['seconds']} s: held-out {log['success_noisy']['held_out']}")


if __name__ == "__main__":
    command_line("Pretrain the embedded pipeline.", pretrain, Schedule())
