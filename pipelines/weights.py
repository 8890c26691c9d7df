"""Weights as bytes: policy ids, safetensors in and out. A policy's weights are its trainable parameters by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from opgrpo_data import ids

Weights = Mapping[str, Tensor]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def masters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name, float32: the trainable parameters themselves where they are float32, else copies.

    In lower precision a small update of a weight would be rounded away.
    """
    return {
        name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().to(torch.float32))
        for name, parameter in trainable(module).items()
    }


def policy_id(weights: Weights, identity: str = "") -> str:
    """The hash of names, dtypes, shapes and bytes, in the order of the names, and of what the weights do not say
    (`Policy.identity`)."""
    digest = _digest(weights)
    return ids.weights_id(hashlib.blake2b(digest + identity.encode()).digest() if identity else digest)


def _digest(weights: Weights) -> bytes:
    digest = hashlib.blake2b()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def to_bytes(weights: Weights, path: str) -> bytes:
    """Serialise as safetensors. Its metadata tell `digest`: one of the content, as the format itself has no checksum, and,
    behind a space, the path in the store that the file is for. One key alone: several would be written in any order."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return bytes(safetensors.torch.save(tensors, metadata={"digest": f"{_digest(tensors).hex()} {path}"}))


def from_bytes(data: bytes, path: str) -> dict[str, Tensor]:
    """The inverse of `to_bytes`. Raises ValueError when the bytes are damaged, or are those of another file."""
    try:
        loaded: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy") from error
    # The header was valid, so it is: 8 bytes of length, then that much JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    expected, _, meant = header.get("__metadata__", {}).get("digest", "").partition(" ")
    found = _digest(loaded).hex()
    if expected != found:
        raise ValueError(f"{path} is damaged: expected digest {expected}, found {found}. Restore it from a copy")
    if meant not in ("", path):  # files of format 1.1 do not tell
        raise ValueError(f"{path} is another file, that of {meant}. Restore it from a copy")
    return loaded


@torch.no_grad()
def copy_into(module: nn.Module, weights: Weights) -> None:
    """Copy weights into a module's trainable parameters. Raises ValueError when names or shapes do not match."""
    copy_onto(trainable(module), weights)


@torch.no_grad()
def copy_onto(parameters: Mapping[str, Tensor], weights: Weights) -> None:
    """Copy weights onto tensors of the same names and shapes, in these tensors' dtypes. Raises ValueError when they differ."""
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))
        raise ValueError(f"these weights are of another model: {len(odd)} parameter names differ, for example {odd[0]!r}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"these weights are of another model: {name} is {tuple(weights[name].shape)} there and "
                f"{tuple(parameter.shape)} here"
            )
        parameter.copy_(weights[name])
