"""The typed configuration of a run: one YAML file, overridden by `--set key=value`, unknown keys refused.

Every model is frozen and validated when built (its sections stand in `settings`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from opgrpo_data import ids
from opgrpo_data.buffer import BufferRule
from opgrpo_data.io import NAME
from opgrpo_data.plan import PlanRule, WeightRule
from pipelines.plain_yaml import parse_yaml
from pipelines.settings import (
    EvalConfig,
    OfflineConfig,
    PolicyConfig,
    PromptsConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TrainConfig,
)

SHOWN = 200
"""Characters of a wrong value that an error shows."""


class ConfigError(ValueError):
    """The configuration is wrong; the message says which key, what was given and what to do."""


class RunConfig(Section):
    """One experiment."""

    name: str = Field(pattern=f"^{NAME.pattern}$", max_length=64)
    seed: int = Field(0, ge=0, lt=2**63)
    algorithm: Literal["op_grpo", "flow_grpo", "offline"] = Field(
        "op_grpo", description="flow_grpo: the same with an empty buffer; offline: nothing is drawn, all comes from the store"
    )
    iterations: int = Field(ge=1)
    policy: PolicyConfig = PolicyConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    offline: OfflineConfig = OfflineConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _make_sense(self) -> RunConfig:
        for refusal in (*_rollout_refusals(self), *_train_refusals(self), *_REFUSALS[self.algorithm](self)):
            raise ValueError(refusal)
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """Every setting that changes what is trained and is not at its default: a longer run of the same settings, or one
        that is evaluated otherwise, is the same run, and so is one made before a setting existed."""
        identity = self.model_dump(mode="json", exclude={"name", "iterations", "eval"}, exclude_defaults=True)
        identity.get("train", {}).pop("keep_states", None)
        if self.algorithm == "flow_grpo":
            identity.pop("replay", None)
        if self.algorithm != "offline":
            identity.pop("offline", None)
        return {name: value for name, value in identity.items() if value != {}}

    @property
    def run_id(self) -> str:
        """Name and hash of `identity`."""
        return ids.run_id(self.name, self.identity)

    @property
    def judges_stored(self) -> bool:
        """Whether the old policy judges stored trajectories that join a batch whole: how far they may be trusted, and their
        weights. The forward objective of an offline run compares stored samples with one another, and asks for neither."""
        if self.algorithm == "offline":
            return self.train.objective == "clipped"
        return self.replay.reuse_iterations > 0

    @property
    def eval_reward(self) -> RewardConfig:
        """The reward that evaluations use."""
        return self.eval.reward or self.reward

    @property
    def buffer_rule(self) -> BufferRule:
        """The part of the configuration that the replay buffer needs. It keeps an entry even where none is replayed: the
        order of prompts may ask what has been reached."""
        replay = self.replay
        seed = ids.derived_seed(self.seed, "buffer")
        return BufferRule(replay.decay, replay.decay_form, replay.selection, max(replay.members, 1), seed)

    def plan_rule(self, iteration: int) -> PlanRule:
        """The part of the configuration that the plan of `iteration` needs."""
        replay, train = self.replay, self.train
        return PlanRule(
            advantage_parts=train.advantage_parts,
            advantage_std=train.advantage_std,
            advantage_clip=train.advantage_clip,
            weight=WeightRule(
                correction=replay.correction,
                reduction=replay.weight_reduction,
                variance_budget=replay.variance_budget,
                lowest=replay.weight_min,
                highest=replay.weight_max,
                normalised=replay.weight_normalised,
            ),
            reuse_ess=replay.reuse_ess,
            epochs=train.epochs,
            optimizer_steps=train.optimizer_steps,
            lr_by_signal=train.lr_by_signal,
            microbatch=train.microbatch,
            window=train.window,
            step_fraction=train.step_fraction,
            objective=train.objective,
            seed=ids.derived_seed(self.seed, "plan", iteration),
        )


def _rollout_refusals(config: RunConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.sampler == "flow_cps" and rollout.noise_level >= 1:
        yield f"rollout.noise_level {rollout.noise_level} must be below 1 for flow_cps"
    if rollout.sampler in ("flow_cps", "wan_sde") and rollout.num_steps == 1:
        yield f"rollout.num_steps 1: the only step of {rollout.sampler} would have no noise, hence no density; take at least 2"


def _train_refusals(config: RunConfig) -> Iterator[str]:
    rollout, train = config.rollout, config.train
    members = rollout.prompts_per_iteration * rollout.group_size
    if train.optimizer_steps > members:
        yield f"train.optimizer_steps {train.optimizer_steps} exceeds the {members} trajectories there are"
    if train.objective == "forward" and (train.ratio_norm or train.kl_beta > 0 or train.step_fraction < 1):
        yield (
            "train.objective forward has no ratios and no denoising steps: leave train.ratio_norm, train.kl_beta and "
            "train.step_fraction at their defaults"
        )
    if train.advantage_parts != "sum" and config.reward.name != "composite":
        yield (
            f"train.advantage_parts {train.advantage_parts} normalises the parts of a composite reward, and reward.name is "
            f"{config.reward.name}: list them in a composite, or leave it at sum"
        )
    if isinstance(train.step_weight, list) and len(train.step_weight) != rollout.num_steps:
        yield f"train.step_weight lists {len(train.step_weight)} weights for {rollout.num_steps} denoising steps"


def _offline_refusals(config: RunConfig) -> Iterator[str]:
    if config.replay.reuse_iterations:
        yield "replay.reuse_iterations joins past groups to those drawn now, and algorithm offline draws none: leave it at 0"
    if config.replay.import_buffer is not None:
        yield "replay.import_buffer fills a replay buffer, which algorithm offline has not: use `opgrpo import`, then its store"
    if config.prompts.order == "regret":
        yield "prompts.order regret reads the replay buffer, which algorithm offline has not: leave it at laps"
    yield from _weight_refusals(config)


def _on_policy_refusals(config: RunConfig) -> Iterator[str]:
    if config.replay.reuse_iterations:
        yield "replay.reuse_iterations is off-policy: set algorithm to op_grpo (and replay.members to 0 for group reuse alone)"
    if config.replay.import_buffer is not None:
        yield "replay.import_buffer fills the replay buffer, which flow_grpo leaves empty: set algorithm to op_grpo"
    if config.prompts.order == "regret":
        yield "prompts.order regret reads the replay buffer, which flow_grpo leaves empty: set algorithm to op_grpo"


def _replay_refusals(config: RunConfig) -> Iterator[str]:
    rollout, replay = config.rollout, config.replay
    if replay.members >= rollout.group_size:
        most = rollout.group_size - 1
        yield f"replay.members {replay.members} leaves no fresh member in a group of {rollout.group_size}: at most {most}"
    if replay.truncation != "none" and replay.prefix_steps >= rollout.num_steps:
        yield (
            f"replay.prefix_steps {replay.prefix_steps} must be smaller than rollout.num_steps {rollout.num_steps}: "
            f"the old policy has to draw a tail (to replay whole trajectories, set replay.truncation to none)"
        )
    if replay.truncation == "adaptive" and replay.prefix_min > replay.prefix_steps:
        yield f"replay.prefix_min {replay.prefix_min} is above replay.prefix_steps {replay.prefix_steps}"
    if replay.decay_form == "multiplicative" and not 0 < replay.decay <= 1:
        yield f"replay.decay {replay.decay} must lie in (0, 1] when decay_form is multiplicative"
    yield from _weight_refusals(config)


def _weight_refusals(config: RunConfig) -> Iterator[str]:
    replay = config.replay
    if replay.weight_min > replay.weight_max:
        yield f"replay.weight_min {replay.weight_min} is above replay.weight_max {replay.weight_max}"
    if replay.correction != "sequence" and (replay.weight_normalised or replay.variance_budget is not None):
        yield (
            f"replay.correction {replay.correction} has no importance weights to normalise or to damp: "
            f"leave replay.weight_normalised and replay.variance_budget at their defaults, or correct by sequence"
        )
    if replay.correction == "step" and config.train.objective == "forward":
        yield "replay.correction step puts the behaviour policy into the ratio, of which train.objective forward has none"
    if replay.correction == "step" and config.train.ratio_norm:
        yield "train.ratio_norm centres the ratio on the old policy, replay.correction step on the behaviour policy: choose one"


_REFUSALS = {"op_grpo": _replay_refusals, "flow_grpo": _on_policy_refusals, "offline": _offline_refusals}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), validate.

    Raises ConfigError with one line that names every wrong key or value, the nearest known key, and the file.
    """
    try:
        document = parse_yaml(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(document).__name__}")
    for override in overrides:
        _apply(document, override)
    return build_config(document, str(path))


def build_config(document: Mapping[str, Any], where: str) -> RunConfig:
    """Validate a configuration given as nested mappings. Raises ConfigError as `load_config` does."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors(include_url=False))
        raise ConfigError(f"{where}: {problems}") from error


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override!r}: expected key=value, for example train.lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section")
    try:
        document[last] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"--set {override[:SHOWN]!r}: the value is not YAML: {error}") from error


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = _shortened(".".join(location))
    if key == "rollout.sampler" and problem["input"] == "ode":
        return "rollout.sampler: ode has no noise, hence no density and no ratio to train with; evaluation uses it by itself"
    if problem["type"] != "extra_forbidden":
        given = "" if problem["type"] in ("missing", "value_error") else f", got {_shortened(repr(problem['input']))}"
        said = str(problem["msg"]).removeprefix("Value error, ")
        return f"{key}: {said}{given}" if key else said
    known = list(_known_keys(RunConfig))
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        by_last_part[name] for name in difflib.get_close_matches(location[-1], by_last_part, n=1)
    ]
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *get_args(field.annotation)):  # `RewardConfig | None` holds a section too
            if isinstance(part, type) and issubclass(part, Section):
                yield from _known_keys(part, f"{prefix}{name}.")
