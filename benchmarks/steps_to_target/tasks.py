"""The tasks of the benchmark: what is trained on, what is held out, and the prompts that learning rates are searched on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.prompts import Prompt, load_prompts, thinned

ROOT = Path(__file__).parent.parent.parent
TRAIN_PROMPTS = 96
SEARCH_HELD_OUT = 64


@dataclass(frozen=True)
class Task:
    """One task. settings: of a `RunConfig`, policy, prompts and reward. check: the key of a reward's detail that is reported
    beside the reward and never trained on. levels: fixed levels of the reward for which costs are reported. samples: pictures
    per evaluation, enough for a standard error of 0.01. iterations: the longest run."""

    name: str
    settings: Mapping[str, Any]
    check: str
    levels: tuple[float, ...]
    samples: int
    iterations: int

    @property
    def source(self) -> str:
        """Where its prompts come from: the embedded world, or a file."""
        named = str(self.settings["prompts"]["source"])
        return named if named == "embedded" else str(ROOT / named)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "compositional",
            {"prompts": {"source": "embedded", "limit": TRAIN_PROMPTS}, "reward": {"name": "scene_strict"}},
            "strict",
            (0.6, 0.7, 0.8, 0.9),
            2560,
            60,
        ),
        Task(
            "strings",
            {
                "policy": {"model": "benchmarks/strings/assets/pipeline", "options": {"max_sequence_length": 0}},
                "prompts": {"source": "benchmarks/strings/prompts.jsonl", "limit": TRAIN_PROMPTS},
                "reward": {"name": "benchmarks.strings.reward:edit_distance"},
            },
            "exact",
            (0.8, 0.85, 0.9, 0.95),
            640,
            60,
        ),
        Task(
            "preference",
            {
                "prompts": {"source": "embedded", "limit": TRAIN_PROMPTS},
                "reward": {"name": "benchmarks.steps_to_target.preference:preference"},
            },
            "strict",
            (0.7, 0.75, 0.8, 0.85),
            640,
            60,
        ),
    )
}


def search_prompts(task: Task, folder: Path) -> Path:
    """A prompt file made of a task's training split, without the prompts that main runs train on: 96 to train, 64 held out.

    Learning rates are chosen on these, so neither the main runs' training prompts nor their held-out ones choose anything.
    """
    path = folder / f"search-{task.name}.jsonl"
    if path.exists():
        return path
    everything = load_prompts(task.source)["train"]
    used = {prompt.prompt_id for prompt in thinned(everything, TRAIN_PROMPTS)}
    free = [prompt for prompt in everything if prompt.prompt_id not in used]
    train = thinned(free, TRAIN_PROMPTS)
    chosen = {prompt.prompt_id for prompt in train}
    held_out = thinned([prompt for prompt in free if prompt.prompt_id not in chosen], SEARCH_HELD_OUT)
    lines = [_line(prompt, "train") for prompt in train] + [_line(prompt, "held_out") for prompt in held_out]
    beside = path.with_suffix(f".{os.getpid()}")  # runs share the file: none may read half of it
    beside.write_text("\n".join(lines) + "\n")
    return beside.replace(path)


def _line(prompt: Prompt, split: str) -> str:
    return json.dumps({"text": prompt.text, "metadata": dict(prompt.metadata), "split": split})
