"""What the configurations of all agents have in common."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import nn

from mpd_gym.agents.options import SamplingConfig, from_mapping
from mpd_gym.datasets import ConditionSpec, WindowConfig
from mpd_gym.diffusion import PREDICTIONS, LossConfig, make_schedule
from mpd_gym.errors import ConfigError, check_choice, check_integer
from mpd_gym.models import (
    MLP,
    DenoiserConfig,
    MLPConfig,
    Regressor,
    RegressorConfig,
    UnetConfig,
)
from mpd_gym.models.regressors import INPUTS
from mpd_gym.training import TrainingConfig

__all__ = [
    "INVERSE_DYNAMICS",
    "REGRESSORS",
    "AgentConfig",
    "DiffusionConfig",
    "FactoredConfig",
    "Layout",
    "planner_sampling",
]

REGRESSORS = ("reward", "cost", "termination")
INVERSE_DYNAMICS = "inverse_dynamics"
# Channels of a U-Net that the noise of a column takes from input to output. With 4 each, 2 % of it
# is lost after 1,000 steps of training, with 2 it is 40 % (``python benchmarks/noise_width.py``).
CHANNELS_PER_NOISE = 4
_NESTED = {
    "unet": UnetConfig,
    "dynamics_unet": UnetConfig,
    "value_unet": UnetConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "regressor_training": TrainingConfig,
    "sampling": SamplingConfig,
}


class Layout(NamedTuple):
    """Shape of what an agent samples.

    Attributes:
        rows: L, rows of a trajectory.
        columns: D, its columns.
        horizon: H, future steps of a plan.
        levels: K, diffusion levels; 0 for an agent without diffusion.
    """

    rows: int
    columns: int
    horizon: int
    levels: int


@dataclass(frozen=True, kw_only=True)
class AgentConfig(ABC):
    """Fields that every agent has. Round-trips through ``dataclasses.asdict`` and JSON.

    Attributes:
        conditions: What plans are conditioned on: kinds such as ``"return"``, or `ConditionSpec`s.
        discount: γ of returns and costs.
        padding: What follows the end of an episode: ``"repeat"``, ``"zeros"`` (the authors'),
            ``"terminal"`` where only the environment's own ends are padded, or ``"none"`` where
            windows end with their episode, see `WindowConfig`.
        normalizer: ``"minmax"``, ``"cdf"`` (the authors') or ``"gaussian"``.
        reward_model: Learn rewards, for ranking.
        cost_model: Learn costs, for ranking and budgets.
        binary_costs: Costs are 0 or 1: the cost model is a classifier and predicts the probability
            of a violation, which is sharp at a limit where a regression is blurred.
        termination_model: Learn where episodes end, for ranking.
        regressor_inputs: ``"state_action"``, or ``"transition"`` where reward or cost depend on
            the state that is reached. A goal is an input where it is a condition.
        training: Of the method's networks.
        regressor_training: Of the other models.
        sampling: Default options of the agent.
        validation_fraction: Share of the episodes that is held out, in [0, 1).
        seed: Of initial weights, data split and the agent's noise; training has its own.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    conditions: tuple[ConditionSpec, ...] = ()
    discount: float = 0.997
    padding: str = "repeat"
    normalizer: str = "minmax"
    reward_model: bool = False
    cost_model: bool = False
    binary_costs: bool = False
    termination_model: bool = False
    regressor_inputs: str = "state_action"
    training: TrainingConfig = field(default_factory=TrainingConfig)
    regressor_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=5_000, batch_size=256, learning_rate=1e-3)
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _NESTED.items():
            if isinstance(getattr(self, name, None), Mapping):
                object.__setattr__(self, name, from_mapping(kind, getattr(self, name)))
        specs = [{"kind": part} if isinstance(part, str) else part for part in self.conditions]
        windows = WindowConfig(conditions=tuple(specs))
        object.__setattr__(self, "conditions", windows.conditions)
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction: expected a share in [0, 1), got {self.validation_fraction}"
            )
        check_choice("regressor_inputs", self.regressor_inputs, INPUTS)
        if self.binary_costs and not self.cost_model:
            raise ConfigError(
                "binary_costs: says how costs are learned, and this configuration learns none; set "
                "cost_model=True as well"
            )
        self._check()
        self.windows  # noqa: B018 - refuses wrong windows
        self._regressor("reward", 1, 1, self.unit_sizes)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from what ``dataclasses.asdict`` and JSON made of one.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        config: Self = from_mapping(cls, values)
        return config

    def resolved(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Self:
        """This configuration with everything settled that depends on the data's sizes.

        Args:
            nx: Size of an observation.
            nu: Size of an action.
            sizes: Length of each condition.
        """
        return self

    def roles(self) -> list[str]:
        """Models that an agent of this configuration has, the method's own before the others."""
        return self.networks() + [name for name in REGRESSORS if getattr(self, f"{name}_model")]

    def models(self, nx: int, nu: int, sizes: Mapping[str, int]) -> dict[str, nn.Module]:
        """Make all models with seeded weights; the global random state stays as it is.

        Args:
            nx: Size of an observation.
            nu: Size of an action.
            sizes: Length of each condition.
        """
        models: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            for number, role in enumerate(self.roles()):
                torch.manual_seed(self.seed * 1000 + number)
                models[role] = self._model(role, nx, nu, sizes)
        return models

    def _model(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> nn.Module:
        if role in REGRESSORS:
            return Regressor(self._regressor(role, nx, nu, sizes))
        return self.network(role, nx, nu, sizes)

    def _regressor(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> RegressorConfig:
        target: Any = "violation" if role == "cost" and self.binary_costs else role
        inputs: Any = self.regressor_inputs
        goal = self.goal_condition
        goal_dim = 0 if goal is None else sizes[goal.name]
        return RegressorConfig(nx, nu, target, inputs, goal_dim=goal_dim)

    @property
    def goal_condition(self) -> ConditionSpec | None:
        """Where the goal is among the conditions; None without one."""
        return next((spec for spec in self.conditions if spec.kind == "goal"), None)

    @property
    def unit_sizes(self) -> dict[str, int]:
        """Length 1 for each condition, for a check of the networks' configurations."""
        return {spec.name: 1 for spec in self.conditions}

    # --- what a method supplies -------------------------------------------------------------

    @property
    @abstractmethod
    def windows(self) -> WindowConfig:
        """Shape of the training windows."""

    @abstractmethod
    def networks(self) -> list[str]:
        """Roles of the method's own networks."""

    @abstractmethod
    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> nn.Module:
        """Make one of them."""

    @abstractmethod
    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""

    @abstractmethod
    def _check(self) -> None:
        """Check and complete the method's fields and network sizes."""


@dataclass(frozen=True)
class DiffusionConfig(AgentConfig):
    """Fields that every agent with diffusion has, beside those of `AgentConfig`.

    Attributes:
        horizon: H, steps of a training window.
        first_step_share: Probability with which a training window begins at its episode's reset;
            raise it for plans that are executed whole.
        unet: Size of the planner's network.
        null: How a network is told that a condition is absent: ``"flag"``, ``"learned"``, or
            ``"zeros"`` (the authors').
        schedule: Noise schedule, ``"cosine"``, ``"linear"`` or ``"vp"``.
        diffusion_steps: K.
        loss: Options of the denoising loss.
        inverse_dynamics: Learn which action leads from one state to the next, and execute the
            actions that lead along the planned states (`SamplingConfig.actions`), whose errors do
            not add up over a plan. A MLP that is trained as `regressor_training` says, on
            the planner's data, which plans are like: where recorded actions have no effect, such as
            steering at full lock, it would learn their mean.
        inverse_hidden: Widths of its hidden layers.
    """

    horizon: int = 32
    first_step_share: float = 0.0
    unet: UnetConfig = field(default_factory=UnetConfig)
    null: str = "flag"
    schedule: str = "cosine"
    diffusion_steps: int = 100
    loss: LossConfig = field(default_factory=LossConfig)
    inverse_dynamics: bool = False
    inverse_hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse_hidden", tuple(self.inverse_hidden))
        MLPConfig(1, 1, self.inverse_hidden)  # refuses wrong widths
        check_integer("diffusion_steps", self.diffusion_steps, 2)
        super().__post_init__()

    def roles(self) -> list[str]:
        """Models that an agent of this configuration has, the method's own before the others."""
        roles = super().roles()
        if self.inverse_dynamics and INVERSE_DYNAMICS not in roles:
            roles.append(INVERSE_DYNAMICS)
        return roles

    def _model(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> nn.Module:
        if role == INVERSE_DYNAMICS:
            return MLP(MLPConfig(2 * nx, nu, self.inverse_hidden))
        return super()._model(role, nx, nu, sizes)

    @property
    @abstractmethod
    def initial_state(self) -> str:
        """Where x_0 stands: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps."""

    def resolved(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Self:
        """Settle what the networks predict: noise where it fits through them, otherwise x̂_0.

        A warning tells of a network that is to predict more noise than fits
        (``python benchmarks/noise_width.py``).
        """
        columns, carried = self.layout(nx, nu, sizes).columns, self.unet.width // CHANNELS_PER_NOISE
        if self.loss.prediction == "auto":
            prediction: Any = "noise" if columns <= carried else "x0"
            return replace(self, loss=replace(self.loss, prediction=prediction))
        if self.loss.prediction == "noise" and columns > carried:
            warnings.warn(
                f"the noise of {carried} columns fits through a network of width "
                f"{self.unet.width}, trajectories have {columns}: expect poor plans, or set "
                f"loss.prediction to 'x0', or unet.width to {columns * CHANNELS_PER_NOISE} or more",
                stacklevel=3,
            )
        return self

    @property
    def windows(self) -> WindowConfig:
        """Shape of the training windows."""
        return WindowConfig(
            self.horizon, self.discount, self.padding, self.conditions, self.first_step_share
        )

    @property
    def value_condition(self) -> ConditionSpec | None:
        """What a value network predicts; None without a return."""
        return next((spec for spec in self.conditions if spec.kind == "return"), None)

    def loss_of(self, role: str) -> LossConfig:
        """Options of the denoising loss of one network."""
        return self.loss

    @property
    def plan_horizon(self) -> int:
        """Future steps of a plan."""
        return self.horizon if self.initial_state == "film" else self.horizon - 1

    def condition_sizes(self, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """(name, length) of each condition, in the order of a network's inputs."""
        return tuple((spec.name, sizes[spec.name]) for spec in self.conditions)


@dataclass(frozen=True)
class FactoredConfig(DiffusionConfig):
    """Fields that agents with a dynamics model of its own have, beside those of `DiffusionConfig`.

    Attributes:
        dynamics_unet: Size of the dynamics model's network; None for that of `unet`.
        dynamics_conditions: Whether the dynamics model sees the conditions that the other network
            sees.
        dynamics_prediction: What the dynamics model predicts, ``"noise"`` or ``"x0"``; None for the
            same as the other network.
    """

    output: ClassVar[Literal["trajectory", "actions"]]
    """What the network beside the dynamics model predicts."""

    dynamics_unet: UnetConfig | None = None
    dynamics_conditions: bool = True
    dynamics_prediction: Literal["noise", "x0"] | None = None

    def denoiser(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> DenoiserConfig:
        """Configuration of the dynamics model's network, or of the one beside it.

        Args:
            role: Which one, ``"dynamics"`` or the other.
            nx: Size of an observation.
            nu: Size of an action.
            sizes: Length of each condition.
        """
        dynamics = role == "dynamics"
        seen = self.dynamics_conditions or not dynamics
        return DenoiserConfig(
            observation_dim=nx,
            action_dim=nu,
            horizon=self.horizon,
            output="observations" if dynamics else self.output,
            conditions=self.condition_sizes(sizes) if seen else (),
            null=self.null,  # type: ignore[arg-type]
            initial_state=self.initial_state,  # type: ignore[arg-type]
            unet=self.dynamics_unet or self.unet if dynamics else self.unet,
        )

    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""
        return Layout(self.horizon, nx + nu, self.plan_horizon, self.diffusion_steps)

    def loss_of(self, role: str) -> LossConfig:
        """Options of the denoising loss of one network."""
        if role != "dynamics" or self.dynamics_prediction is None:
            return self.loss
        return replace(self.loss, prediction=self.dynamics_prediction)

    def _check(self) -> None:
        if self.dynamics_prediction is not None:
            check_choice("dynamics_prediction", self.dynamics_prediction, PREDICTIONS)
        for role in (self.networks()[0], "dynamics"):
            self.denoiser(role, 1, 1, self.unit_sizes)
        make_schedule(self.schedule, self.diffusion_steps)


def planner_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """Sampling options for an agent without a dynamics model.

    The default composition, which is for two models, becomes ``"planner_only"``.
    """
    if sampling.composition == SamplingConfig.composition:
        return replace(sampling, composition="planner_only")
    return sampling
