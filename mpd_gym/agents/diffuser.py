"""Diffuser (Janner, Du, Tenenbaum and Levine 2022): inpainting, and guidance by a value."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym.agents.config import DiffusionConfig, Layout, planner_sampling
from mpd_gym.agents.diffusion_agent import DiffusionAgent, Known
from mpd_gym.agents.fitting import Task
from mpd_gym.agents.losses import ValueTask, with_conditions
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.request import Request, given_columns
from mpd_gym.diffusion import ascend, make_schedule
from mpd_gym.errors import ConfigError, check_integer
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig, ValueConfig, ValueNetwork
from mpd_gym.types import Array, Step

__all__ = ["DiffuserAgent", "DiffuserConfig"]


@final
@dataclass(frozen=True)
class DiffuserConfig(DiffusionConfig):
    """Configuration of Diffuser. The other fields are those of `DiffusionConfig`.

    A condition of kind ``"return"`` is what the value network predicts. Every other one, such as
    ``"goal"``, is appended to the state, and inpainted in every row of a plan. ``"cost"`` is not
    there: Diffuser has nothing that asks for a budget.

    Attributes:
        value_unet: Size of the value network's encoder; None for the planner's.
        guidance_ascents: Ascents of the value at each level.
        guidance_free_levels: Lowest levels, which have none.
        sampling: Default options; `guidance_scale` is the factor on gradient times posterior
            variance, of the value in environment units.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    value_unet: UnetConfig | None = None
    guidance_ascents: int = 2
    guidance_free_levels: int = 2
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(guidance_scale=0.1))

    @property
    def initial_state(self) -> str:
        """Where x_0 stands."""
        return "inpaint"

    @property
    def appended(self) -> tuple[str, ...]:
        """Conditions that are appended to the state."""
        return tuple(spec.name for spec in self.conditions if spec.kind != "return")

    def networks(self) -> list[str]:
        """The planner, and the value network if there is a return to climb."""
        return ["planner"] if self.value_condition is None else ["planner", "value"]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> nn.Module:
        """Make one of them."""
        if role == "planner":
            return TrajectoryDenoiser(self._denoiser(nx, nu, sizes))
        return ValueNetwork(self._value(nx, nu, sizes))

    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""
        columns = self._state_size(nx, sizes) + nu
        return Layout(self.horizon, columns, self.plan_horizon, self.diffusion_steps)

    def _state_size(self, nx: int, sizes: Mapping[str, int]) -> int:
        return nx + sum(sizes[name] for name in self.appended)

    def _denoiser(self, nx: int, nu: int, sizes: Mapping[str, int]) -> DenoiserConfig:
        size = self._state_size(nx, sizes)
        return DenoiserConfig(size, nu, self.horizon, initial_state="inpaint", unet=self.unet)

    def _value(self, nx: int, nu: int, sizes: Mapping[str, int]) -> ValueConfig:
        columns = self._state_size(nx, sizes) + nu
        return ValueConfig(columns, self.horizon, self.value_unet or self.unet)

    def _check(self) -> None:
        kinds = [spec.kind for spec in self.conditions]
        if "cost" in kinds or kinds.count("return") > 1:
            raise ConfigError(
                "conditions: Diffuser climbs one return and inpaints goals; expected no 'cost' and "
                f"one 'return' at most, got {kinds}"
            )
        check_integer("guidance_ascents", self.guidance_ascents, 1)
        check_integer("guidance_free_levels", self.guidance_free_levels, 0)
        object.__setattr__(self, "sampling", planner_sampling(self.sampling))
        self._denoiser(1, 1, self.unit_sizes)
        self._value(1, 1, self.unit_sizes)
        make_schedule(self.schedule, self.diffusion_steps)


@final
class DiffuserAgent(DiffusionAgent[DiffuserConfig]):
    """A planner of states and actions with x_0 and goals inpainted, guided by a value network.

    Make one with `fit` or `load`. Candidates are ranked by the value network where the agent has
    one and no reward is learned or given.
    """

    name = "diffuser"
    config_type = DiffuserConfig

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        appended = given_columns(request, self.conditions, self.config.appended)
        initial = torch.cat((request.initial, appended), dim=-1)
        known = self._known(initial)
        assert known is not None, "it inpaints"
        step = self._composed(replace(request, initial=initial), levels, known)
        target = self.config.value_condition
        if target is None:
            return step
        scaling = self.conditions.scalings[target.name]
        return ascend(
            step,
            self.models["value"],
            self._schedule,
            scale=self.options.guidance_scale * (scaling.high - scaling.low),
            num_ascents=self.config.guidance_ascents,
            free_levels=self.config.guidance_free_levels,
            hold=functools.partial(_held, known),
        )

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        return self._future(trajectories[..., : self._nx], trajectories[..., -self._writer.size :])

    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        unknown = {"goal": self.normalizers.goal, "final_state": self.normalizers.observation}
        ranges = [self.normalizers.observation.clip_range]
        for spec in self.config.conditions:
            if spec.name in self.config.appended:
                normalizer = unknown.get(spec.kind)
                size = self.conditions.sizes[spec.name]
                unbounded = np.full(size, -np.inf), np.full(size, np.inf)
                ranges.append(unbounded if normalizer is None else normalizer.clip_range)
        return [*ranges, self.normalizers.action.clip_range]

    def _task(self, role: str) -> Task:
        appended, target = self.config.appended, self.config.value_condition
        if role == "planner":
            rearrange = functools.partial(with_conditions, names=appended)
            return self._denoising_task(role, rearrange=rearrange)
        assert target is not None, "or there would be no value network"
        return ValueTask(self._schedule, appended, target.name, self.device)


def _held(known: Known, trajectory: Tensor) -> Tensor:
    return torch.where(known.mask, known.values, trajectory)
