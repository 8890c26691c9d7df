"""What changes while training: weights, their moving average, the optimizer's moments. Saved whole after each iteration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opgrpo_data.errors import StoreError
from opgrpo_data.store import Store, iteration_folder
from pipelines import weights
from pipelines.policies.base import Policy
from pipelines.settings import TrainConfig

FLOAT16_LOSS_SCALE = 4096.0
"""Gradients of activations in float16 fall below its smallest number (6e-8); a power of two scales them without rounding."""


class Learner:
    """The policy with its optimizer and its average, as they are at the start of `iteration`.

    `parameters` are float32: the optimizer moves them, and where the model runs in lower precision it gets rounded copies.
    `iteration` is None while an update is under way: a learner that failed half-way must be loaded again.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy = policy
        self.config = config
        self.model = weights.trainable(policy.trainable)
        self.parameters = weights.masters(policy.trainable)
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.loss_scale = FLOAT16_LOSS_SCALE if policy.dtype == torch.float16 else 1.0
        self.reset()

    def reset(self) -> None:
        """Back to the base policy: iteration 0, no moments."""
        self._become(self.base)
        self.average = {name: tensor.clone() for name, tensor in self.base.items()}
        self.optimizer = _optimizer(list(self.parameters.values()), self.config)
        self.iteration: int | None = 0

    def _become(self, values: weights.Weights) -> None:
        """Take these weights, in the optimizer's precision and in the model's."""
        weights.copy_onto(self.parameters, values)
        self._round()

    def _round(self) -> None:
        if any(self.model[name] is not parameter for name, parameter in self.parameters.items()):
            weights.copy_onto(self.model, self.parameters)

    def zero_grad(self) -> None:
        """Zero, not None: a step without gradient must move the weights alike in a fresh and in a resumed process."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, in float32."""
        torch.autograd.backward(loss * self.loss_scale)
        for name, parameter in self.parameters.items():
            if (used := self.model[name]) is not parameter and used.grad is not None:
                assert parameter.grad is not None
                parameter.grad.add_(used.grad)
                used.grad = None

    def step(self, lr: float) -> float:
        """Clip the gradient that was gathered and take an optimizer step; returns its norm. Raises ValueError when that is
        not finite."""
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad.div_(self.loss_scale)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm))
        if not torch.isfinite(torch.tensor(norm)):
            range_too_small = ", or set policy.options.dtype to bfloat16" if self.loss_scale != 1 else ""
            raise ValueError(f"the gradient is {norm}: lower train.lr or replay.weight_max{range_too_small}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._round()
        return norm

    @property
    def reference(self) -> weights.Weights:
        """The base policy's weights, for `Policy.velocity`. Of an adapter: no change, as if it were off."""
        return {name: tensor.to(self.model[name].dtype) for name, tensor in self.base.items()}

    def remember_old(self) -> None:
        """Keep the weights as they are now as `old`: the old policy, frozen while the current one moves."""
        self.old = {name: parameter.detach().clone() for name, parameter in self.model.items()}

    @property
    def policy_id(self) -> str:
        """Id of the weights as they are now."""
        return weights.policy_id(self.parameters, self.policy.identity)

    @property
    def average_id(self) -> str:
        """Id of the averaged weights: the policy that is evaluated."""
        return weights.policy_id(self.average, self.policy.identity)

    def update_average(self, iteration: int) -> None:
        """average <- decay average + (1 - decay) weights, after every `ema_every`-th iteration."""
        if (iteration + 1) % self.config.ema_every:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - self.config.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the policy has the averaged weights."""
        current = {name: parameter.detach().clone() for name, parameter in self.model.items()}
        weights.copy_onto(self.model, self.average)
        try:
            yield
        finally:
            weights.copy_onto(self.model, current)

    def save(self, store: Store, run_id: str, iteration: int) -> None:
        """Write the training state at the start of `iteration`, under the policy's name.

        Two processes that train one iteration on different machines may end at different policies: their states lie side
        by side, and the table `updates`, of which there is one, says which is the run's.
        """
        state: dict[str, Tensor] = {f"weights/{name}": tensor for name, tensor in self.parameters.items()}
        state |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            for moment, value in self.optimizer.state[parameter].items():
                # The 8-bit optimizer's parameters share their maps of codes, and safetensors wants every tensor to itself.
                state[f"{moment}/{name}"] = value.clone() if moment.startswith("qmap") else torch.as_tensor(value)
        path = _state_path(run_id, iteration, self.policy_id)
        with store.directory.write_atomic(path) as file:
            file.write(weights.to_bytes(state, path))

    def load(self, store: Store, run_id: str, iteration: int, policy_id: str) -> None:
        """Become the learner at the start of `iteration`. Raises StoreError when that state is not kept any more."""
        state = read_state(store, run_id, iteration, policy_id)
        self.reset()
        self._become(_part(state, "weights"))
        self.average = {name: tensor.to(self.policy.device) for name, tensor in _part(state, "average").items()}
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = self._moments(state, name)
        self.iteration = iteration

    def _moments(self, state: dict[str, Tensor], name: str) -> dict[str, Any]:
        """What the optimizer knows of one parameter. torch's `step` is a tensor, the 8-bit optimizer's a plain number."""
        held = {key.partition("/")[0]: tensor for key, tensor in state.items() if key.partition("/")[2] == name}
        moments = {key: tensor for key, tensor in held.items() if key not in ("weights", "average")}
        step = moments.pop("step")
        placed: dict[str, Any] = {key: tensor.to(self.policy.device) for key, tensor in moments.items()}
        return placed | {"step": step if self.config.optimizer == "adamw" else int(step)}

    def prune(self, store: Store, run_id: str) -> None:
        """Remove the training states of all but the newest `keep_states` iterations."""
        for iteration in sorted(_kept(store, run_id))[: -self.config.keep_states]:
            store.directory.remove_tree(iteration_folder("states", run_id, iteration))


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or the same with moments in 8 bits (arXiv 2110.02861). Raises ValueError when that is not installed."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError('train.optimizer adamw_8bit needs bitsandbytes: pip install "opgrpo[8bit]"') from error
    built: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return built


def read_state(store: Store, run_id: str, iteration: int, policy_id: str) -> dict[str, Tensor]:
    """A training state as tensors by name. Raises StoreError when it is not kept any more."""
    path = _state_path(run_id, iteration, policy_id)
    try:
        return weights.from_bytes(store.directory.read(path), path)
    except FileNotFoundError as error:
        kept = _kept(store, run_id)
        instead = "begin a run of another name (`opgrpo init` with --set name=...)"
        if iteration - 1 in {0} | kept:  # iteration 0 begins at the base policy
            instead = f"remove the updates of iteration {iteration - 1} and train that one again"
        raise StoreError(
            f"run {run_id} keeps no training state of iteration {iteration}; it keeps {sorted(kept)}. "
            f"Restore it from a copy, or {instead}"
        ) from error


def _state_path(run_id: str, iteration: int, policy_id: str) -> str:
    return f"{iteration_folder('states', run_id, iteration)}/{policy_id}.safetensors"


def _kept(store: Store, run_id: str) -> set[int]:
    """Iterations that have a training state."""
    paths = store.directory.list(f"states/run={run_id}/iter=*/*.safetensors")
    return {int(path.split("/iter=")[1].split("/")[0]) for path in paths}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in state.items() if name.startswith(f"{prefix}/")}
