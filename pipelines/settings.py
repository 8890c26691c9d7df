"""The sections of a configuration: typed, frozen, closed to unknown keys.

Units and the meaning of None stand beside each field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationInfo, field_validator

from opgrpo_data.buffer import SELECTIONS, check_selection

Beta = Annotated[float, Field(ge=0, lt=1)]


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
        if ours := sorted({"folder", "check", "outline"} & options.keys()):
            raise ValueError(f"{ours[0]} is no option: it is what families give to their loader")
        return options


class PromptsConfig(Section):
    """Where prompts come from."""

    source: str = Field("embedded", description="'embedded', or a .jsonl file of {text, metadata, split}")
    limit: int | None = Field(None, ge=1, description="train on so many prompts, evenly spaced over the source; None: all")
    order: Literal["laps", "regret"] = Field(
        "laps", description="laps: each as often; regret: where replay did better than now"
    )
    regret_floor: float = Field(0.1, gt=0, le=1, description="weight of a prompt without regret, when the largest regret is 1")


class RolloutConfig(Section):
    """How trajectories are drawn."""

    prompts_per_iteration: int = Field(8, ge=1, description="groups per iteration")
    group_size: int = Field(8, ge=2, description="members per group, G")
    num_steps: int = Field(10, ge=1, description="denoising steps, T")
    sampler: Literal["flow_sde", "flow_cps", "dance_sde", "wan_sde"] = "flow_sde"
    noise_level: float = Field(
        0.7, gt=0, description="a of flow_sde, flow_cps and wan_sde (Flow-GRPO's Wan: 1), eta of dance_sde"
    )
    storage_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="dtype of stored latents")
    shared_initial_noise: bool = Field(True, description="all fresh members of a group start from the same x_0")
    groups_per_shard: int = Field(8, ge=1, description="a shard is the unit of work that is retried")
    batch_size: int = Field(64, ge=1, description="trajectories per forward pass")
    media_format: Literal["png", "webp"] = Field("png", description="of images, lossless either way; videos are mp4")


class ReplayConfig(Section):
    """How old trajectories come back (op_grpo only): members of groups that continue a stored prefix, and whole past groups."""

    members: int = Field(1, ge=0, description="continuations per group, where the buffer has as many entries for the prompt")
    selection: str = Field("best", description=f"what the buffer keeps: one of {SELECTIONS}, or SQL over `entries`")
    decay: float = Field(0.97, ge=0, description="reward decay per iteration of age; 1 (multiplicative) or 0 (linear): none")
    decay_form: Literal["multiplicative", "linear"] = "multiplicative"
    truncation: Literal["fixed", "adaptive", "none"] = Field(
        "fixed", description="fixed: K steps; adaptive: as many, up to K, as keep ess_floor; none: all T, nothing is drawn anew"
    )
    prefix_steps: int = Field(3, ge=1, description="K: denoising steps kept of a replayed trajectory")
    prefix_min: int = Field(1, ge=1, description="the shortest prefix that adaptive truncation keeps")
    ess_floor: float = Field(0.5, gt=0, lt=1, description="predicted effective sample size that a prefix must leave")
    admission: Literal["always", "ess"] = Field(
        "always", description="ess: an entry below ess_floor gives its place to a fresh member"
    )
    proportion: Literal["fixed", "signal"] = Field(
        "fixed", description="signal: replay only what differs from the prompt's last fresh rewards by more than their std"
    )
    correction: Literal["sequence", "step", "none"] = Field(
        "sequence",
        description="sequence: weight per trajectory; step (ablation): behaviour policy inside the clipped ratio; none",
    )
    weight_min: float = Field(0.0, ge=0, description="lower cut of the importance weight")
    weight_max: float = Field(2.0, gt=0, description="upper cut of the importance weight")
    weight_reduction: Literal["sum", "mean"] = Field("sum", description="log w over latent elements; sum: true densities")
    weight_normalised: bool = Field(False, description="divide off-policy weights by their mean over the batch")
    variance_budget: float | None = Field(None, ge=0, description="damp log w to this predicted variance; None: no damping")
    import_buffer: str | None = Field(None, description="another store, whose last buffers are replayed from the start")
    reuse_iterations: int = Field(0, ge=0, description="group reuse: the groups of so many past iterations join the batch")
    reuse_ess: float = Field(0.37, ge=0, lt=1, description="a reused member trains its longest prefix above this; 0: all of it")

    @field_validator("import_buffer")
    @classmethod
    def _one_name(cls, url: str | None) -> str | None:
        """A local store has one name, whichever folder it is named from."""
        return url if url is None or "://" in url else str(Path(url).resolve())

    @field_validator("selection")
    @classmethod
    def _known_or_sql(cls, selection: str) -> str:
        check_selection(selection)
        return selection


class RewardConfig(Section):
    """What trajectories are scored by."""

    name: str = Field("scene_strict", description="registered reward, or module:attribute of your own")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the reward's factory")
    batch_size: int = Field(64, ge=1, description="samples per call")
    # Left out of what is stored and compared: it changes how fast a run is scored, not what it is.
    workers: int = Field(0, ge=0, exclude=True, description="processes that score for `opgrpo score`; 0: this one")


class ForwardConfig(Section):
    """The forward-process objective (DiffusionNFT, arXiv 2509.16117), for train.objective `forward`."""

    draws: int = Field(4, ge=1, description="noise levels drawn per sample and optimizer step")
    sigma_shift: float = Field(0.8, description="mean of logit(sigma); its standard deviation is 1")
    strength: float = Field(1.0, gt=0, description="beta: how far the implicit policies lie from the old one")
    advantage_scale: float = Field(2.0, gt=0, description="an advantage of this size counts as certainly good")


class OfflineConfig(Section):
    """What an offline run trains on (algorithm offline only): stored trajectories that fit, chosen once, when it begins."""

    selection: str | None = Field(
        None, description="one SELECT of trajectory_id over `entries`, the trajectories that fit; None: all of them"
    )

    @field_validator("selection")
    @classmethod
    def _one_select(cls, selection: str | None) -> str | None:
        if selection in SELECTIONS:
            raise ValueError(f"{selection} is a rule of the replay buffer; give SQL, one SELECT over the table entries")
        if selection is not None:
            check_selection(selection, "offline.selection")
        return selection


class TrainConfig(Section):
    """How the policy is updated."""

    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: moments in 8 bits (extra `8bit`)")
    lr: float = Field(2e-4, gt=0, description="learning rate")
    lr_by_signal: bool = Field(False, description="scale lr by the share of an iteration's groups whose rewards differ")
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    objective: Literal["clipped", "forward"] = Field(
        "clipped", description="clipped: ratios of transitions (OP-GRPO); forward: stored samples noised anew, no ratios"
    )
    forward: ForwardConfig = ForwardConfig()
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer_steps: int = Field(2, ge=1, description="updates per epoch")
    epochs: int = Field(1, ge=1, description="how often an iteration goes through its batch")
    microbatch: int = Field(64, ge=1, description="trajectories read at a time")
    pairs_per_pass: int | None = Field(
        None, ge=1, description="(trajectory, step) pairs per forward and backward pass; None: all that were read"
    )
    window: int | None = Field(5, ge=1, description="train only the first so many denoising steps; None: all")
    step_fraction: float = Field(1.0, gt=0, le=1, description="random share of those steps that each trajectory trains")
    step_weight: Literal["transition_std", "uniform", "inverse_step"] | list[PositiveFloat] = Field(
        "transition_std", description="weight of a step's loss: s_k, equal, 1/d_k (GRPO-Guard's), or a list of T numbers"
    )
    advantage_parts: Literal["sum", "zscore", "gdpo"] = Field(
        "sum", description="composite rewards: sum the parts, their z-scores over the batch, or their advantages (GDPO)"
    )
    advantage_std: Literal["group", "global"] = "group"
    advantage_clip: float = Field(5.0, gt=0)
    clip_low: float = Field(1e-2, gt=0, lt=1, description="ratio clip: 1 - clip_low")
    clip_high: float = Field(1e-2, gt=0, description="ratio clip: 1 + clip_high")
    ratio_reduction: Literal["mean", "sum"] = Field("mean", description="log-ratio over latent elements")
    ratio_norm: bool = Field(
        False, description="RatioNorm: log-ratio without its bias, in units of s_k (one more forward pass)"
    )
    kl_beta: float = Field(0.0, ge=0, description="weight of KL(current || reference); 0: no reference policy")
    ema_decay: float = Field(0.9, ge=0, lt=1, description="per update of the average; evaluation uses the averaged weights")
    ema_every: int = Field(1, ge=1, description="iterations between updates of the average")
    keep_states: int = Field(2, ge=2, description="training states kept on disk, newest first")


class EvalConfig(Section):
    """How held-out quality is measured: ODE sampler, fixed noise."""

    every: int | None = Field(None, ge=1, description="iterations between evaluations; None: only before and after")
    samples: int = Field(512, ge=1, description="pictures, dealt evenly over the held-out prompts")
    num_steps: int = Field(10, ge=1, description="denoising steps")
    batch_size: int = Field(128, ge=1, description="trajectories per forward pass")
    reward: RewardConfig | None = Field(None, description="None: the reward that is trained on")
    seed: int = Field(0, ge=0, description="of the evaluation noise: the same for every policy")

    @field_validator("reward")
    @classmethod
    def _judged_here(cls, reward: RewardConfig | None) -> RewardConfig | None:
        if reward is not None and reward.workers:
            raise ValueError("evaluation scores in its own process: leave eval.reward.workers at 0")
        return reward
