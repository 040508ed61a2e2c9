"""How each kind of model learns from windows: examples and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym.diffusion import Examples, LossConfig, NoiseSchedule, assemble, denoising_loss
from mpd_gym.models import MLP, Regressor, TrajectoryDenoiser, ValueNetwork, regression_loss
from mpd_gym.models.backends.choice import training_forward
from mpd_gym.types import Array, Batch

__all__ = [
    "MLP_TARGETS",
    "DenoisingTask",
    "MLPTask",
    "RegressionTask",
    "TrainingTask",
    "ValueTask",
    "actions_only",
    "states_only",
    "with_conditions",
]


def with_conditions(batch: Batch, names: tuple[str, ...]) -> Batch:
    """Append conditions to every state of a batch (Janner et al. 2022, for goals)."""
    extra = [batch.conditions[name] for name in names]
    if not extra:
        return batch
    values = np.concatenate(extra, axis=-1)
    rows = np.repeat(values[:, None], batch.observations.shape[1], axis=1)
    return replace(
        batch,
        initial=np.concatenate((batch.initial, values), axis=-1),
        observations=np.concatenate((batch.observations, rows), axis=-1),
    )


def states_only(batch: Batch) -> Batch:
    """Leave out the actions of a batch (Ajay et al. 2023)."""
    return replace(batch, actions=batch.actions[..., :0])


def actions_only(batch: Batch) -> Batch:
    """Leave out all states of a batch except x_0 (Zhou et al. 2025)."""
    return replace(batch, observations=batch.observations[..., :0])


class TrainingTask(Protocol):
    """How a model learns from windows; sent to another process where models train in parallel."""

    def examples(self, batch: Batch) -> Any:
        """What the model learns from in a batch of windows."""
        ...

    def __call__(
        self, module: nn.Module, batch: Any, generator: torch.Generator, /
    ) -> dict[str, Tensor]:
        """Loss of one batch of examples, whose arrays are tensors here."""
        ...


@final
@dataclass(frozen=True)
class DenoisingTask:
    """How a planner or dynamics model learns from windows.

    Attributes:
        schedule: Noise schedule.
        loss: Options of the denoising loss.
        names: Conditions that the network sees, in its order.
        initial_state: Layout of the trajectories.
        device: Where the examples are wanted.
        actions_given: Whether the network sees the actions without noise.
        rearrange: From windows to windows of other columns; None leaves them.
    """

    schedule: NoiseSchedule
    loss: LossConfig
    names: tuple[str, ...]
    initial_state: str
    device: torch.device
    actions_given: bool = False
    rearrange: Callable[[Batch], Batch] | None = None

    def examples(self, batch: Batch) -> Examples:
        """Trajectories with x_0 and conditions."""
        return assemble(
            batch if self.rearrange is None else self.rearrange(batch),
            self.names,
            initial_state=self.initial_state,
            actions_given=self.actions_given,
            device=self.device,
        )

    def __call__(
        self, module: nn.Module, examples: Examples, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Loss of one batch."""
        assert isinstance(module, TrajectoryDenoiser)
        network = training_forward(module)
        return {"loss": denoising_loss(network, examples, self.schedule, self.loss, generator)}


@final
@dataclass(frozen=True)
class RegressionTask:
    """How a reward, cost, violation or termination model learns from windows.

    Attributes:
        target: As in `RegressorConfig`.
        goal: Name of the condition that is the goal; empty for none.
    """

    target: str
    goal: str = ""

    def examples(self, batch: Batch) -> Batch:
        """The windows themselves."""
        return batch

    def __call__(
        self, module: nn.Module, batch: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Loss of one `Batch`, whose arrays are tensors here."""
        assert isinstance(module, Regressor)
        before = torch.cat([batch.initial[:, None], batch.observations[:, :-1]], dim=1)
        targets = {
            "reward": batch.rewards,
            "cost": batch.costs,
            "violation": batch.costs,
            "termination": batch.terminations,
        }[self.target]
        inputs = [before, batch.actions, batch.observations]
        if self.goal:
            goals = batch.conditions[self.goal]
            inputs.append(goals[:, None].expand(-1, before.shape[1], -1))
        return {"loss": regression_loss(module, inputs, targets, batch.mask)}


@final
@dataclass(frozen=True)
class ValueTask:
    """How a value network learns from trajectories, noisy ones of every level or clean ones.

    Attributes:
        schedule: Noise schedule of the planner that it guides; None for clean trajectories, at
            level 1.
        names: Conditions that are appended to the states.
        target: Condition that it predicts.
        device: Where the examples are wanted.
        initial_state: Layout of the trajectories.
    """

    schedule: NoiseSchedule | None
    names: tuple[str, ...]
    target: str
    device: torch.device
    initial_state: str = "inpaint"

    def examples(self, batch: Batch) -> dict[str, Tensor]:
        """Trajectories and their values."""
        rows = with_conditions(batch, self.names)
        examples = assemble(rows, (), initial_state=self.initial_state, device=self.device)
        value = torch.as_tensor(batch.conditions[self.target][:, 0], device=self.device)
        return {"trajectory": examples.trajectory, "fixed": examples.fixed, "value": value}

    def __call__(
        self, module: nn.Module, examples: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Mean squared error of one batch."""
        assert isinstance(module, ValueNetwork)
        rows = examples["trajectory"]
        k = torch.ones(len(rows), dtype=torch.long, device=rows.device)
        if self.schedule is not None:
            k, rows = self._noised(self.schedule, rows, examples["fixed"], generator)
        error = module(rows, k) - examples["value"]
        return {"loss": error.square().mean()}

    def _noised(
        self, schedule: NoiseSchedule, clean: Tensor, fixed: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Levels, and trajectories noised to them where they are not fixed."""
        size, source = len(clean), generator.device
        k = torch.randint(1, schedule.num_levels + 1, (size,), generator=generator, device=source)
        noise = torch.randn(clean.shape, generator=generator, device=source)
        k = k.to(clean.device)
        kept = schedule.table(clean.device)[k][:, None, None]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise.to(clean.device)
        return k, torch.where(fixed, clean, noisy)


def _states(batch: Batch) -> Array:
    """x_0 … x_{H-1} of a batch."""
    return np.concatenate((batch.initial[:, None], batch.observations[:, :-1]), axis=1)


def _inverse_dynamics(batch: Batch) -> tuple[Array, Array]:
    """(x_t, x_{t+1}) -> u_t."""
    return np.concatenate((_states(batch), batch.observations), axis=-1), batch.actions


def _policy(batch: Batch) -> tuple[Array, Array]:
    """(x_0, y) -> u_0."""
    values = [batch.initial, *batch.conditions.values()]
    return np.concatenate(values, axis=-1)[:, None], batch.actions[:, :1]


def _successor(batch: Batch) -> tuple[Array, Array]:
    """(x_t, u_t) -> x_{t+1}."""
    return np.concatenate((_states(batch), batch.actions), axis=-1), batch.observations


MLP_TARGETS: dict[str, Callable[[Batch], tuple[Array, Array]]] = {
    "inverse_dynamics": _inverse_dynamics,
    "policy": _policy,
    "successor": _successor,
}
"""Inputs ``[B, t, …]`` and outputs ``[B, t, …]`` of each MLP, from a batch."""


@final
@dataclass(frozen=True)
class MLPTask:
    """How an MLP learns from the recorded steps of windows, by squared error.

    Attributes:
        target: A key of `MLP_TARGETS`.
    """

    target: str

    def examples(self, batch: Batch) -> dict[str, Array]:
        """Inputs, outputs and their mask."""
        inputs, outputs = MLP_TARGETS[self.target](batch)
        mask = batch.mask[:, : inputs.shape[1], None]
        return {"inputs": inputs, "outputs": outputs, "mask": mask}

    def __call__(
        self, module: nn.Module, examples: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Mean squared error over recorded steps."""
        assert isinstance(module, MLP)
        error = (module(examples["inputs"]) - examples["outputs"]) * examples["mask"]
        steps = examples["mask"].sum().clamp(min=1)
        return {"loss": error.square().sum() / (steps * error.shape[-1])}
