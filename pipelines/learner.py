"""What changes while training: weights, their moving average, the optimizer's moments. Saved whole after each iteration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store, iteration_folder
from pipelines import weights
from pipelines.policies.base import Policy
from pipelines.settings import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Learner:
    """The policy with its optimizer and its average, as they are at the start of `iteration`.

    `iteration` is None while an update is under way: a learner that failed half-way must be loaded again.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.parameters = weights.trainable(policy.trainable)
        if odd := {str(parameter.dtype) for parameter in self.parameters.values()} - {"torch.float32"}:
            raise ValueError(
                f"weights in {odd} round small updates away: load the policy with options {{dtype: float32}} to train it"
            )
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.reset()

    def reset(self) -> None:
        """Back to the base policy: iteration 0, no moments."""
        weights.copy_into(self.policy.trainable, self.base)
        self.average = {name: tensor.clone() for name, tensor in self.base.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
        )
        self.iteration: int | None = 0

    @cached_property
    def reference(self) -> nn.Module:
        """A frozen copy of the base policy, made when a KL term first asks for it."""
        module = copy.deepcopy(self.policy.trainable)
        weights.copy_into(module, self.base)
        return module.requires_grad_(False)

    def remember_old(self) -> None:
        """Keep the weights as they are now as `old`: the old policy, frozen while the current one moves."""
        self.old = copy.deepcopy(self.policy.trainable).requires_grad_(False)

    @property
    def policy_id(self) -> str:
        """Id of the weights as they are now."""
        return weights.policy_id(self.parameters)

    @property
    def average_id(self) -> str:
        """Id of the averaged weights: the policy that is evaluated."""
        return weights.policy_id(self.average)

    def update_average(self) -> None:
        """average <- decay average + (1 - decay) weights."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - self.config.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the policy has the averaged weights."""
        current = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        weights.copy_into(self.policy.trainable, self.average)
        try:
            yield
        finally:
            weights.copy_into(self.policy.trainable, current)

    def save(self, store: Store, run_id: str, iteration: int) -> None:
        """Write the training state at the start of `iteration`, under the policy's name.

        Two processes that train one iteration on different machines may end at different policies: their states lie side
        by side, and the table `updates`, of which there is one, says which is the run's.
        """
        state: dict[str, Tensor] = {f"weights/{name}": tensor for name, tensor in self.parameters.items()}
        state |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            state |= {f"{moment}/{name}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        with store.directory.write_atomic(_state_path(run_id, iteration, self.policy_id)) as file:
            file.write(weights.to_bytes(state))

    def load(self, store: Store, run_id: str, iteration: int, policy_id: str) -> None:
        """Become the learner at the start of `iteration`. Raises StoreError when that state is not kept any more."""
        path = _state_path(run_id, iteration, policy_id)
        try:
            state = weights.from_bytes(store.directory.read(path), path)
        except FileNotFoundError as error:
            raise StoreError(
                f"run {run_id} keeps no training state of iteration {iteration}; it keeps {sorted(_kept(store, run_id))}. "
                f"Restore it from a copy, or remove the updates of iteration {iteration - 1} and train that one again"
            ) from error
        self.reset()
        weights.copy_into(self.policy.trainable, _part(state, "weights"))
        self.average = {name: tensor.to(self.policy.device) for name, tensor in _part(state, "average").items()}
        moments = {moment: _part(state, moment) for moment in MOMENTS}
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                moment: moments[moment][name].to("cpu" if moment == "step" else self.policy.device) for moment in MOMENTS
            }
        self.iteration = iteration

    def prune(self, store: Store, run_id: str) -> None:
        """Remove the training states of all but the newest `keep_states` iterations."""
        for iteration in sorted(_kept(store, run_id))[: -self.config.keep_states]:
            store.directory.remove_tree(iteration_folder("states", run_id, iteration))


def _state_path(run_id: str, iteration: int, policy_id: str) -> str:
    return f"{iteration_folder('states', run_id, iteration)}/{policy_id}.safetensors"


def _kept(store: Store, run_id: str) -> set[int]:
    """Iterations that have a training state."""
    paths = store.directory.list(f"states/run={run_id}/iter=*/*.safetensors")
    return {int(path.split("/iter=")[1].split("/")[0]) for path in paths}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in state.items() if name.startswith(f"{prefix}/")}
