"""The typed configuration of a run: one YAML file, overridden by `--set key=value`, unknown keys refused.

Every model is frozen and validated when built. Units and the meaning of None stand beside each field.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from opgrpo_data import ids
from opgrpo_data.buffer import BufferRule
from opgrpo_data.io import NAME
from opgrpo_data.plan import PlanRule

Beta = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """The configuration is wrong; the message says which key, what was given and what to do."""


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, and Python counts true as 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError(f"expected {annotation}, got the truth value {value}")
        return value


class PolicyConfig(Section):
    """Which model is trained."""

    family: str = Field("sd3", description="registered policy family, or module:attribute of your own")
    model: str = Field("embedded", description="'embedded' (shipped in the package), a hub id, or a local folder")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the family's factory")

    @field_validator("options")
    @classmethod
    def _model_stands_beside(cls, options: dict[str, Any]) -> dict[str, Any]:
        if "model" in options:
            raise ValueError("give the model as policy.model, not among the options")
        return options


class PromptsConfig(Section):
    """Where prompts come from."""

    source: str = Field("embedded", description="'embedded', or a .jsonl file of {text, metadata, split}")
    limit: int | None = Field(None, ge=1, description="train on so many prompts, evenly spaced over the source; None: all")


class RolloutConfig(Section):
    """How trajectories are drawn."""

    prompts_per_iteration: int = Field(8, ge=1, description="groups per iteration")
    group_size: int = Field(8, ge=2, description="members per group, G")
    num_steps: int = Field(10, ge=1, description="denoising steps, T")
    sampler: Literal["flow_sde", "flow_cps", "dance_sde"] = "flow_sde"
    noise_level: float = Field(0.7, gt=0, description="a of flow_sde, a of flow_cps, eta of dance_sde")
    storage_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="dtype of stored latents")
    shared_initial_noise: bool = Field(True, description="all fresh members of a group start from the same x_0")
    groups_per_shard: int = Field(8, ge=1, description="a shard is the unit of work that is retried")
    batch_size: int = Field(64, ge=1, description="trajectories per forward pass")
    media_format: Literal["png", "webp"] = Field("png", description="lossless either way")


class ReplayConfig(Section):
    """How old trajectories come back (op_grpo only)."""

    prefix_steps: int = Field(3, ge=1, description="K: denoising steps kept of a replayed trajectory")
    decay: float = Field(0.97, ge=0, description="reward decay per iteration of age")
    decay_form: Literal["multiplicative", "linear"] = "multiplicative"
    weight_min: float = Field(0.0, ge=0, description="lower cut of the importance weight")
    weight_max: float = Field(2.0, gt=0, description="upper cut of the importance weight")
    weight_reduction: Literal["sum", "mean"] = Field("sum", description="log w over latent elements; sum: true densities")


class RewardConfig(Section):
    """What trajectories are scored by."""

    name: str = Field("scene_strict", description="registered reward, or module:attribute of your own")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the reward's factory")
    batch_size: int = Field(64, ge=1, description="samples per call")


class TrainConfig(Section):
    """How the policy is updated."""

    lr: float = Field(2e-4, gt=0, description="AdamW learning rate")
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer_steps: int = Field(2, ge=1, description="updates per iteration")
    microbatch: int = Field(64, ge=1, description="trajectories per forward pass")
    window: int | None = Field(5, ge=1, description="train only the first so many denoising steps; None: all")
    step_weight: Literal["transition_std", "uniform"] = Field("transition_std", description="weight of a step's loss")
    advantage_std: Literal["group", "global"] = "group"
    advantage_clip: float = Field(5.0, gt=0)
    clip_low: float = Field(1e-2, gt=0, lt=1, description="ratio clip: 1 - clip_low")
    clip_high: float = Field(1e-2, gt=0, description="ratio clip: 1 + clip_high")
    ratio_reduction: Literal["mean", "sum"] = Field("mean", description="log-ratio over latent elements")
    kl_beta: float = Field(0.0, ge=0, description="weight of KL(current || reference); 0: no reference policy")
    ema_decay: float = Field(0.9, ge=0, lt=1, description="per iteration; evaluation uses the averaged weights")
    keep_states: int = Field(2, ge=2, description="training states kept on disk, newest first")


class EvalConfig(Section):
    """How held-out quality is measured: ODE sampler, fixed noise."""

    every: int | None = Field(None, ge=1, description="iterations between evaluations; None: only before and after")
    samples: int = Field(512, ge=1, description="pictures, dealt evenly over the held-out prompts")
    num_steps: int = Field(10, ge=1, description="denoising steps")
    batch_size: int = Field(128, ge=1, description="trajectories per forward pass")
    reward: RewardConfig | None = Field(None, description="None: the reward that is trained on")
    seed: int = Field(0, ge=0, description="of the evaluation noise: the same for every policy")


class RunConfig(Section):
    """One experiment."""

    name: str = Field(pattern=f"^{NAME.pattern}$", max_length=64)
    seed: int = Field(0, ge=0, lt=2**63)
    algorithm: Literal["op_grpo", "flow_grpo"] = Field("op_grpo", description="flow_grpo: the same with an empty buffer")
    iterations: int = Field(ge=1)
    policy: PolicyConfig = PolicyConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    replay: ReplayConfig = ReplayConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _make_sense(self) -> RunConfig:
        rollout, replay, train = self.rollout, self.replay, self.train
        if self.algorithm == "op_grpo" and replay.prefix_steps >= rollout.num_steps:
            raise ValueError(
                f"replay.prefix_steps {replay.prefix_steps} must be smaller than rollout.num_steps {rollout.num_steps}: "
                f"the old policy has to draw a tail"
            )
        if replay.weight_min > replay.weight_max:
            raise ValueError(f"replay.weight_min {replay.weight_min} is above replay.weight_max {replay.weight_max}")
        if replay.decay_form == "multiplicative" and not 0 < replay.decay <= 1:
            raise ValueError(f"replay.decay {replay.decay} must lie in (0, 1] when decay_form is multiplicative")
        if rollout.sampler == "flow_cps" and rollout.noise_level >= 1:
            raise ValueError(f"rollout.noise_level {rollout.noise_level} must be below 1 for flow_cps")
        members = rollout.prompts_per_iteration * rollout.group_size
        if train.optimizer_steps > members:
            raise ValueError(f"train.optimizer_steps {train.optimizer_steps} exceeds the {members} trajectories there are")
        return self

    @property
    def run_id(self) -> str:
        """Name and hash of every setting that changes what is trained: a longer run of the same settings, or one that is
        evaluated otherwise, is the same run."""
        identity = self.model_dump(
            mode="json", exclude={"name": True, "iterations": True, "eval": True, "train": {"keep_states"}}
        )
        if self.algorithm == "flow_grpo":
            del identity["replay"]
        return ids.run_id(self.name, identity)

    @property
    def eval_reward(self) -> RewardConfig:
        """The reward that evaluations use."""
        return self.eval.reward or self.reward

    @property
    def buffer_rule(self) -> BufferRule:
        """The part of the configuration that the replay buffer needs."""
        return BufferRule(self.replay.decay, self.replay.decay_form)

    def plan_rule(self, iteration: int) -> PlanRule:
        """The part of the configuration that the plan of `iteration` needs."""
        return PlanRule(
            advantage_std=self.train.advantage_std,
            advantage_clip=self.train.advantage_clip,
            weight_reduction=self.replay.weight_reduction,
            weight_min=self.replay.weight_min,
            weight_max=self.replay.weight_max,
            optimizer_steps=self.train.optimizer_steps,
            microbatch=self.train.microbatch,
            window=self.train.window,
            seed=ids.derived_seed(self.seed, "plan", iteration),
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), validate.

    Raises ConfigError with one line that names every wrong key or value, the nearest known key, and the file.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
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
        document[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] != "extra_forbidden":
        given = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
        return f"{key}: {problem['msg']}{given}" if key else str(problem["msg"]).removeprefix("Value error, ")
    known = list(_known_keys(RunConfig))
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        by_last_part[name] for name in difflib.get_close_matches(location[-1], by_last_part, n=1)
    ]
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *get_args(field.annotation)):  # `RewardConfig | None` holds a section too
            if isinstance(part, type) and issubclass(part, Section):
                yield from _known_keys(part, f"{prefix}{name}.")
