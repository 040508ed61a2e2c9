"""Models of reward, cost and termination that judge planned trajectories.

Two-layer MLPs on single transitions (Balim et al. 2025, section 3.3; hidden layers of 128
as the authors use).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from mpd_gym.errors import InputError, check_choice, check_integer, check_widths
from mpd_gym.models.mlp import mlp_layers

__all__ = ["Regressor", "RegressorConfig", "regression_loss"]

TARGETS = ("reward", "cost", "violation", "termination")
PROBABILITIES = ("violation", "termination")
INPUTS = ("state_action", "transition")
SMALLEST_STD = 1e-8  # below it a target counts as constant


@final
@dataclass(frozen=True)
class RegressorConfig:
    """A model of one quantity of a step; round-trips through JSON like `DenoiserConfig`.

    Attributes:
        observation_dim: nx.
        action_dim: nu.
        target: ``"reward"``, ``"cost"``, ``"violation"`` (a cost that is 0 or 1) or
            ``"termination"``.
        inputs: ``"state_action"`` for (x_t, u_t), ``"transition"`` for (x_t, u_t, x_{t+1}), which
            is needed where the quantity depends on the state that is reached.
        hidden: Widths of the hidden layers.
        goal_dim: Length of the goal, which is read, too; 0 for none.

    Raises:
        ConfigError: If a value is unknown or out of range.
    """

    observation_dim: int
    action_dim: int
    target: Literal["reward", "cost", "violation", "termination"]
    inputs: Literal["state_action", "transition"] = "state_action"
    hidden: tuple[int, ...] = (128, 128)
    goal_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_choice("target", self.target, TARGETS)
        check_choice("inputs", self.inputs, INPUTS)
        check_integer("observation_dim", self.observation_dim, 1)
        check_integer("action_dim", self.action_dim, 1)
        check_integer("goal_dim", self.goal_dim, 0)
        check_widths("hidden", self.hidden)

    @property
    def input_dim(self) -> int:
        """Columns that the network reads."""
        states = 2 if self.inputs == "transition" else 1
        return states * self.observation_dim + self.action_dim + self.goal_dim


@final
class Regressor(nn.Module):
    """MLP that predicts one number for each step of a trajectory.

    It reads normalised observations and actions. Rewards and costs are learned standardised;
    mean and standard deviation of the data are buffers, so that they are saved with the weights.
    Violations and terminations are learned as probabilities. A violation is rare and begins at a
    sharp limit, which a squared error blurs far more than a cross entropy does.

    Args:
        config: Target, inputs and widths; kept as ``config``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        self.config = config
        self.network = mlp_layers((config.input_dim, *config.hidden, 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def set_target_statistics(self, mean: float, std: float) -> None:
        """Set the scale of the targets, in the environment's units; a std near 0 becomes 1.

        Raises:
            InputError: If a value is not finite.
        """
        if not math.isfinite(mean + std):
            raise InputError(f"mean, std: expected finite numbers; got {mean}, {std}")
        self.mean.fill_(mean)
        self.std.fill_(std if std > SMALLEST_STD else 1.0)

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        next_observations: Tensor | None = None,
        goals: Tensor | None = None,
    ) -> Tensor:
        """Return what the network is trained on: the standardised target, or the logit.

        Args:
            observations: x_t, normalised, ``[…, nx]``.
            actions: u_t, normalised, ``[…, nu]``.
            next_observations: x_{t+1}, normalised; needed by ``inputs="transition"`` only.
            goals: Normalised, ``[…, goal_dim]``; needed where there are goals only.

        Returns:
            ``[…]``.
        """
        parts = [observations, actions]
        if self.config.inputs == "transition":
            assert next_observations is not None
            parts.append(next_observations)
        if self.config.goal_dim:
            assert goals is not None
            parts.append(goals)
        inputs = torch.cat(parts, dim=-1)
        output: Tensor = self.network(inputs)
        return output.squeeze(-1)

    def predict(
        self,
        observations: Tensor,
        actions: Tensor,
        next_observations: Tensor | None = None,
        goals: Tensor | None = None,
    ) -> Tensor:
        """Predict in the environment's units: reward, cost >= 0, or a probability.

        Costs are trained without a bound, so that the squared error yields their conditional mean
        and no unit dies, and are cut at zero here: a negative cost would let one step of a plan pay
        for another, and hide a violated budget.

        Args and errors as `forward`.

        Returns:
            ``[…]``.
        """
        output = self(observations, actions, next_observations, goals)
        if self.config.target in PROBABILITIES:
            return torch.sigmoid(output)
        values: Tensor = output * self.std + self.mean
        return values.clamp(min=0) if self.config.target == "cost" else values


def regression_loss(
    regressor: Regressor, inputs: Sequence[Tensor], targets: Tensor, mask: Tensor
) -> Tensor:
    """Mean loss over recorded steps: squared error of standardised targets, or cross entropy.

    Args:
        regressor: The model.
        inputs: Arguments of `Regressor.forward`, with leading axes ``[B, H]``.
        targets: Rewards or costs in the environment's units, or 1.0 where a step was a violation
            or terminated, ``[B, H]``.
        mask: 1.0 for recorded steps, 0.0 for padding, ``[B, H]``.

    Returns:
        Scalar; 0 if no step is recorded.
    """
    output = regressor(*inputs)
    if regressor.config.target in PROBABILITIES:
        losses = nn.functional.binary_cross_entropy_with_logits(output, targets, reduction="none")
    else:
        losses = (output - (targets - regressor.mean) / regressor.std).square()
    return (losses * mask).sum() / mask.sum().clamp(min=1)
