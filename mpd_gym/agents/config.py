"""What the configurations of all agents have in common."""

from __future__ import annotations

import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from mpd_gym.agents.options import SamplingConfig
from mpd_gym.datasets import ConditionSpec, WindowConfig
from mpd_gym.diffusion import PREDICTIONS, LossConfig, make_schedule
from mpd_gym.errors import (
    ConfigError,
    check_choice,
    check_integer,
    check_number,
    from_mapping,
)
from mpd_gym.models import (
    MLP,
    DenoiserConfig,
    MLPConfig,
    Regressor,
    RegressorConfig,
    TrajectoryDenoiser,
    UnetConfig,
    ValueConfig,
    ValueNetwork,
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
    "Sizes",
]

REGRESSORS = ("reward", "cost", "termination")
INVERSE_DYNAMICS = "inverse_dynamics"
_OPTIONAL = {**{role: f"{role}_model" for role in REGRESSORS}, INVERSE_DYNAMICS: INVERSE_DYNAMICS}
"""Models that an agent may learn beside its method's own, and the field that says so."""
NOT_OF_WEIGHTS = {"sampling", "training", "regressor_training", *_OPTIONAL.values()}
"""Fields that shape no weights, say which models there are, or that trainings compare themselves.
"""
# Channels of a U-Net that the noise of a column takes from input to output. With 4 each, 2 % of it
# is lost after 1,000 steps of training, with 2 it is 40 % (``python -m studies noise-width``).
CHANNELS_PER_NOISE = 4
MOST_LEVELS = 10_000


class Sizes(NamedTuple):
    """What the networks of an agent must fit.

    Attributes:
        nx: Size of an observation.
        nu: Size of an action.
        conditions: Length of each condition by its name.
    """

    nx: int
    nu: int
    conditions: Mapping[str, int]


class Layout(NamedTuple):
    """Shape of what an agent samples: rows of a state, what is appended to it, and an action.

    Attributes:
        rows: L.
        states: Columns before the actions.
        actions: Columns of the actions; 0 where plans hold none.
        levels: K, diffusion levels; 0 for an agent without diffusion.
        inpainted: Whether the first row is x_0. It is then no future step, and the last row's
            action leads nowhere.
    """

    rows: int
    states: int
    actions: int
    levels: int
    inpainted: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """L and D of a trajectory."""
        return self.rows, self.states + self.actions

    @property
    def horizon(self) -> int:
        """H, future steps of a plan."""
        return self.rows - self.inpainted

    def split(self, trajectories: Tensor, nx: int) -> tuple[Tensor, Tensor]:
        """x_1 … x_H and u_0 … u_{H-1} of trajectories ``[M, L, D]``."""
        states, actions = trajectories[..., :nx], trajectories[..., self.states :]
        return (states[:, 1:], actions[:, :-1]) if self.inpainted else (states, actions)


@dataclass(frozen=True, kw_only=True)
class AgentConfig(ABC):
    """Fields that every agent has. Round-trips through ``dataclasses.asdict`` and JSON.

    A field whose metadata has a ``check`` is checked by it: a function of the field's name and
    value.

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
        for entry in fields(self):
            value = _completed(getattr(self, entry.name), _nested(type(self)).get(entry.name))
            entry.metadata.get("check", lambda name, value: None)(entry.name, value)
            object.__setattr__(self, entry.name, value)
        specs = [{"kind": part} if isinstance(part, str) else part for part in self.conditions]
        windows = WindowConfig(conditions=tuple(specs))
        object.__setattr__(self, "conditions", windows.conditions)
        check_number("validation_fraction", self.validation_fraction, 0, math.nextafter(1, 0))
        check_integer("seed", self.seed, 0)
        check_choice("regressor_inputs", self.regressor_inputs, INPUTS)
        if self.binary_costs and not self.cost_model:
            raise ConfigError(
                "binary_costs: says how costs are learned, and this configuration learns none; set "
                "cost_model=True as well"
            )
        sizes = Sizes(1, 1, {spec.name: 1 for spec in self.conditions})
        self._check(sizes)
        self.windows  # noqa: B018 - refuses wrong windows
        self._regressor("reward", sizes)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from what ``dataclasses.asdict`` and JSON made of one.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        config: Self = from_mapping(cls, values)
        return config

    def roles(self) -> list[str]:
        """Models that an agent of this configuration has, the method's own before the others."""
        own = self.networks()
        wanted = [role for role, name in _OPTIONAL.items() if getattr(self, name, False)]
        return own + [role for role in wanted if role not in own]

    def models(self, sizes: Sizes) -> dict[str, nn.Module]:
        """Make all models with seeded weights; the global random state stays as it is."""
        models: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            for number, role in enumerate(self.roles()):
                torch.manual_seed((self.seed * 1000 + number) % 2**63)
                if role in REGRESSORS:
                    models[role] = Regressor(self._regressor(role, sizes))
                else:
                    models[role] = self.network(role, sizes)
        return models

    def _regressor(self, role: str, sizes: Sizes) -> RegressorConfig:
        target: Any = "violation" if role == "cost" and self.binary_costs else role
        inputs: Any = self.regressor_inputs
        goal = self.condition("goal")
        goal_dim = 0 if goal is None else sizes.conditions[goal.name]
        return RegressorConfig(sizes.nx, sizes.nu, target, inputs, goal_dim=goal_dim)

    def condition(self, kind: str) -> ConditionSpec | None:
        """The first condition of a kind; None without one."""
        return next((spec for spec in self.conditions if spec.kind == kind), None)

    # --- what a method supplies -------------------------------------------------------------

    @classmethod
    @abstractmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """What makes the method: fields that differ from MPDiffuser's preset `base`."""

    @property
    @abstractmethod
    def windows(self) -> WindowConfig:
        """Shape of the training windows."""

    @abstractmethod
    def networks(self) -> list[str]:
        """Roles of the method's own networks."""

    @abstractmethod
    def network(self, role: str, sizes: Sizes) -> nn.Module:
        """Make one of them."""

    @abstractmethod
    def layout(self, sizes: Sizes) -> Layout:
        """Shape of what the agent samples."""

    @abstractmethod
    def resolved(self, sizes: Sizes) -> Self:
        """This configuration with everything settled that depends on the data's sizes."""

    @abstractmethod
    def _check(self, sizes: Sizes) -> None:
        """Check the method's fields and, with sizes that stand for any, its networks."""


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
            not add up over a plan. The model is an MLP, trained as `regressor_training` says on
            the planner's data, which plans resemble: where recorded actions have no effect, such as
            steering at full lock, it would learn their mean.
        inverse_hidden: Widths of its hidden layers.
    """

    own: ClassVar[tuple[str, ...]]
    """Roles of the method's networks. ``"value"`` is left out where there is no return."""
    composed: ClassVar[bool] = False
    """Whether planner and dynamics model sample together, as `COMPOSITIONS` say."""
    output: ClassVar[Literal["trajectory", "actions"]] = "trajectory"
    """What the network beside the dynamics model predicts."""
    plans_actions: ClassVar[bool] = True
    """Whether plans hold actions; where they do not, inverse dynamics find them."""
    appends_conditions: ClassVar[bool] = False
    """Whether conditions are columns of the state; elsewhere they reach the network by FiLM."""

    horizon: int = 32
    first_step_share: float = 0.0
    unet: UnetConfig = field(default_factory=UnetConfig)
    null: str = "flag"
    schedule: str = "cosine"
    diffusion_steps: int = 100
    loss: LossConfig = field(default_factory=LossConfig)
    inverse_dynamics: bool = False
    inverse_hidden: tuple[int, ...] = (256, 256)

    @property
    @abstractmethod
    def initial_state(self) -> str:
        """Where x_0 stands: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps."""

    @property
    def windows(self) -> WindowConfig:
        """Shape of the training windows."""
        return WindowConfig(
            self.horizon, self.discount, self.padding, self.conditions, self.first_step_share
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Conditions that the denoisers see: all but the return that a value network predicts."""
        return tuple(
            spec.name
            for spec in self.conditions
            if spec.kind != "return" or "value" not in self.own
        )

    def networks(self) -> list[str]:
        """Roles of the method's own networks."""
        value = self.condition("return") is not None
        return [role for role in self.own if role != "value" or value]

    def network(self, role: str, sizes: Sizes) -> nn.Module:
        """Make one of them, or the inverse dynamics."""
        if role == INVERSE_DYNAMICS:
            return MLP(MLPConfig(2 * sizes.nx, sizes.nu, self.inverse_hidden))
        if role == "value":
            return ValueNetwork(self._value(sizes))
        return TrajectoryDenoiser(self.denoiser(role, sizes))

    def denoiser(self, role: str, sizes: Sizes) -> DenoiserConfig:
        """Configuration of the dynamics model's network, or of the one beside it."""
        layout = self.layout(sizes)
        seen = not self.appends_conditions and self._of(role, "conditions", True)
        names = self.inputs if seen else ()
        return DenoiserConfig(
            observation_dim=layout.states,
            action_dim=layout.actions,
            horizon=self.horizon,
            output="observations" if role == "dynamics" else self.output,
            conditions=tuple((name, sizes.conditions[name]) for name in names),
            null=self.null,  # type: ignore[arg-type]
            initial_state=self.initial_state,  # type: ignore[arg-type]
            unet=self._of(role, "unet", self.unet),
        )

    def layout(self, sizes: Sizes) -> Layout:
        """Shape of what the agent samples."""
        appended = self.inputs if self.appends_conditions else ()
        return Layout(
            rows=self.horizon,
            states=sizes.nx + sum(sizes.conditions[name] for name in appended),
            actions=sizes.nu if self.plans_actions else 0,
            levels=self.diffusion_steps,
            inpainted=self.initial_state == "inpaint",
        )

    def loss_of(self, role: str) -> LossConfig:
        """Options of the denoising loss of one network."""
        prediction = self._of(role, "prediction", self.loss.prediction)
        return replace(self.loss, prediction=prediction)

    def resolved(self, sizes: Sizes) -> Self:
        """Settle what the networks predict: noise where it fits through them, otherwise x̂_0.

        A warning tells of a network that is to predict more noise than fits
        (``python -m studies noise-width``).
        """
        columns, carried = self.layout(sizes).shape[1], self.unet.width // CHANNELS_PER_NOISE
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

    def _of(self, role: str, name: str, common: Any) -> Any:
        """A setting of one network: its field, such as ``dynamics_unet``, or else the common."""
        own = getattr(self, f"{role}_{name}", None)
        return common if own is None else own

    def _value(self, sizes: Sizes) -> ValueConfig:
        columns = self.layout(sizes).shape[1]
        return ValueConfig(columns, self.horizon, self._of("value", "unet", self.unet))

    def _check(self, sizes: Sizes) -> None:
        MLPConfig(1, 1, self.inverse_hidden)  # refuses wrong widths
        check_integer("diffusion_steps", self.diffusion_steps, 2, MOST_LEVELS)
        kinds = [spec.kind for spec in self.conditions]
        if "value" in self.own and ("cost" in kinds or kinds.count("return") > 1):
            raise ConfigError(
                "conditions: the value network predicts one return, and the others are goals or "
                f"states; expected no 'cost' and one 'return' at most, got {kinds}"
            )
        if not self.plans_actions and not self.inverse_dynamics:
            raise ConfigError(
                "inverse_dynamics: this method plans states alone and has no other actions; "
                "expected True, got False"
            )
        if not self.composed and self.sampling.composition == SamplingConfig.composition:
            sampling = replace(self.sampling, composition="planner_only")
            object.__setattr__(self, "sampling", sampling)
        for role in self.networks():
            if role == "value":
                self._value(sizes)
            elif role != INVERSE_DYNAMICS:
                self.denoiser(role, sizes)
                prediction = self._of(role, "prediction", PREDICTIONS[0])
                check_choice(f"{role}_prediction", prediction, PREDICTIONS)
        make_schedule(self.schedule, self.diffusion_steps)


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

    dynamics_unet: UnetConfig | None = None
    dynamics_conditions: bool = True
    dynamics_prediction: Literal["noise", "x0"] | None = None


@functools.cache
def _nested(config: type[AgentConfig]) -> dict[str, type]:
    """Class of each field that is another configuration, an optional one, or a tuple of them."""
    return {
        name: part
        for name, hint in get_type_hints(config).items()
        for part in (hint, *get_args(hint))
        if isinstance(part, type) and is_dataclass(part)
    }


def _completed(value: Any, kind: type | None) -> Any:
    """A field's value from JSON: lists as tuples, mappings as the configurations they describe."""
    if isinstance(value, (list, tuple)):
        return tuple(_completed(part, kind) for part in value)
    if kind is not None and isinstance(value, Mapping):
        return from_mapping(kind, value)
    return value
