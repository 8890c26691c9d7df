"""A run bound to a store: the one argument every stage takes. Loads models when first needed and keeps them."""

from __future__ import annotations

import itertools
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from opgrpo_data.errors import StoreError
from opgrpo_data.ids import canonical_json
from opgrpo_data.io import Directory
from opgrpo_data.store import Store, iteration_folder, weights_path
from pipelines.config import RunConfig
from pipelines.fitting import Asked
from pipelines.groups import prompts_of
from pipelines.imports import import_buffer, open_source
from pipelines.offline import fix_selection, open_filled
from pipelines.progress import Progress
from pipelines.prompts import Prompt, load_prompts, thinned
from pipelines.rewards.base import Reward, build_reward
from pipelines.settings import RewardConfig

if TYPE_CHECKING:  # torch and diffusers take seconds to import; `select` and `score` do without
    from pipelines.learner import Learner
    from pipelines.policies.base import Policy

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pyarrow", "opgrpo")


@dataclass(frozen=True)
class Outcome:
    """What a stage did. `done` units of work were new, `skipped` were there already; `detail` is stage-specific."""

    stage: str
    iteration: int | None
    done: int
    skipped: int
    detail: dict[str, Any] = field(default_factory=dict)


class Experiment:
    """One run of one configuration in one store."""

    def __init__(self, store: Store, config: RunConfig, progress: Progress) -> None:
        self.store = store
        self.config = config
        self.progress = progress
        self.run_id = config.run_id
        self._rewards: dict[str, Reward] = {}

    @classmethod
    def init(cls, url: str, config: RunConfig, progress: Progress) -> Experiment:
        """Create the store where there is none; register prompts, the run and its base policy. Does nothing twice."""
        if Directory(url).exists(_run_path(config.run_id)):
            experiment = cls.open(url, config, progress)
            experiment._check_prompts()
            return experiment
        prompts, offline = load_prompts(config.prompts.source), config.algorithm == "offline"
        if offline:
            open_filled(url)
        else:
            prompts_of(config, _limited(prompts, config)["train"], 0, {})  # refuses too few before anything is made
        source = open_source(config)
        policy = _load_policy(config)  # may fail: before anything is made, too
        experiment = cls(Store.create(url), config, progress)
        train = _limited(prompts, config)["train"]
        document: dict[str, Any] = {}
        if offline:
            asked, reward = Asked.of(policy, config.rollout), experiment.reward(config.reward)
            trained_on = {prompt.prompt_id for prompt in train}
            document["offline_selection"] = fix_selection(experiment.store, config, asked, reward, trained_on, progress)
        policy.prepare(experiment.store.directory, [p.text for members in _limited(prompts, config).values() for p in members])
        experiment.policy = policy
        paths = {
            split: experiment.store.add_prompts([{"text": p.text, "metadata": p.metadata} for p in members], split)
            for split, members in prompts.items()
        }
        base_id = experiment.learner(0).policy_id
        experiment.register_policy(base_id, None, iteration=0, kind="base", weights=None)
        document |= {"config": config.model_dump(mode="json"), "base_policy_id": base_id, "prompts": paths}
        document["model_id"] = policy.model_id
        if source is not None:
            reward = experiment.reward(config.reward)
            document["imported_buffer"] = import_buffer(source, experiment.store, config, base_id, reward, train, progress)
        experiment.store.add_run(experiment.run_id, document | {"command": sys.argv, "software": software()})
        return experiment

    @classmethod
    def open(cls, url: str, config: RunConfig, progress: Progress) -> Experiment:
        """Bind to a run that `init` registered. Raises StoreError when the store or the run is missing."""
        experiment = cls(Store.open(url), config, progress)
        if not experiment._registered:
            known = [path[len("runs/") : -len(".json")] for path in experiment.store.directory.list("runs/*.json")]
            raise StoreError(
                f"the store {url} has no run {experiment.run_id}; it has {known}. Register it with `opgrpo init`, "
                f"or use the config and overrides of the run you mean"
            )
        if changed := _changed(experiment.document["config"], config.model_dump(mode="json")):
            raise StoreError(
                f"run {experiment.run_id} began with other defaults than this version's: {'; '.join(changed)}. "
                f"Set them to what they were, or init a run of another name"
            )
        return experiment

    @property
    def _registered(self) -> bool:
        return self.store.directory.exists(_run_path(self.run_id))

    @cached_property
    def document(self) -> dict[str, Any]:
        """What `init` wrote down about the run."""
        return next(self.store.documents(_run_path(self.run_id)))

    @cached_property
    def policy(self) -> Policy:
        """The model, loaded on first use."""
        return _load_policy(self.config)

    @cached_property
    def _learner(self) -> Learner:
        from pipelines.learner import Learner

        learner = Learner(self.policy, self.config.train)
        if not self._registered:
            return learner
        # Its other parts do not train, but pictures, conditions and grids are made by them.
        began = (self.document["base_policy_id"], self.document.get("model_id", self.policy.model_id))
        if began != (now := (learner.policy_id, self.policy.model_id)):
            raise StoreError(
                f"the model {self.config.policy.model!r} is not the one that run {self.run_id} began with (policy and files "
                f"{began}, now {now}): restore it, or init a run of another name"
            )
        texts = [prompt.text for prompts in self.prompts.values() for prompt in prompts]
        self.policy.prepare(self.store.directory, texts)  # not before it is known to be the run's
        return learner

    def learner(self, iteration: int) -> Learner:
        """The learner as it was at the start of `iteration`, from memory if it is there."""
        if self._learner.iteration != iteration and iteration == 0:
            self._learner.reset()
        elif self._learner.iteration != iteration:
            self._learner.load(self.store, self.run_id, iteration, self._policy_after(iteration - 1))
        return self._learner

    def _policy_after(self, iteration: int) -> str:
        """policy_id that `updates` commits the run to. Raises StoreError when the iteration is not trained."""
        if not self.store.directory.exists(self._updates_path(iteration)):
            raise StoreError(f"iteration {iteration} of run {self.run_id} is not trained yet: run `opgrpo train` first")
        policy_id: str = self.store.read_tables("updates", [self._updates_path(iteration)])["new_policy_id"][0].as_py()
        return policy_id

    def reward(self, config: RewardConfig) -> Reward:
        """The reward of a configuration, built once."""
        key = canonical_json(config.model_dump(mode="json"))
        if key not in self._rewards:
            self._rewards[key] = build_reward(config.name, config.options)
        return self._rewards[key]

    @property
    def iteration(self) -> int:
        """The iteration the run is in: the first that is not trained to the end."""
        trained = set(self.store.files("updates", run=self.run_id))
        return next(i for i in itertools.count() if self._updates_path(i) not in trained)

    def buffer_path(self, iteration: int) -> str | None:
        """Where the buffer after `iteration` lies; before the first it is the imported one, if there is one."""
        if iteration >= 0:
            return f"{iteration_folder('buffers', self.run_id, iteration)}.parquet"
        imported: str | None = self.document.get("imported_buffer")
        return imported

    @cached_property
    def offline_selection(self) -> pa.Table:
        """What an offline run trains on, as `init` fixed it (schema PLANS)."""
        return self.store.read_tables("plans", [self.document["offline_selection"]])

    def _updates_path(self, iteration: int) -> str:
        return f"{iteration_folder('updates', self.run_id, iteration)}.parquet"

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The run's prompts by split, as `init` stored them; the training split thinned to `prompts.limit`."""
        loaded = {split: self._stored_prompts(path) for split, path in self.document["prompts"].items()}
        return _limited(loaded, self.config)

    def _check_prompts(self) -> None:
        """Raise ValueError when the prompt file is still there and says something else than when the run began."""
        source = self.config.prompts.source
        if source != "embedded" and not Path(source).exists():
            return
        began = {split: self._stored_prompts(path) for split, path in self.document["prompts"].items()}
        if load_prompts(source) != began:
            raise ValueError(f"the prompts in {source} changed since run {self.run_id} began: init a run of another name")

    def _stored_prompts(self, path: str) -> list[Prompt]:
        rows = self.store.read_tables("prompts", [path]).to_pylist()
        return [Prompt(row["text"], json.loads(row["metadata"])) for row in rows]

    @cached_property
    def prompt_of(self) -> dict[str, Prompt]:
        """prompt_id to prompt, over all splits."""
        return {prompt.prompt_id: prompt for prompts in self.prompts.values() for prompt in prompts}

    def register_policy(
        self, policy_id: str, parent_id: str | None, *, iteration: int, kind: str, weights: bytes | None
    ) -> None:
        """Publish what a policy is, and its weights where they are to be kept."""
        parameters = sum(parameter.numel() for parameter in self._learner.parameters.values())
        document = {
            "parent_id": parent_id,
            "base_model": self.policy.base_model,
            "family": self.policy.family,
            "run_id": self.run_id,
            "iteration": iteration,
            "kind": kind,
            "parameters": parameters,
        }
        self.store.add_policy(policy_id, document, weights)

    def keep_average(self, iteration: int) -> str:
        """Publish the averaged weights at the start of `iteration` as a policy; returns its id."""
        learner = self.learner(iteration)
        policy_id = learner.average_id
        if iteration > 0:  # at 0 it is the base policy, whose weights lie with its model
            from pipelines.weights import to_bytes

            kept = to_bytes(learner.average, weights_path(policy_id))
            self.register_policy(policy_id, learner.policy_id, iteration=iteration, kind="average", weights=kept)
        return policy_id


def trained_iterations(url: str, config: RunConfig) -> int:
    """How far the run of a configuration is in the store at `url`; 0 where there is no such store or run."""
    if not Directory(url).exists(_run_path(config.run_id)):
        return 0
    return Experiment(Store.open(url), config, Progress(quiet=True)).iteration


def _limited(prompts: dict[str, list[Prompt]], config: RunConfig) -> dict[str, list[Prompt]]:
    return prompts | {"train": thinned(prompts["train"], config.prompts.limit or len(prompts["train"]))}


def _changed(began: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that both have and that differ, those aside that a run may change: a new version may have another default."""
    told: list[str] = []
    for name in began.keys() & now.keys() - ({"iterations", "eval", "keep_states"}):
        if isinstance(began[name], dict) and isinstance(now[name], dict):
            told += _changed(began[name], now[name], f"{where}{name}.")
        elif began[name] != now[name]:
            told.append(f"{where}{name} was {began[name]!r}, is {now[name]!r}")
    return sorted(told)


def _load_policy(config: RunConfig) -> Policy:
    from pipelines.policies.base import POLICIES

    return POLICIES.build(config.policy.family, model=config.policy.model, **config.policy.options)


def _run_path(run_id: str) -> str:
    return f"runs/{run_id}.json"


def software() -> dict[str, str]:
    """Versions that can change numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
