"""Configuration of MPDiffuser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from mpd_gym.agents.options import SamplingConfig, from_mapping
from mpd_gym.datasets import ConditionSpec, WindowConfig
from mpd_gym.diffusion import LossConfig, make_schedule
from mpd_gym.errors import ConfigError
from mpd_gym.models import DenoiserConfig, RegressorConfig, UnetConfig
from mpd_gym.training import TrainingConfig

__all__ = ["REGRESSORS", "MPDiffuserConfig"]

REGRESSORS = ("reward", "cost", "termination")


@final
@dataclass(frozen=True)
class MPDiffuserConfig:
    """Everything that defines a trained MPDiffuser, and how it samples by default.

    The defaults are the paper's (appendix B) but for the normaliser, the padding and the null
    condition; `mpd_gym.agents.presets` has laptop-size ones for each environment. Round-trips
    through ``dataclasses.asdict`` and JSON.

    Attributes:
        horizon: H, steps of a plan.
        conditions: What plans are conditioned on: kinds such as ``"return"``, or `ConditionSpec`s.
        discount: γ of returns and costs.
        padding: What follows the end of an episode, ``"repeat"``, ``"zeros"`` (the authors') or
            ``"none"``, see `WindowConfig`.
        first_step_share: Share of the windows that is moved to the first step of an episode.
        normalizer: ``"minmax"``, ``"cdf"`` (the authors') or ``"gaussian"``.
        unet: Size of the planner's network.
        dynamics_unet: Size of the dynamics model's; None for the planner's.
        dynamics_conditions: Whether the dynamics model sees the conditions (appendix J).
        null: How a network is told that a condition is absent: ``"flag"``, ``"learned"``, or
            ``"zeros"`` (the authors').
        initial_state: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps (appendix D).
        schedule: Noise schedule, ``"cosine"``, ``"linear"`` or ``"vp"``.
        diffusion_steps: K.
        loss: Options of the denoising loss.
        reward_model: Learn rewards, for ranking.
        cost_model: Learn costs, for ranking and budgets.
        termination_model: Learn where episodes end, for ranking.
        regressor_inputs: ``"state_action"``, or ``"transition"`` where reward or cost depend on
            the state that is reached.
        training: Of planner and dynamics model.
        regressor_training: Of the other models.
        sampling: Default options of the agent.
        validation_fraction: Share of the episodes that is held out, in [0, 1).
        seed: Of initial weights, data split and the agent's noise; training has its own.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    horizon: int = 32
    conditions: tuple[ConditionSpec, ...] = ()
    discount: float = 0.997
    padding: str = "repeat"
    first_step_share: float = 0.0
    normalizer: str = "minmax"
    unet: UnetConfig = field(default_factory=UnetConfig)
    dynamics_unet: UnetConfig | None = None
    dynamics_conditions: bool = True
    null: str = "flag"
    initial_state: str = "film"
    schedule: str = "cosine"
    diffusion_steps: int = 100
    loss: LossConfig = field(default_factory=LossConfig)
    reward_model: bool = False
    cost_model: bool = False
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
        specs = [{"kind": part} if isinstance(part, str) else part for part in self.conditions]
        object.__setattr__(self, "conditions", tuple(specs))
        nested = {
            "unet": UnetConfig,
            "dynamics_unet": UnetConfig,
            "loss": LossConfig,
            "training": TrainingConfig,
            "regressor_training": TrainingConfig,
            "sampling": SamplingConfig,
        }
        for name, kind in nested.items():
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, from_mapping(kind, getattr(self, name)))
        object.__setattr__(self, "conditions", self.windows.conditions)
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction: expected a share in [0, 1), got {self.validation_fraction}"
            )
        self.denoiser("planner", 1, 1, {spec.name: 1 for spec in self.conditions})
        self.denoiser("dynamics", 1, 1, {spec.name: 1 for spec in self.conditions})
        RegressorConfig(1, 1, "reward", self.regressor_inputs)  # type: ignore[arg-type]
        make_schedule(self.schedule, self.diffusion_steps)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MPDiffuserConfig:
        """Build a configuration from what ``dataclasses.asdict`` and JSON made of one.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        config: MPDiffuserConfig = from_mapping(cls, values)
        return config

    @property
    def windows(self) -> WindowConfig:
        """Shape of the training windows."""
        return WindowConfig(
            self.horizon, self.discount, self.padding, self.conditions, self.first_step_share
        )

    @property
    def plan_horizon(self) -> int:
        """Future steps of a plan."""
        return self.horizon if self.initial_state == "film" else self.horizon - 1

    def denoiser(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> DenoiserConfig:
        """Configuration of the network ``"planner"`` or ``"dynamics"``.

        Args:
            role: Which one.
            nx: Size of an observation.
            nu: Size of an action.
            sizes: Length of each condition.
        """
        planner = role == "planner"
        seen = planner or self.dynamics_conditions
        return DenoiserConfig(
            observation_dim=nx,
            action_dim=nu,
            horizon=self.horizon,
            output="trajectory" if planner else "observations",
            conditions=tuple((spec.name, sizes[spec.name]) for spec in self.conditions)
            if seen
            else (),
            null=self.null,  # type: ignore[arg-type]
            initial_state=self.initial_state,  # type: ignore[arg-type]
            unet=self.unet if planner else self.dynamics_unet or self.unet,
        )

    def roles(self) -> list[str]:
        """Models that an agent of this configuration has."""
        return ["planner", "dynamics"] + [
            target for target in REGRESSORS if getattr(self, f"{target}_model")
        ]
