"""What a run would do and need, from its configuration alone: trajectories, bytes on disk, memory on the device.

Memory is counted, not measured: the model runs once on torch's meta device, where tensors have shapes and no content, and
what autograd keeps for the backward pass is added up. Workspaces of kernels and fragmentation are not in it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opgrpo_data.locations import NUMPY_DTYPES
from pipelines.config import RunConfig
from pipelines.policies.base import POLICIES
from pipelines.policies.outline import UnknownModelError
from pipelines.policies.pipeline_policy import PipelinePolicy


def estimate(config: RunConfig, trained: int) -> dict[str, Any]:
    """What `run` would do, from the configuration and the iterations that are trained already.

    Raises ValueError when the policy's options are wrong; a model that nobody here knows leaves its bytes unknown.
    """
    rollout, missing = config.rollout, max(config.iterations - trained, 0)
    drawn = 0 if config.algorithm == "offline" else rollout.prompts_per_iteration * rollout.group_size
    trajectories = missing * drawn
    told: dict[str, Any] = {
        "run_id": config.run_id,
        "algorithm": config.algorithm,
        "iterations_done": trained,
        "iterations_to_do": missing,
        "trajectories": trajectories,
        "denoising_steps": trajectories * rollout.num_steps,
        "optimizer_steps": missing * config.train.epochs * config.train.optimizer_steps,
        "evaluation_samples_each": config.eval.samples,
    }
    try:
        policy = POLICIES.build(config.policy.family, model=config.policy.model, outline=True, **config.policy.options)
    except ValueError as error:
        if isinstance(error, UnknownModelError) or isinstance(error.__cause__, TypeError):  # a factory without outlines
            return told | {"bytes": f"unknown: {error}"}
        raise
    if not isinstance(policy, PipelinePolicy):
        return told | {"bytes": f"unknown: policy family {config.policy.family!r} is no diffusers pipeline"}
    return told | disk(config, policy, trajectories) | memory(config, policy)


def disk(config: RunConfig, policy: PipelinePolicy, trajectories: int) -> dict[str, int]:
    """Bytes that a run writes: latents exactly, media at most (lossless pictures and videos are smaller than their pixels)."""
    rollout, shape = config.rollout, policy.latent_shape
    latents = (rollout.num_steps + 1) * math.prod(shape) * np.dtype(NUMPY_DTYPES[rollout.storage_dtype]).itemsize
    condition = policy.architecture.longest(policy.pipeline)
    encoded = sum(_like(tensor, 1, policy.dtype).nbytes for tensor in condition.values())
    return {
        "latents_bytes_each": latents,
        "latents_bytes": latents * trajectories,
        "media_bytes_each_at_most": _pixels(policy) * 3,
        "condition_bytes_each_at_most": encoded,
    }


def _pixels(policy: PipelinePolicy) -> int:
    """Of one sample, all frames."""
    *_, height, width = policy.latent_shape
    if len(policy.latent_shape) == 3:
        return int(height * width * policy.pipeline.vae_scale_factor**2)
    frames = (policy.latent_shape[1] - 1) * policy.pipeline.vae_scale_factor_temporal + 1
    return int(frames * height * width * policy.pipeline.vae_scale_factor_spatial**2)


def memory(config: RunConfig, policy: PipelinePolicy) -> dict[str, int]:
    """Parameters, and bytes on the device while training: weights, what training keeps beside them, and activations."""
    train, parameters = config.train, list(policy.trainable.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    autoencoder = 0 if policy.offload else sum(parameter.nbytes for parameter in policy.pipeline.vae.parameters())
    weights = sum(parameter.nbytes for parameter in parameters) + autoencoder
    counted = sum(parameter.numel() for parameter in trained)
    # In lower precision: float32 masters, and the model's own gradient until it is added to theirs.
    masters = sum(4 * p.numel() + p.nbytes for p in trained if p.dtype != torch.float32)
    moments = 2 * counted * (4 if train.optimizer == "adamw" else 1)
    # Beside the moments, each float32: gradient, average and the base weights; the old policy's, where the objective asks, in
    # the model's precision.
    old = sum(parameter.nbytes for parameter in trained) if train.objective == "forward" or train.ratio_norm else 0
    copies = 3 * 4 * counted + old
    each = train.forward.draws if train.objective == "forward" else (train.window or config.rollout.num_steps)
    pairs = train.pairs_per_pass or train.microbatch * each
    activations = saved_bytes(policy, pairs)
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": counted,
        "weights_bytes": weights,
        "training_state_bytes": masters + moments + copies,
        "activations_bytes": activations,
        "device_bytes_training": weights + masters + moments + copies + activations,
    }


def saved_bytes(policy: PipelinePolicy, pairs: int) -> int:
    """What autograd keeps of one call of the network on so many (trajectory, step) pairs, guidance included.

    With gradient checkpointing that is the blocks' inputs; one block's activations come on top while it is computed again.
    """
    kept = _saved(policy, pairs)
    transformer = policy.pipeline.transformer
    if not getattr(transformer, "is_gradient_checkpointing", False):
        return kept
    transformer.disable_gradient_checkpointing()
    whole = _saved(policy, pairs)
    transformer.enable_gradient_checkpointing()
    blocks = sum(len(module) for module in transformer.children() if isinstance(module, nn.ModuleList))
    return kept + whole // max(blocks, 1)


def _saved(policy: PipelinePolicy, pairs: int) -> int:
    own = {_storage(parameter) for parameter in policy.trainable.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := _storage(tensor)) not in own:
            kept.setdefault(storage, tensor)  # held, so that no later storage gets its address
        return tensor

    condition = policy.architecture.longest(policy.pipeline)
    texts = 2 * pairs if policy.guided else pairs
    batch = {name: _like(tensor, texts, policy.dtype) for name, tensor in condition.items()}
    latents = torch.zeros(pairs, *policy.latent_shape, device="meta")
    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.velocity(latents, torch.ones(pairs, dtype=torch.float64, device="meta"), batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _like(tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`count` times a condition's tensor, as it is encoded: in the model's dtype, unless it counts or masks."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.ones(count, *tensor.shape, dtype=kind, device=tensor.device)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _FusedAttention(TorchFunctionMode):
    """Attention keeps what the fused kernels keep; on the meta device torch would keep whole matrices of tokens by tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            apply: Any = _Attention.apply
            return apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes of an attention: keeps query, key, value, the result, and the log-sum-exp of each query in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Nothing is computed: tensors have no content here."""
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result
