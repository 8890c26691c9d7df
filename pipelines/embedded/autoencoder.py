"""The embedded world's autoencoder: a small diffusers AutoencoderKL, 24x24 pixels <-> 8x3x3 latents.

B pictures in a batch, C = 8 latent channels, h = w = 3 latent cells.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipelines.embedded import scenes

LATENT_CHANNELS = 8
NOISE = 0.15
"""Std of the noise on the latents in training: the decoder must forgive the denoiser's small errors."""
PEAK_LR = 8e-3
MAX_OBJECTS = 5
Draw = Callable[[int, np.random.Generator], NDArray[np.uint8]]
"""Draws so many pictures (B, H, W, 3) of a world."""
_OBJECTS = list(itertools.product(scenes.SHAPES, scenes.COLOURS))


def build() -> AutoencoderKL:
    """An untrained autoencoder; the smallest blocks that keep clean scenes lossless."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=scenes.IMAGE_SIZE,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def to_tensor(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(decoded: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) float in [-1, 1] -> (B, H, W, 3) uint8, as diffusers' image processor rounds."""
    scaled = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    rounded: NDArray[np.uint8] = (scaled * 255).round().astype(np.uint8)
    return rounded


@torch.no_grad()
def encode(vae: AutoencoderKL, images: NDArray[np.uint8], chunk: int = 512) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, C, h, w) float32 latents of about unit variance: the posterior's mean, scaled."""
    parts = [vae.encode(to_tensor(images[i : i + chunk], vae.device)).latent_dist.mean for i in range(0, len(images), chunk)]
    latents: Tensor = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, chunk: int = 512) -> NDArray[np.uint8]:
    """(B, C, h, w) scaled latents -> (B, H, W, 3) uint8."""
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    return np.concatenate([to_images(vae.decode(raw[i : i + chunk]).sample) for i in range(0, len(raw), chunk)])


def random_scenes(count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) of scenes with 0 to MAX_OBJECTS objects of any kind: more than any prompt asks for."""
    drawn = []
    for _ in range(count):
        number = int(rng.integers(MAX_OBJECTS + 1))
        chosen = tuple(_OBJECTS[i] for i in rng.integers(len(_OBJECTS), size=number))
        places = rng.choice(scenes.GRID**2, size=number, replace=False)
        drawn.append(scenes.Scene(chosen, tuple((int(p) // scenes.GRID, int(p) % scenes.GRID) for p in places)))
    return scenes.batch(drawn)


def cell_pictures() -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) whose top left cell holds each object once, and as often nothing."""
    objects = [scenes.Scene((o,), ((0, 0),)) for o in _OBJECTS]
    return scenes.batch([*objects, *[scenes.Scene((), ())] * len(_OBJECTS)])


class PatchCode:
    """A linear code of single cells: principal components of the patches in the top left cells of `pictures`.

    It teaches the autoencoder's latent space: every latent cell describes its own 8x8 pixels and no others, which
    a denoiser of width 64 learns far better than a space that the autoencoder finds by itself.
    """

    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        patches = self._patches(pictures)[:, 0, 0]
        self.mean = patches.mean(0)
        _, strength, axes = np.linalg.svd(patches - self.mean, full_matrices=False)
        # Halfway to whitening: shapes are told apart by weak components, which must not drown in the denoiser's error.
        self.basis = axes[:LATENT_CHANNELS].T / strength[:LATENT_CHANNELS] ** 0.5
        self.basis = self.basis / ((patches - self.mean) @ self.basis).std()

    @staticmethod
    def _patches(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, H, W, 3) -> (B, h, w, CELL * CELL * 3), -1..1."""
        cells = images.reshape(-1, scenes.GRID, scenes.CELL, scenes.GRID, scenes.CELL, 3).swapaxes(2, 3)
        return cells.reshape(len(images), scenes.GRID, scenes.GRID, -1).astype(np.float32) / 127.5 - 1

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, C, h, w) float32, about unit variance."""
        codes = (self._patches(images) - self.mean) @ self.basis
        return torch.from_numpy(np.ascontiguousarray(codes.transpose(0, 3, 1, 2), dtype=np.float32))


def train(
    steps: int,
    seed: int,
    device: torch.device,
    batch_size: int = 64,
    draw: Draw = random_scenes,
    cells: NDArray[np.uint8] | None = None,
) -> tuple[AutoencoderKL, list[dict[str, float]]]:
    """Train from nothing; returns the autoencoder in eval mode, and the log (step, seconds, reconstruction, encoding).

    The decoder learns to draw from `PatchCode` of `cells` (by default `cell_pictures()`) plus noise, the encoder to find
    that code. draw: what the pictures to learn on come from.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    vae, code = build().to(device), PatchCode(cell_pictures() if cells is None else cells)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.1)
    start, log = time.monotonic(), []
    for step in range(steps):
        pictures = draw(batch_size, rng)
        images, target = to_tensor(pictures, device), code(pictures).to(device)
        reconstruction = functional.mse_loss(vae.decode(target + NOISE * torch.randn_like(target)).sample, images)
        posterior = vae.encode(images).latent_dist
        width = (posterior.logvar - 2 * math.log(NOISE)).square().mean()
        encoding = functional.mse_loss(posterior.mean, target) + 0.01 * width
        optimizer.zero_grad(set_to_none=True)
        (reconstruction + 0.1 * encoding).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // 10, 1) == 0:
            record = {"reconstruction": round(reconstruction.item(), 5), "encoding": round(encoding.item(), 5)}
            log.append({"step": step + 1, "seconds": round(time.monotonic() - start, 1), **record})
            print(f"autoencoder {log[-1]}", flush=True)
    vae.eval()
    _normalise(vae, draw(4096, rng))
    return vae, log


def _normalise(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> None:
    """Set shift_factor and scaling_factor so that the latents of the pictures have mean 0 and variance 1 overall."""
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode(vae, pictures)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
