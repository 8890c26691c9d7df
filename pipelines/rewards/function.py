"""A plain function as a reward: `reward.name: my_module:my_reward`, with nothing to register (docs/new_reward.md)."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opgrpo_data.ids import canonical_json
from pipelines.rewards.base import Media, Score

PARAMETERS = ("media", "prompts", "metadata")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class FunctionReward:
    """Calls `function(media, prompts, metadata, **options)`, which returns B numbers, or Scores."""

    name: str
    version: str
    function: Callable[..., Sequence[Any]]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Sequence[Any]], /, **options: Any) -> FunctionReward:
        """The reward of a function, under its name. Raises ValueError when it does not take the options, or has no version.

        The version is the function's attribute `version`, else a hash of its source file; options add their own hash, for
        with other options the same sample may get another value.
        """
        try:
            inspect.signature(function).bind(*PARAMETERS, **options)
        except TypeError as error:
            raise ValueError(
                f"the reward function {function.__name__} cannot be called with options {options}: {error}"
            ) from None
        version = getattr(function, "version", None)
        version = _source_hash(function) if version is None else version
        if not isinstance(version, str):
            raise ValueError(f"the attribute version of {function.__name__} is {version!r}: make it a text")
        told = f"{version}-{short_hash(canonical_json(options).encode())}" if options else version
        return cls(function.__name__, told, function, options)

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample, of whatever numbers the function returns."""
        return [_score(value) for value in self.function(media, prompts, metadata, **self.options)]


def scores_by_itself(found: Any) -> bool:
    """Whether this is a function that scores: its required positional parameters are media, prompts and metadata.

    A leading underscore (a parameter that is not read) does not count.
    """
    if not inspect.isfunction(found):
        return False
    parameters = inspect.signature(found).parameters.values()
    required = [p.name.lstrip("_") for p in parameters if p.kind in _POSITIONAL and p.default is inspect.Parameter.empty]
    return tuple(required) == PARAMETERS


def short_hash(data: bytes) -> str:
    """Twelve hex digits that name these bytes."""
    return hashlib.sha256(data).hexdigest()[:12]


def _source_hash(function: Callable[..., Any]) -> str:
    """Names the present text of the file that defines the function: whoever edits it has another reward."""
    try:
        return short_hash(Path(inspect.getfile(inspect.unwrap(function))).read_bytes())
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the reward function {function.__name__} has no source file to name its version by: "
            f"give it an attribute version, a text"
        ) from error


def _score(value: Any) -> Score:
    if isinstance(value, Score):
        return value
    if isinstance(value, str | bytes):
        raise TypeError(f"the reward returned {value!r} for a sample: return a number")
    return Score(float(value), {})
