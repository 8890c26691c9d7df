"""Pretraining of the embedded denoiser: rectified flow on pairs of a prompt and a picture, text encoders included.

Two phases. In the first every picture is what its prompt says, until the model is nearly perfect. In the second a share
of the pictures is wrong on purpose (mostly near misses), so that success falls to a level that reinforcement
learning can raise again: the right answer stays the likeliest one, and is there to be sharpened.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.embedded import autoencoder, scenes, text

BATCH = 256
UNRELATED = 0.15
"""Share of the wrong pictures that show another prompt's scene; the others are near misses."""
DRAWN: tuple[scenes.Kind, ...] = ("single", "count", "count", "two", "position", "position")
"""Kinds in the proportion in which training pairs show them: the hard ones come more often."""
APART = scenes.GRID - 1
"""Training pictures keep objects in relation on opposite sides: a clear case teaches the words faster."""
SIGMA_SHIFT = 1.2
"""Mean of the logit of sigma in training. Where things stand is decided at high sigma: with a mean of 0 the model draws
right objects in wrong places, and relations stay at chance for thousands of steps."""
CLEAN: dict[scenes.Kind, float] = dict.fromkeys(scenes.KINDS, 0.0)


@dataclass(frozen=True)
class Models:
    """What is trained together."""

    transformer: SD3Transformer2DModel
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]
    tokenizer: CLIPTokenizer

    def modules(self) -> nn.ModuleList:
        """All trained modules under one roof."""
        return nn.ModuleList([self.transformer, *self.encoders])


@dataclass(frozen=True)
class Pairs:
    """Training pairs: latents (N, C, h, w) float32 and their prompts' token ids (N, L) int64."""

    latents: Tensor
    ids: Tensor


def build(device: torch.device, tokenizer: CLIPTokenizer | None = None) -> Models:
    """Untrained models: 4 joint blocks of width 64, about 0.7 M parameters. tokenizer: by default that of the scenes."""
    tokenizer = text.build_tokenizer() if tokenizer is None else tokenizer
    transformer = SD3Transformer2DModel(
        sample_size=scenes.GRID,
        patch_size=1,
        in_channels=autoencoder.LATENT_CHANNELS,
        out_channels=autoencoder.LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=2 * text.HIDDEN,
        caption_projection_dim=64,
        pooled_projection_dim=2 * text.HIDDEN,
        pos_embed_max_size=scenes.GRID,
        qk_norm="rms_norm",
    )
    encoders = (text.build_encoder(tokenizer), text.build_encoder(tokenizer))
    return Models(transformer.to(device), (encoders[0].to(device), encoders[1].to(device)), tokenizer)


def make_pairs(
    count: int, wrong: Mapping[scenes.Kind, float], vae: AutoencoderKL, tokenizer: CLIPTokenizer, rng: np.random.Generator
) -> Pairs:
    """Draw pairs, kinds as in `DRAWN`; `wrong` is the share of pictures per kind that do not show what the prompt says."""
    drawn, prompts = [], []
    for index in range(count):
        kind = DRAWN[index % len(DRAWN)]
        spec = _any_spec(kind, rng)
        prompts.append(scenes.text(spec, int(rng.integers(8)), bool(rng.integers(2))))
        if rng.random() >= wrong[kind]:
            drawn.append(scenes.sample_scene(spec, rng, APART))
        elif rng.random() < UNRELATED:
            drawn.append(scenes.sample_scene(_any_spec(scenes.KINDS[rng.integers(len(scenes.KINDS))], rng), rng))
        else:
            drawn.append(scenes.near_miss(spec, rng))
    latents = autoencoder.encode(vae, scenes.batch(drawn))
    return Pairs(latents, text.tokenize(tokenizer, prompts).to(latents.device))


def _any_spec(kind: scenes.Kind, rng: np.random.Generator) -> scenes.Spec:
    everything = scenes.specs(kind)
    return everything[rng.integers(len(everything))]


def optimizers(module: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and encoders, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        inner = parameter.ndim == 2 and "embedding" not in name and "proj_out" not in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr * 0.6, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def loss_on(models: Models, latents: Tensor, ids: Tensor) -> Tensor:
    """Rectified-flow loss, x = (1 - sigma) x_0 + sigma eps, logit-normal sigma: mean squared error of the velocity."""
    noise = torch.randn_like(latents)
    sigma = torch.sigmoid(SIGMA_SHIFT + torch.randn(len(latents), device=latents.device))
    at = sigma.view(-1, 1, 1, 1)
    condition = text.encode(models.encoders, ids)
    velocity = models.transformer(
        hidden_states=(1 - at) * latents + at * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=condition.tokens,
        pooled_projections=condition.pooled,
        return_dict=False,
    )[0]
    loss: Tensor = (velocity - (noise - latents)).square().mean()
    return loss


def train(models: Models, pairs: Pairs, steps: int, lr: float, ema: float, label: str) -> list[dict[str, float]]:
    """One phase. Warm-up, then a linear decay to zero; at the end the weights are their own moving average."""
    module = models.modules().train()
    average = deepcopy(module).requires_grad_(False)
    optimizer = optimizers(module, lr)
    base = [group["lr"] for o in optimizer for group in o.param_groups]
    start, log, recent = time.monotonic(), [], 0.0
    for step, index in enumerate(_batches(len(pairs.ids), steps)):
        factor = min((step + 1) / 50, 1.0) * (1 - step / steps)
        for group, value in zip((g for o in optimizer for g in o.param_groups), base, strict=True):
            group["lr"] = value * factor
        loss = loss_on(models, pairs.latents[index], pairs.ids[index])
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for o in optimizer:
            o.step()
        decay = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        recent += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = round(time.monotonic() - start, 1)
            log.append({"step": step + 1, "seconds": seconds, "loss": round(recent / (step % 100 + 1), 5)})
            print(f"{label} {log[-1]}", flush=True)
            recent = 0.0
    module.load_state_dict(average.state_dict())
    module.eval()
    return log


def _batches(size: int, steps: int) -> Iterator[Tensor]:
    """Index batches (BATCH,) int64: epoch after epoch, each in a new order."""
    per_epoch = max(size // BATCH, 1)
    order = torch.randperm(size)
    for step in range(steps):
        if step and step % per_epoch == 0:
            order = torch.randperm(size)
        at = step % per_epoch * BATCH
        yield order[at : at + BATCH]


@torch.no_grad()
def sample(models: Models, prompts: list[str], steps: int, seed: int, chunk: int = 256) -> Tensor:
    """Latents (B, C, h, w) by the ODE sampler on diffusers' grid (1 ... 0.001, 0)."""
    generator = torch.Generator().manual_seed(seed)
    device = models.transformer.device
    sigmas = torch.cat([torch.linspace(1, 1e-3, steps), torch.zeros(1)]).tolist()
    ids = text.tokenize(models.tokenizer, prompts).to(device)
    shape = (len(prompts), autoencoder.LATENT_CHANNELS, scenes.GRID, scenes.GRID)
    noise = torch.randn(shape, generator=generator).to(device)
    done = []
    for rows, x in zip(torch.split(ids, chunk), torch.split(noise, chunk), strict=True):
        condition = text.encode(models.encoders, rows)
        for sigma, following in itertools.pairwise(sigmas):
            velocity = models.transformer(
                hidden_states=x,
                timestep=torch.full((len(x),), 1000 * sigma, device=device),
                encoder_hidden_states=condition.tokens,
                pooled_projections=condition.pooled,
                return_dict=False,
            )[0]
            x = x + (following - sigma) * velocity
        done.append(x)
    return torch.cat(done)


def count_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(math.prod(p.shape) for p in module.parameters())
