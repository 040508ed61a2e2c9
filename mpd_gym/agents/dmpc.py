"""Diffusion model predictive control, D-MPC (Zhou et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.agents.config import FactoredConfig, planner_sampling
from mpd_gym.agents.factored import FactoredAgent
from mpd_gym.agents.fitting import Task
from mpd_gym.agents.losses import ValueTask, actions_only
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.request import Request
from mpd_gym.diffusion import PLANNER_COMPOSITIONS, Parts, compose, make_move, sample
from mpd_gym.errors import ConfigError
from mpd_gym.models import TrajectoryDenoiser, UnetConfig, ValueConfig, ValueNetwork
from mpd_gym.types import Denoiser, Step

__all__ = ["DMPCAgent", "DMPCConfig"]


@final
@dataclass(frozen=True)
class DMPCConfig(FactoredConfig):
    """Configuration of D-MPC. The other fields are those of `FactoredConfig`.

    A condition of kind ``"return"`` is what the value network J predicts, by which candidates are
    ranked where no reward is learned or given. The action proposal is conditioned on every other
    one, such as ``"goal"``. ``"cost"`` is not there: a budget is kept by ranking alone.

    The networks are this package's temporal U-Nets in the place of transformers, and all have
    `diffusion_steps` levels.

    Attributes:
        dynamics_conditions: As there; the paper's dynamics model sees none.
        value_unet: Size of the value network's encoder; None for the proposal's.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    output = "actions"

    dynamics_conditions: bool = False
    value_unet: UnetConfig | None = None

    @property
    def initial_state(self) -> str:
        """Where x_0 stands."""
        return "film"

    def networks(self) -> list[str]:
        """Action proposal, dynamics model, and the value network if there is a return."""
        value = [] if self.value_condition is None else ["value"]
        return ["proposal", "dynamics", *value]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> nn.Module:
        """Make one of them."""
        if role == "value":
            return ValueNetwork(self._value(nx, nu))
        return TrajectoryDenoiser(self.denoiser(role, nx, nu, sizes))

    def condition_sizes(self, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """(name, length) of each condition of the proposal."""
        seen = [spec.name for spec in self.conditions if spec.kind != "return"]
        return tuple((name, sizes[name]) for name in seen)

    def _value(self, nx: int, nu: int) -> ValueConfig:
        return ValueConfig(nx + nu, self.horizon, self.value_unet or self.unet)

    def _check(self) -> None:
        super()._check()
        kinds = [spec.kind for spec in self.conditions]
        if "cost" in kinds or kinds.count("return") > 1:
            raise ConfigError(
                "conditions: D-MPC ranks by one return and proposes actions for the other "
                f"conditions; expected no 'cost' and one 'return' at most, got {kinds}"
            )
        object.__setattr__(self, "sampling", planner_sampling(self.sampling))
        self._value(1, 1)


@final
class DMPCAgent(FactoredAgent[DMPCConfig]):
    """Actions are proposed, then the states are predicted that they lead to, then plans are scored.

    Make one with `fit` or `load`. Each of N candidates is one run of Algorithm 2 of the paper: an
    action sequence from the proposal ρ(u | x_0), states from the dynamics model p(x | x_0, u) given
    these actions without noise, and their value J. Another reward is optimised after `set_reward`,
    other dynamics after `finetune_dynamics`.
    """

    name = "dmpc"
    config_type = DMPCConfig

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        nx = self._nx

        def noise_of(columns: slice) -> Tensor:
            return request.noise()[..., columns]

        actions = sample(
            self._step(request, levels), start[..., nx:], levels, lambda: noise_of(slice(nx, None))
        )
        states = sample(
            self._prediction(request, levels, actions),
            start[..., :nx],
            levels,
            lambda: noise_of(slice(nx)),
        )
        return torch.cat((states, actions), dim=-1)

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        """Reverse step of the proposal, on actions."""
        return self._alone(
            self._denoiser("proposal", request, levels, columns=slice(self._nx, None))
        )

    def _prediction(self, request: Request, levels: Sequence[int], actions: Tensor) -> Step:
        """Reverse step of the dynamics model, on states beside known actions."""
        dynamics = self._denoiser("dynamics", request, levels)
        return self._alone(lambda states, k: dynamics(torch.cat((states, actions), dim=-1), k))

    def _alone(self, denoiser: Denoiser) -> Step:
        """Reverse step of one network."""
        options = self.options
        move = make_move(options.sampler, options.eta)
        parts = Parts(denoiser, None, self._schedule, self._nx, move, options.temperature)
        return compose(options.composition, parts)

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        return trajectories[..., : self._nx], trajectories[..., self._nx :]

    def _check_options(self, options: SamplingConfig) -> None:
        if options.composition not in PLANNER_COMPOSITIONS:
            raise ConfigError(
                "composition: D-MPC samples actions and states one after the other, each alone; "
                f"expected one of {sorted(PLANNER_COMPOSITIONS)}, got {options.composition!r}"
            )

    def _task(self, role: str) -> Task:
        if role == "proposal":
            return self._denoising_task(role, rearrange=actions_only)
        if role == "dynamics":
            return self._denoising_task(role, actions_given=True)
        target = self.config.value_condition
        assert target is not None, "or there would be no value network"
        return ValueTask(None, (), target.name, self.device, self.config.initial_state)
