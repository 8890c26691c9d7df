"""Diffusers pipelines from folders and hubs: in parts, safetensors only, with errors that a user can act on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """Where a pipeline lies. model: as the user named it. folder: on this machine. parts: its model_index.json."""

    model: str
    folder: Path
    pipeline_class: Any
    parts: Mapping[str, Any]

    @property
    def absent(self) -> dict[str, None]:
        """Components that the pipeline was saved without (often the T5 encoder): diffusers wants them named again."""
        return {name: None for name, part in self.parts.items() if isinstance(part, list) and part[0] is None}

    def load(self, dtype: torch.dtype, **components: Any) -> Any:
        """The pipeline; `components` are taken as given (None: not loaded). The autoencoder is float32 always: in lower
        precision its pictures change, and it is small. Raises ValueError."""
        try:
            pipeline = self.pipeline_class.from_pretrained(
                self.folder, dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True, **(self.absent | components)
            )
        except (OSError, ValueError, AttributeError) as error:
            raise _unusable(self.pipeline_class.__name__, self.model, error) from error
        for module in (part for part in pipeline.components.values() if isinstance(part, nn.Module)):
            module.eval()
        return pipeline


def find(model: str, folder: str, class_name: str, check: Callable[[Mapping[str, Any]], None] | None = None) -> Source:
    """The pipeline in `folder`, a local one or a hub id. Raises ValueError when it is not there, of another class, or `check`
    refuses its model_index.json."""
    quiet_libraries()
    import diffusers

    pipeline_class = getattr(diffusers, class_name)
    try:
        parts = pipeline_class.load_config(folder)
        if parts.get("_class_name") != class_name:
            raise ValueError(f"it is a {parts.get('_class_name')}, not a {class_name}: choose another policy.family")
        if check is not None:
            check(parts)
        local = folder if Path(folder).is_dir() else pipeline_class.download(folder, use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:
        raise _unusable(class_name, model, error) from error
    return Source(model, Path(local), pipeline_class, parts)


def _unusable(class_name: str, model: str, error: Exception) -> ValueError:
    return ValueError(f"cannot load the {class_name} {model!r}: {' '.join(str(error).split())}")


def usable_device(device: str | None, owner: str = "policy") -> torch.device:
    """The device of that name; None takes CUDA where there is one. Raises ValueError that names `owner`'s option when it
    cannot be used."""
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"{owner}.options.device {device!r} cannot be used: {' '.join(str(error).split())}") from error
    return target


def known_dtype(dtype: str, owner: str = "policy") -> torch.dtype:
    """The dtype of that name. Raises ValueError that names `owner`'s option for one that no model here runs in."""
    if dtype not in DTYPES:
        raise ValueError(f"{owner}.options.dtype {dtype!r}: choose one of {sorted(DTYPES)}")
    return DTYPES[dtype]


def text_only(parts: Mapping[str, Any], text_parts: Sequence[str]) -> dict[str, None]:
    """The components to leave out for a pipeline that has its text parts and nothing else."""
    return {name: None for name, part in parts.items() if isinstance(part, list) and name not in text_parts}


def quiet_libraries() -> None:
    """Silence the bars and notices of transformers and diffusers, which would bury ours: before diffusers is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is installed
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
