"""Models behind rewards, through transformers, from a hub id or a folder: frozen, in eval mode, safetensors only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opgrpo_data import ids
from pipelines import weights
from pipelines.policies.loading import known_dtype, usable_device

CHUNK = 32
"""Pictures per call of a model: bounds the memory that a batch of videos takes."""

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Pretrained:
    """A model with what prepares its inputs. digest: of everything in the three that can change an output."""

    model: Any
    images: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    digest: str

    def pixels(self, pictures: Any) -> dict[str, torch.Tensor]:
        """The image inputs of N pictures (H, W, 3) uint8, on the model's device and in its dtype."""
        inputs = self.images(list(pictures), return_tensors="pt", input_data_format="channels_last")
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }


def load(
    what: str,
    class_name: str,
    model_types: Collection[str],
    source: str,
    *,
    processor: str | None = None,
    text: bool = True,
    unused: tuple[str, ...] = (),
    dtype: str = "float32",
    device: str | None = None,
) -> Pretrained:
    """Load `transformers.<class_name>` from a hub id or folder.

    what: the model in an error's words. model_types: of the config.json, which the class can hold. processor: where image
    processor and tokenizer lie, None beside the model. text: whether there is a tokenizer. unused: prefixes of weights that
    may be missing. Raises ValueError when the source is not there, holds another model, lacks weights or is damaged.
    """
    precision, target = known_dtype(dtype, "reward"), usable_device(device, "reward")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with _reading(what, source):
        # Never the code that a folder or a hub may bring along: transformers would ask on the terminal, and run it.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in model_types:
            raise ValueError(f"it holds a model of type {config.model_type}; name one of {', '.join(sorted(model_types))}")
        model, report = getattr(transformers, class_name).from_pretrained(
            source, dtype=precision, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
        if missing:  # transformers fills them with random numbers
            raise ValueError(f"{len(missing)} of its weights are missing, for example {missing[0]}")
    with _reading(f"processor of the {what}", beside := processor or source):
        # Torchvision's resizing differs from PIL's: a score must not depend on whether it is installed.
        images = transformers.AutoImageProcessor.from_pretrained(beside, backend="pil", trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(beside, trust_remote_code=False) if text else None
    used = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(unused)}
    settings = (
        class_name,
        _content(model.config.to_dict()),
        images.to_dict(),
        tokenizer and tokenizer.backend_tokenizer.to_str(),
    )
    digest = weights.policy_id(used, ids.canonical_json(settings))
    return Pretrained(model.eval().requires_grad_(False).to(target), images, tokenizer, target, precision, digest)


def _content(config: Any) -> Any:
    """A configuration without what only tells where, and by which version, it was written."""
    if not isinstance(config, dict):
        return config
    return {key: _content(value) for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


@contextmanager
def _reading(what: str, source: str) -> Iterator[None]:
    folder, hub = Path(source).is_dir(), HUB_ID.fullmatch(source)
    try:
        if not folder and not hub:
            raise ValueError("there is no such folder")
        yield
    except Exception as error:  # files of others fail in every way there is
        where = "no such folder, and from the hub: " if hub and not folder else ""
        raise ValueError(f"cannot load the {what} {source!r}: {where}{' '.join(str(error).split())}") from error
