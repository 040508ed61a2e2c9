"""The denoising loss of planner and dynamics model, and its examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from mpd_gym.diffusion.guidance import PREDICTIONS
from mpd_gym.diffusion.schedule import NoiseSchedule
from mpd_gym.errors import InputError, check_choice, check_number
from mpd_gym.types import Array, Batch

__all__ = ["Examples", "LossConfig", "assemble", "denoising_loss"]

# (τ^k [B, H, D], k [B], initial, conditions, present) -> [B, H, D_out]
Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class LossConfig:
    """Options of the denoising loss; the defaults are the authors'.

    Attributes:
        prediction: Target of the network, ``"noise"`` or ``"x0"``;
            `mpd_gym.agents.config.DiffusionConfig.resolved` replaces ``"auto"``.
        first_action_weight: Weight of u_0, the executed action. The dynamics model predicts no
            actions and ignores it.
        condition_dropout: Probability that an example loses all conditions at once; so the network
            learns exactly the two cases that guidance compares.
        padding_weight: Weight of entries after the end of an episode; 1 treats padding as data, 0
            ignores it.

    Raises:
        ConfigError: If a value is unknown or out of range.
    """

    prediction: Literal["noise", "x0", "auto"] = "noise"
    first_action_weight: float = 10.0
    condition_dropout: float = 0.25
    padding_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, (*PREDICTIONS, "auto"))
        for name in ("first_action_weight", "padding_weight"):
            check_number(name, getattr(self, name), 0)
        check_number("condition_dropout", self.condition_dropout, 0, 1)


@final
@dataclass(frozen=True)
class Examples:
    """B clean trajectories with their conditioning, normalised, on one device.

    Attributes:
        trajectory: τ^0, ``[B, H, D]``, states before actions.
        initial: x_0, ``[B, nx]``.
        conditions: All conditions, concatenated, ``[B, ny]``.
        present: 1 if a condition is given, ``[B, number of conditions]``.
        recorded: 1 for recorded entries of `trajectory`, 0 for padding, ``[B, H, D]``.
        fixed: True for entries that are known at sampling time, ``[H, D]``; they get no noise and
            no loss.
        executed: True for the entries of u_0, ``[H, D]``.
    """

    trajectory: Tensor
    initial: Tensor
    conditions: Tensor
    present: Tensor
    recorded: Tensor
    fixed: Tensor
    executed: Tensor


def assemble(
    batch: Batch,
    condition_names: Sequence[str],
    *,
    initial_state: str = "film",
    actions_given: bool = False,
    device: torch.device | str = "cpu",
) -> Examples:
    """Arrange a batch of windows as trajectories.

    Args:
        batch: Normalised windows.
        condition_names: Conditions that the network declares, in its order.
        initial_state: ``"film"``: row t is (x_{t+1}, u_t). ``"inpaint"``: row t is (x_t, u_t); the
            trajectory then holds x_0, which is fixed, and lacks x_H.
        actions_given: Whether the actions are fixed too.
        device: Device of the tensors.

    Raises:
        InputError: If the batch lacks a condition.
        ConfigError: If `initial_state` is unknown.
    """
    check_choice("initial_state", initial_state, ("film", "inpaint"))
    missing = [name for name in condition_names if name not in batch.conditions]
    if missing:
        raise InputError(
            f"batch: expected conditions {list(condition_names)}; {missing} missing, "
            f"got {sorted(batch.conditions)}"
        )
    states, states_recorded = batch.observations, batch.mask
    nx = states.shape[-1]
    fixed = np.zeros((batch.actions.shape[1], nx + batch.actions.shape[-1]), bool)
    fixed[:, nx:] = actions_given
    executed = np.zeros_like(fixed)
    executed[0, nx:] = True
    if initial_state == "inpaint":
        states = np.concatenate((batch.initial[:, None], states[:, :-1]), axis=1)
        first = np.ones_like(batch.mask[:, :1])
        states_recorded = np.concatenate((first, batch.mask[:, :-1]), axis=1)
        fixed[0, :nx] = True
    recorded = (
        np.broadcast_to(states_recorded[..., None], states.shape),
        np.broadcast_to(batch.mask[..., None], batch.actions.shape),
    )
    empty = np.zeros((len(batch), 0), np.float32)

    def tensor(array: Array) -> Tensor:
        return torch.as_tensor(array, device=device)

    return Examples(
        trajectory=tensor(np.concatenate((states, batch.actions), axis=-1)),
        initial=tensor(batch.initial),
        conditions=tensor(
            np.concatenate((empty, *(batch.conditions[name] for name in condition_names)), axis=-1)
        ),
        present=torch.ones(len(batch), len(condition_names), device=device),
        recorded=tensor(np.concatenate(recorded, axis=-1)),
        fixed=tensor(fixed),
        executed=tensor(executed),
    )


def denoising_loss(
    network: Network,
    examples: Examples,
    schedule: NoiseSchedule,
    config: LossConfig,
    generator: torch.Generator,
) -> Tensor:
    """Weighted mean squared error of the predicted noise or clean trajectory.

    Levels are uniform over 1 … K. The generator draws levels, noise and dropout, in this order.

    Args:
        network: ``(τ^k [B, H, D], k [B], initial, conditions, present) -> [B, H, D_out]``, whose
            output has the first D_out columns of the trajectory.
        examples: Clean trajectories.
        schedule: Noise schedule.
        config: Options.
        generator: Source of randomness.

    Returns:
        Scalar; the weighted mean over all entries.

    Raises:
        ConfigError: If `config.prediction` is ``"auto"``.
    """
    check_choice("prediction", config.prediction, PREDICTIONS)
    clean = examples.trajectory
    device = clean.device
    k, noise, keep = _draws(examples, schedule, config, generator)
    kept = schedule.table(device)[k][:, None, None]  # [B, 1, 1]
    noisy = torch.where(examples.fixed, clean, kept.sqrt() * clean + (1 - kept).sqrt() * noise)
    present = examples.present * keep
    output = network(noisy, k, examples.initial, examples.conditions, present)
    columns = output.shape[-1]
    target = noise if config.prediction == "noise" else clean
    weights = _weights(examples, config)[..., :columns]
    return (weights * (output - target[..., :columns]).square()).mean()


def _draws(
    examples: Examples, schedule: NoiseSchedule, config: LossConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    clean, source = examples.trajectory, generator.device
    size = len(clean)
    k = torch.randint(1, schedule.num_levels + 1, (size,), generator=generator, device=source)
    noise = torch.randn(clean.shape, generator=generator, device=source, dtype=clean.dtype)
    kept = torch.rand(size, 1, generator=generator, device=source) >= config.condition_dropout
    return k.to(clean.device), noise.to(clean.device), kept.to(clean)


def _weights(examples: Examples, config: LossConfig) -> Tensor:
    weights = examples.recorded + config.padding_weight * (1 - examples.recorded)
    weights = torch.where(examples.fixed, torch.zeros_like(weights), weights)
    return torch.where(examples.executed, config.first_action_weight * weights, weights)
