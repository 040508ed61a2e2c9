"""The denoising networks of the planner, of the dynamics model, and of an action proposal.

The first two see a noisy trajectory of states and actions. The planner predicts all of it, the
dynamics model its states only (Balim et al. 2025, section 3.1). An action proposal sees and
predicts actions alone (Zhou et al. 2025). Which quantity a network predicts, noise or
clean trajectory, is the business of the loss and the sampler; the network is the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor, nn

from mpd_gym.errors import ConfigError, InputError, check_choice, check_integer
from mpd_gym.models.temporal_unet import Modulation, TemporalUnet, UnetConfig

__all__ = [
    "ConditionSize",
    "DenoiserConfig",
    "TrajectoryDenoiser",
    "embedding_layers",
    "sinusoid",
]

ConditionSize = tuple[str, int]

OUTPUTS = ("trajectory", "observations", "actions")
NULLS = ("flag", "learned", "zeros")
INITIAL_STATES = ("film", "inpaint")
EMBEDDING_EXPANSION = 4  # hidden width of an embedding MLP, as a multiple of its output


@final
@dataclass(frozen=True)
class DenoiserConfig:
    """A denoising network; ``DenoiserConfig(**json.loads(json.dumps(asdict(config))))`` is equal.

    Attributes:
        observation_dim: nx.
        action_dim: nu; 0 for trajectories of states alone (Ajay et al. 2023).
        horizon: H, rows of a trajectory.
        output: ``"trajectory"`` (planner), ``"observations"`` (dynamics model) or ``"actions"``
            (action proposal, whose trajectories are actions alone).
        conditions: (name, size) of each condition, in the order of their columns.
        null: How the network is told that a condition is absent. ``"flag"``: zeros and a presence
            flag of 0 beside the values; ``"learned"``: zeros and a learned vector added to the
            embedding; ``"zeros"``: zeros alone, as the authors do, which cannot be told from a
            condition that normalises to zeros.
        initial_state: ``"film"``: rows are (x_{t+1}, u_t) and x_0 is an input of its own;
            ``"inpaint"``: rows are (x_t, u_t), the first holds the clean x_0, and a trajectory
            covers H − 1 future states.
        unet: Size of the U-Net.

    Raises:
        ConfigError: If a value is unknown or out of range, or `horizon` cannot be halved as often
            as the U-Net needs.
    """

    observation_dim: int
    action_dim: int
    horizon: int
    output: Literal["trajectory", "observations", "actions"] = "trajectory"
    conditions: tuple[ConditionSize, ...] = ()
    null: Literal["flag", "learned", "zeros"] = "flag"
    initial_state: Literal["film", "inpaint"] = "film"
    unet: UnetConfig = field(default_factory=UnetConfig)

    def __post_init__(self) -> None:
        conditions = tuple((name, size) for name, size in self.conditions)
        object.__setattr__(self, "conditions", conditions)
        if isinstance(self.unet, dict):
            object.__setattr__(self, "unet", UnetConfig(**self.unet))
        check_integer("observation_dim", self.observation_dim, 1)
        check_integer("action_dim", self.action_dim, 0)
        check_choice("output", self.output, OUTPUTS)
        check_choice("null", self.null, NULLS)
        check_choice("initial_state", self.initial_state, INITIAL_STATES)
        if len({name for name, _ in conditions}) < len(conditions):
            raise ConfigError(f"conditions: names must differ; got {conditions}")
        for name, size in conditions:
            check_integer(f"size of condition {name!r}", size, 1)
        self.unet.check_horizon(self.horizon)

    @property
    def trajectory_dim(self) -> int:
        """D, size of a row of the trajectory."""
        return self.action_dim + (0 if self.output == "actions" else self.observation_dim)

    @property
    def output_dim(self) -> int:
        """Size of a row of the prediction."""
        return self.observation_dim if self.output == "observations" else self.trajectory_dim

    @property
    def condition_dim(self) -> int:
        """Size of all conditions side by side, ny."""
        return sum(size for _, size in self.conditions)


@final
class TrajectoryDenoiser(nn.Module):
    """Temporal U-Net conditioned on diffusion level, initial state and conditions.

    ``forward(trajectory, k, initial, conditions, present)`` is ``denoise(trajectory,
    modulations(embed(k, initial, conditions, present)))``. The first two steps do not see the
    noisy trajectory, so a sampler takes them for all levels before its loop.

    Args:
        config: Sizes and options; kept as ``config``.
    """

    condition_of_column: Tensor

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width = config.unet.width
        self.time_embedding = embedding_layers(width, width)
        self.initial_embedding = (
            embedding_layers(config.observation_dim, width)
            if config.initial_state == "film"
            else None
        )
        flags = len(config.conditions) if config.null == "flag" else 0
        self.condition_embedding = (
            embedding_layers(config.condition_dim + flags, width) if config.conditions else None
        )
        self.null = (
            nn.Parameter(torch.randn(len(config.conditions), width))
            if config.conditions and config.null == "learned"
            else None
        )
        parts = (self.time_embedding, self.initial_embedding, self.condition_embedding)
        self.unet = TemporalUnet(
            config.trajectory_dim,
            config.output_dim,
            width * sum(part is not None for part in parts),
            config.unet,
        )
        columns = [index for index, (_, size) in enumerate(config.conditions) for _ in range(size)]
        self.register_buffer(
            "condition_of_column", torch.tensor(columns, dtype=torch.long), persistent=False
        )

    @functools.cached_property
    def unet_weights(self) -> int:
        """Number of weights of `unet`."""
        return sum(weight.numel() for weight in self.unet.parameters())

    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory.

        Args:
            k: Diffusion levels 1 … K, ``[G]``, integers.
            initial: x_0, normalised, ``[G, nx]``; not used where x_0 is inpainted.
            conditions: All conditions side by side, ``[G, ny]``; entries of absent conditions are
                ignored, whatever they hold.
            present: ``[G, number of conditions]``, 1 where the condition is given, else 0.

        Returns:
            ``[G, d]``, d = `unet.width` for each of level, x_0 and conditions that the network has.

        Raises:
            InputError: If a shape is wrong.
        """
        config, rows = self.config, len(k)
        _check_shape("initial", initial, (rows, config.observation_dim))
        _check_shape("conditions", conditions, (rows, config.condition_dim))
        _check_shape("present", present, (rows, len(config.conditions)))
        time = sinusoid(k - 1, config.unet.width).to(initial.dtype)  # networks count from 0
        parts = [self.time_embedding(time)]
        if self.initial_embedding is not None:
            parts.append(self.initial_embedding(initial))
        if self.condition_embedding is not None:
            parts.append(self._embed_conditions(self.condition_embedding, conditions, present))
        return torch.cat(parts, dim=-1)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return (scale, bias), each ``[G, C]``, of every normalisation for ``[G, d]``."""
        return self.unet.modulations(embedding)

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict from noisy trajectories and prepared modulations.

        Args:
            trajectory: τ^k, ``[M, H, nx + nu]``.
            modulations: From `modulations`, of G rows; G divides M, and each M / G consecutive
                trajectories share one row.

        Returns:
            Noise or clean trajectory, ``[M, H, output_dim]``.

        Raises:
            InputError: If a shape is wrong.
        """
        config, rows = self.config, len(trajectory)
        _check_shape("trajectory", trajectory, (rows, config.horizon, config.trajectory_dim))
        groups = len(modulations[0][0])
        if rows % groups:
            raise InputError(f"trajectory: expected a multiple of {groups} rows; got {rows}")
        output: Tensor = self.unet(trajectory, modulations)
        return output

    def forward(
        self, trajectory: Tensor, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor
    ) -> Tensor:
        """Predict from noisy trajectories; see `embed` and `denoise` for the arguments."""
        embedding = self.embed(k, initial, conditions, present)
        return self.denoise(trajectory, self.modulations(embedding))

    def _embed_conditions(self, embedding: nn.Module, values: Tensor, present: Tensor) -> Tensor:
        given = present[:, self.condition_of_column] > 0
        inputs = torch.where(given, values, torch.zeros_like(values))
        if self.config.null == "flag":
            inputs = torch.cat((inputs, present.to(inputs.dtype)), dim=-1)
        output: Tensor = embedding(inputs)
        if self.null is not None:
            output = output + (1 - present.to(output.dtype)) @ self.null
        return output


def embedding_layers(inputs: int, width: int) -> nn.Sequential:
    """Two-layer MLP that embeds a vector ``[…, inputs]`` in ``[…, width]``."""
    hidden = EMBEDDING_EXPANSION * width
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, width))


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Sine and cosine features of a position ``[G]``, ``[G, width]`` (Vaswani et al. 2017)."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=position.device) / (half - 1)
    angles = position.to(torch.float32)[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise InputError(f"{name}: expected shape {list(expected)}; got {list(value.shape)}")
