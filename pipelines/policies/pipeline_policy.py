"""A diffusers pipeline as a policy: what all families share. Its transformer, or an adapter on it, is what is trained.

The pipeline is loaded without its text encoders. They come when a prompt has no condition yet, and go when all have one.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opgrpo_data import ids
from opgrpo_data.io import Directory
from pipelines.policies.conditions import ConditionStore, batched
from pipelines.policies.family import Condition, Family
from pipelines.policies.fingerprint import fingerprint
from pipelines.policies.loading import Source, find, known_dtype, text_only, usable_device
from pipelines.policies.lora import Lora, add_adapter
from pipelines.policies.outline import outlined
from pipelines.rewards.base import Media

ENCODED_AT_ONCE = 64
"""Prompts per file of conditions."""
REMEMBERED_BYTES = 1024**3
"""Conditions kept in memory, the latest used; the others are read again."""


@dataclass
class PipelinePolicy:
    """One diffusers pipeline and its family. Made by `load_policy`.

    negative_prompt: of the guidance, which is on above 1. dtype: of weights and activations. adapter: what is trained, if not
    all. offload: the autoencoder waits in main memory. encoder_id: names the conditions in a store. model_id, identity: see
    `Policy`.
    """

    source: Source
    architecture: Family
    pipeline: Any
    guidance_scale: float
    negative_prompt: str
    device: torch.device
    dtype: torch.dtype
    adapter: Lora | None
    offload: bool
    model_id: str
    encoder_id: str
    identity: str
    conditions: ConditionStore | None = None
    _recent: OrderedDict[str, Condition] = field(default_factory=OrderedDict, repr=False)
    _text_pipeline: Any = field(default=None, repr=False)

    @property
    def base_model(self) -> str:
        """As the configuration names it."""
        return self.source.model

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.architecture.name

    @property
    def trainable(self) -> nn.Module:
        """The transformer."""
        module: nn.Module = self.pipeline.transformer
        return module

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one trajectory's latent."""
        return self.architecture.latent_shape(self.pipeline)

    def prepare(self, directory: Directory, prompts: Sequence[str]) -> None:
        """Encode what the store has no conditions of, and let the text encoders go."""
        self.conditions = ConditionStore(directory, self.encoder_id)
        missing = self.conditions.missing([self.negative_prompt, *prompts])
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            texts = missing[start : start + ENCODED_AT_ONCE]
            self.conditions.add({text: self._encoded(text) for text in texts})
        self._release_text_encoders()

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of B prompts as `velocity` takes it: with guidance, B rows of the negative prompt before them."""
        texts = [*([self.negative_prompt] * len(prompts) if self.guided else ()), *prompts]
        known = {text: self._condition(text) for text in dict.fromkeys(texts)}
        return batched([known[text] for text in texts])

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance, as diffusers decides it."""
        return self.guidance_scale > 1

    def velocity(
        self, latents: Tensor, sigmas: Tensor, condition: Condition, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """One batched call of the transformer, prompt and negative prompt together."""
        if self.guided:
            latents, sigmas = torch.cat([latents] * 2), torch.cat([sigmas] * 2)
        network = self.trainable if weights is None else _Wearing(self.trainable, weights)
        predicted = self.architecture.predict(self.pipeline, network, latents.to(self.dtype), sigmas, condition)
        if self.guided:
            unguided, guided = predicted.chunk(2)
            predicted = self.architecture.guide(unguided, guided, self.guidance_scale)
        return predicted.to(torch.float32)

    def sigmas(self, num_steps: int) -> NDArray[np.float64]:
        """The family's grid."""
        return self.architecture.sigmas(self.pipeline, num_steps)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Media]:
        """Through the autoencoder, in float32."""
        vae = self.pipeline.vae.to(self.device)
        media = self.architecture.decode(self.pipeline, latents.to(self.device, torch.float32))
        if self.offload:
            vae.to("cpu")
        return media

    def text_pipeline(self) -> Any:
        """The pipeline with its text parts and without an autoencoder, kept until `prepare` is done."""
        if self._text_pipeline is None:
            own = {"transformer": self.pipeline.transformer, "scheduler": self.pipeline.scheduler}
            left_out = text_only(self.source.parts, self.architecture.text_parts)
            self._text_pipeline = self.source.load(self.dtype, **(left_out | own))
            for name in self.architecture.text_parts:
                if isinstance(part := getattr(self._text_pipeline, name, None), nn.Module):
                    part.requires_grad_(False).to(self.device)
        return self._text_pipeline

    def _release_text_encoders(self) -> None:
        if self._text_pipeline is None:
            return
        self._text_pipeline = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _condition(self, text: str) -> Condition:
        if text in self._recent:
            self._recent.move_to_end(text)
            return self._recent[text]
        stored = self.conditions is not None and not self.conditions.missing([text])
        found = self.conditions.read(text) if self.conditions is not None and stored else self._encoded(text)
        self._recent[text] = {name: tensor.to(self.device) for name, tensor in found.items()}
        while len(self._recent) > 1 and sum(map(_size, self._recent.values())) > REMEMBERED_BYTES:
            self._recent.popitem(last=False)
        return self._recent[text]

    @torch.no_grad()
    def _encoded(self, text: str) -> Condition:
        """One prompt at a time: in a batch its encoding would depend, in the last digit, on its neighbours, and a run that
        resumes meets its prompts in another company than one that was never interrupted."""
        return self.architecture.encode(self.text_pipeline(), text, self.device)


@dataclass(frozen=True)
class _Wearing:
    """A module called with other values of some parameters, which it does not keep."""

    module: nn.Module
    weights: Mapping[str, Tensor]

    def __call__(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self.module, dict(self.weights), (), inputs)


def _size(condition: Condition) -> int:
    return sum(tensor.nbytes for tensor in condition.values())


def load_policy(
    model: str,
    family: Family,
    *,
    folder: str | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    outline: bool = False,
    dtype: str = "float32",
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    device: str | None = None,
    lora: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,  # noqa: A002 (as torch names it)
    offload: bool = False,
) -> PipelinePolicy:
    """Load a pipeline of `family` from a folder or hub id.

    folder: where it lies, if `model` is a name of ours. check: raises ValueError when a model_index.json is of no such model.
    outline: shapes only, on the meta device, to count with. dtype: of weights and activations; the autoencoder, adapters and
    transitions are float32 always. device: None takes CUDA where there is one. lora: options of `Lora`; None trains the whole
    transformer. gradient_checkpointing: a block's activations are computed again instead of kept. compile: torch.compile.
    offload: the autoencoder waits in main memory. Raises ValueError when the model is not there or is none of the family.
    """
    _check_kinds({"negative_prompt": negative_prompt}, str)
    _check_kinds({"lora": {} if lora is None else lora}, Mapping)
    _check_kinds({"gradient_checkpointing": gradient_checkpointing, "compile": compile, "offload": offload}, bool)
    precision, target = known_dtype(dtype), torch.device("meta") if outline else usable_device(device)
    if guidance_scale <= 0:
        raise ValueError(f"policy.options.guidance_scale {guidance_scale} must be positive; 1 means no guidance")
    where = folder or model
    source = outlined(model, where, family) if outline else find(model, where, family.pipeline_class, check)
    pipeline = source.load(precision, **dict.fromkeys(family.text_parts))
    adapter = None if lora is None else Lora(**lora)
    _make_trainable(pipeline, adapter, family.lora_targets)
    transformer = pipeline.transformer.to(target)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if compile and not outline:
        transformer.compile()
    policy = PipelinePolicy(
        source,
        family,
        pipeline,
        guidance_scale,
        negative_prompt,
        target,
        precision,
        adapter,
        offload,
        model_id="" if outline else fingerprint(source.folder, [*family.text_parts, "transformer", "vae", "scheduler"]),
        encoder_id="" if outline else _encoder_id(source, family, dtype),
        identity="" if outline else _identity(source, dtype, adapter),
    )
    family.latent_shape(pipeline)  # refuses a size that the model cannot draw
    return policy


def _check_kinds(options: Mapping[str, Any], kind: type) -> None:
    for name, value in options.items():
        if not isinstance(value, kind):
            raise ValueError(f"policy.options.{name} must be {kind.__name__.lower()}, got {value!r}")


def _make_trainable(pipeline: Any, adapter: Lora | None, targets: Sequence[str]) -> None:
    """The whole transformer, or an adapter on it; the autoencoder never."""
    pipeline.vae.requires_grad_(False)
    pipeline.transformer.requires_grad_(adapter is None)
    if adapter is not None:
        add_adapter(pipeline.transformer, adapter, targets)


def _encoder_id(source: Source, family: Family, dtype: str) -> str:
    files = fingerprint(source.folder, family.text_parts, ["transformer/config.json"])
    return f"{family.name}-{ids.derived_seed(files, family.name, dtype, ids.canonical_json(family.encoding)):016x}"


def _identity(source: Source, dtype: str, lora: Lora | None) -> str:
    """ "" for a whole model in float32: its weights say all. An adapter's do not say what they are added to."""
    if lora is None:
        return "" if dtype == "float32" else dtype
    frozen = fingerprint(source.folder, ["transformer"])
    return ids.canonical_json([frozen, dtype, lora.rank, lora.alpha])
