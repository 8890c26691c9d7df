"""Make the pipeline that writes strings from nothing: `python -m benchmarks.strings.pretrain --out DIR --seed N`.

As the embedded pipeline is made: autoencoder, then a clean phase in which every picture is right, then a noisy phase in
which a share is wrong on purpose, so that reinforcement learning has something to raise. Writes a
`StableDiffusion3Pipeline` folder with `pretrain_log.json` beside the weights. Deterministic for a seed, a device and a
thread count.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from benchmarks.strings import reward, world
from pipelines.embedded import autoencoder, denoiser, text
from pipelines.embedded.pretrain import Schedule, command_line, save

MAX_TOKENS = 11
"""Start, `write`, quote, six letters, quote, end."""
WRONG = 0.5
"""Share of wrong pictures in the noisy phase."""
UNRELATED = 0.2
"""Share of the wrong pictures that show another string altogether; the others are near misses."""
FILLED = 0.6
"""Share of the cells that hold a letter in the pictures that the autoencoder learns on."""


def build_tokenizer() -> CLIPTokenizer:
    """`write` and the quote are one token each, as is every letter (another one for the last of a string)."""
    return text.build_tokenizer(world.vocabulary(), world.ALPHABET.lower(), MAX_TOKENS)


def random_pictures(count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) with any letter or none in each cell: more than any prompt asks for."""
    letters = rng.integers(len(world.ALPHABET), size=(count, world.CELLS))
    filled = rng.random((count, world.CELLS)) < FILLED
    return world.render(
        [
            "".join(world.ALPHABET[i] if f else world.BLANK for i, f in zip(*row, strict=True))
            for row in zip(letters, filled, strict=True)
        ]
    )


def cell_pictures() -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) whose top left cell holds each letter once, and as often nothing."""
    return world.render([*world.ALPHABET, *[""] * len(world.ALPHABET)])


def near_miss(string: str, rng: np.random.Generator) -> str:
    """The string with one letter replaced, dropped or doubled, or with two neighbours swapped; never the string itself."""
    while True:
        at = int(rng.integers(len(string)))
        edits = {
            "replaced": string[:at] + world.random_string(1, rng) + string[at + 1 :],
            "dropped": string[:at] + string[at + 1 :],
            "doubled": string[: at + 1] + string[at:],
            "swapped": string[:at] + string[at : at + 2][::-1] + string[at + 2 :],
        }
        if (missed := list(edits.values())[rng.integers(len(edits))]) != string:
            return missed


def make_pairs(
    count: int, wrong: float, vae: AutoencoderKL, tokenizer: CLIPTokenizer, rng: np.random.Generator
) -> denoiser.Pairs:
    """Draw pairs of any string; `wrong` is the share of pictures that do not show what the prompt asks for."""
    asked, shown = [], []
    for index in range(count):
        string = world.random_string(world.LENGTHS[index % len(world.LENGTHS)], rng)
        asked.append(world.text(string))
        if rng.random() >= wrong:
            shown.append(string)
        elif rng.random() < UNRELATED:
            shown.append(world.random_string(int(rng.choice(world.LENGTHS)), rng))
        else:
            shown.append(near_miss(string, rng))
    latents = autoencoder.encode(vae, world.render(shown))
    return denoiser.Pairs(latents, text.tokenize(tokenizer, asked).to(latents.device))


def measure(models: denoiser.Models, vae: AutoencoderKL, split: world.Split, repeats: int, seed: int) -> dict[str, float]:
    """Mean "edit" and "exact", and "exact" by length, ODE sampler with 10 steps, `repeats` pictures a prompt."""
    chosen = world.prompts(split) * repeats
    latents = denoiser.sample(models, [p.text for p in chosen], steps=10, seed=seed)
    texts, known = [p.text for p in chosen], [{"string": p.string} for p in chosen]
    found: dict[str, list[float]] = defaultdict(list)
    for score in reward.exact().score(list(autoencoder.decode(vae, latents)), texts, known):
        found["edit"].append(score.detail["edit"])
        for part in ("exact", score.detail["kind"]):
            found[part].append(score.value)
    return {part: round(float(np.mean(values)), 4) for part, values in found.items()}


def lossless(vae: AutoencoderKL, rng: np.random.Generator, count: int = 2000) -> float:
    """Share of strings that are read unchanged after encoding and decoding."""
    strings = [world.random_string(world.LENGTHS[i % len(world.LENGTHS)], rng) for i in range(count)]
    decoded = autoencoder.decode(vae, autoencoder.encode(vae, world.render(strings)))
    return float(np.mean([found == s for found, s in zip(world.read(decoded), strings, strict=True)]))


SCHEDULE = Schedule(vae_steps=1000, clean_steps=600, noisy_steps=1000, pairs=100_000, repeats=4)


def pretrain(folder: Path, seed: int, schedule: Schedule, device: torch.device) -> dict[str, Any]:
    """Train everything and write it to `folder`; returns the log that is written beside it."""
    start = time.monotonic()
    log: dict[str, Any] = {"seed": seed, "device": device.type, "torch": torch.__version__, "wrong": WRONG}
    vae, log["autoencoder"] = autoencoder.train(schedule.vae_steps, seed, device, draw=random_pictures, cells=cell_pictures())
    rng = np.random.default_rng(seed + 1)
    log["lossless"] = lossless(vae, rng)
    print(f"lossless {log['lossless']}", flush=True)
    torch.manual_seed(seed)
    models = denoiser.build(device, build_tokenizer())
    log["parameters"] = denoiser.count_parameters(models.transformer)
    phases = (("clean", 0.0, schedule.clean_steps, 5e-3, 0.99), ("noisy", WRONG, schedule.noisy_steps, 1.5e-3, 0.99))
    for label, wrong, steps, lr, ema in phases:
        data = make_pairs(schedule.pairs, wrong, vae, models.tokenizer, rng)
        log[label] = denoiser.train(models, data, steps, lr, ema, label)
        log[f"success_{label}"] = {s: measure(models, vae, s, schedule.repeats, seed) for s in world.PER_LENGTH}
        print(json.dumps(log[f"success_{label}"]), flush=True)
    log["seconds"] = round(time.monotonic() - start, 1)
    save(models, vae, folder)
    (folder / "pretrain_log.json").write_text(json.dumps(log, indent=1) + "\n")
    return log


if __name__ == "__main__":
    command_line("Pretrain the pipeline that writes strings.", pretrain, SCHEDULE)
