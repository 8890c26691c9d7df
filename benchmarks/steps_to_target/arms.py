"""The arms of the benchmark: settings that differ from Flow-GRPO's, and the learning rates that are searched for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]

BASE: Settings = {
    "rollout": {"prompts_per_iteration": 8, "group_size": 8, "num_steps": 10, "sampler": "flow_sde", "noise_level": 0.7},
    "train": {"ema_decay": 0.5, "window": 5, "optimizer_steps": 2},
    "eval": {"samples": 1280, "num_steps": 10},
}
"""What all arms share: 64 trajectories an iteration, and the evaluation."""


@dataclass(frozen=True)
class Arm:
    """One way to train. iterations: how far its runs go. like: the arm whose learning rate it takes; its own by default."""

    name: str
    settings: Settings
    iterations: int
    like: str = ""


def merged(*layers: Settings) -> dict[str, Any]:
    """Nested settings laid over each other, later ones on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            nested = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = merged(result[name], value) if nested else (dict(value) if isinstance(value, Mapping) else value)
    return result


def _ablation(name: str, settings: Settings) -> Arm:
    return Arm(name, settings, 30, like="op_grpo")


_ADAPTIVE: Settings = {"truncation": "adaptive", "prefix_steps": 5, "admission": "ess", "proportion": "signal"}
_REUSE: Settings = {"algorithm": "op_grpo", "replay": {"members": 0, "reuse_iterations": 3}, "train": {"optimizer_steps": 8}}
_UNGATED: Settings = {**_REUSE, "replay": {"members": 0, "reuse_iterations": 3, "reuse_ess": 0.0, "correction": "none"}}
_FORWARD: Settings = {"objective": "forward", "forward": {"strength": 0.5}, "optimizer_steps": 8, "lr_by_signal": True}

RATES = (5e-5, 1e-4, 2e-4, 4e-4)
"""The learning rates that are searched, for every arm alike."""

MAIN: tuple[Arm, ...] = (
    Arm("flow_grpo", {"algorithm": "flow_grpo"}, 60),
    Arm("op_grpo", {"algorithm": "op_grpo"}, 60),
    Arm("forward_replay", merged(_REUSE, {"train": _FORWARD}), 60),
    Arm("group_reuse", _REUSE, 60),
    Arm("forward_replay_adaptive", merged(_REUSE, {"prompts": {"order": "regret"}, "train": _FORWARD}), 60),
    Arm("op_grpo_adaptive", {"algorithm": "op_grpo", "replay": _ADAPTIVE}, 60),
    Arm("flow_grpo_8_steps", {"algorithm": "flow_grpo", "train": {"optimizer_steps": 8}}, 60),
)

ABLATIONS: tuple[Arm, ...] = (
    _ablation("correction_none", {"replay": {"correction": "none"}}),
    _ablation("correction_step", {"replay": {"correction": "step"}}),
    _ablation("weights_mean", {"replay": {"weight_reduction": "mean"}}),
    _ablation("truncation_none", {"replay": {"truncation": "none"}}),
    _ablation("selection_random", {"replay": {"selection": "random"}}),
    _ablation("selection_worst", {"replay": {"selection": "worst"}}),
    _ablation("decay_none", {"replay": {"decay": 1.0}}),
    _ablation("epochs_2", {"train": {"epochs": 2}}),
    _ablation("epochs_4", {"train": {"epochs": 4}}),
    *(_ablation(f"members_{n}", {"replay": {"members": n}}) for n in (0, 2, 3, 4, 5, 6, 7)),
    _ablation("members_7_adaptive", {"replay": {**_ADAPTIVE, "members": 7}}),
)

LEVERS: tuple[Arm, ...] = (
    Arm("flow_grpo_signal", {"algorithm": "flow_grpo", "train": {"lr_by_signal": True}}, 60, like="flow_grpo"),
    Arm("group_reuse_signal", merged(_REUSE, {"train": {"lr_by_signal": True}}), 60, like="group_reuse"),
    Arm(
        "forward_replay_no_signal",
        merged(_REUSE, {"train": {**_FORWARD, "lr_by_signal": False}}),
        60,
        like="forward_replay",
    ),
    *(
        Arm(f"group_reuse_last_{n}", merged(_REUSE, {"replay": {"reuse_iterations": n}}), 40, like="group_reuse")
        for n in (1, 7)
    ),
    Arm("group_reuse_ungated", _UNGATED, 40, like="group_reuse"),
    Arm("forward", {"algorithm": "flow_grpo", "train": _FORWARD}, 40, like="forward_replay"),
    Arm(
        "forward_replay_last_7",
        merged(_REUSE, {"replay": {"reuse_iterations": 7}, "train": _FORWARD}),
        40,
        like="forward_replay",
    ),
    Arm("forward_replay_ungated", merged(_UNGATED, {"train": _FORWARD}), 40, like="forward_replay"),
    Arm("group_reuse_regret", {**_REUSE, "prompts": {"order": "regret"}}, 60, like="group_reuse"),
    Arm(
        "fresh_4x",
        {"algorithm": "flow_grpo", "rollout": {"prompts_per_iteration": 32}, "train": {"optimizer_steps": 8}},
        20,
        like="flow_grpo",
    ),
)

ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*MAIN, *ABLATIONS, *LEVERS)}
