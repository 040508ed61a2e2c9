"""Diffuser (Janner, Du, Tenenbaum and Levine 2022): inpainting, and guidance by a value."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from mpd_gym.agents.config import DiffusionConfig, FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent, Inpainting
from mpd_gym.agents.losses import TrainingTask, ValueTask, with_conditions
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.planning import Request, given_columns
from mpd_gym.diffusion import ascend, sample
from mpd_gym.errors import check_integer
from mpd_gym.models import UnetConfig
from mpd_gym.types import Step

__all__ = ["VALUE_GUIDANCE_SCALE", "DiffuserAgent", "DiffuserConfig"]

VALUE_GUIDANCE_SCALE = 0.1  # of the authors' Diffuser
_ascents, _levels = (functools.partial(check_integer, low=low) for low in (1, 0))


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
    """

    own = ("planner", "value")
    appends_conditions = True

    value_unet: UnetConfig | None = None
    guidance_ascents: int = field(
        default=2, metadata={"check": functools.partial(check_integer, low=1)}
    )
    guidance_free_levels: int = field(
        default=2, metadata={"check": functools.partial(check_integer, low=0)}
    )
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(guidance_scale=VALUE_GUIDANCE_SCALE)
    )

    @property
    def initial_state(self) -> str:
        """Where x_0 stands."""
        return "inpaint"

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """It asks for no budget, and climbs the value instead of being conditioned on return."""
        return {
            "conditions": tuple(spec for spec in base.conditions if spec.kind != "cost"),
            "sampling": replace(
                base.sampling,
                composition="planner_only",
                guidance_scale=VALUE_GUIDANCE_SCALE,
                action_chunk=min(base.sampling.action_chunk, base.horizon - 1),
            ),
        }


@final
class DiffuserAgent(DiffusionAgent[DiffuserConfig]):
    """A planner of states and actions with x_0 and goals inpainted, guided by a value network.

    Make one with `fit` or `load`. Candidates are ranked by the value network where the agent has
    one and no reward is learned or given.
    """

    name = "diffuser"
    config_type = DiffuserConfig

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        appended = given_columns(request, self.conditions, self.config.inputs)
        initial = torch.cat((request.initial, appended), dim=-1)
        known = self._known(initial)
        assert known is not None, "it inpaints"
        step = self._composed(replace(request, initial=initial), levels, known)
        step = self._guided(step, known)
        return sample(step, start, levels, request.noise)

    def _guided(self, step: Step, known: Inpainting) -> Step:
        """The step, followed by ascents of the value where there is one."""
        target = self.config.condition("return")
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

    def _task(self, role: str) -> TrainingTask:
        appended, target = self.config.inputs, self.config.condition("return")
        if role == "planner":
            rearrange = functools.partial(with_conditions, names=appended)
            return self._denoising_task(role, rearrange=rearrange)
        assert target is not None, "or there would be no value network"
        return ValueTask(self._schedule, appended, target.name, self.device)


def _held(known: Inpainting, trajectory: Tensor) -> Tensor:
    return torch.where(known.mask, known.values, trajectory)
