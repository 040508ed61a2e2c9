"""Diffusion model predictive control, D-MPC (Zhou et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from mpd_gym.agents.config import FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.losses import TrainingTask, ValueTask, actions_only
from mpd_gym.agents.planning import Request
from mpd_gym.datasets import ConditionSpec
from mpd_gym.diffusion import sample
from mpd_gym.models import UnetConfig

__all__ = ["DMPCAgent", "DMPCConfig"]


@final
@dataclass(frozen=True)
class DMPCConfig(FactoredConfig):
    """Configuration of D-MPC. The other fields are those of `FactoredConfig`.

    A condition of kind ``"return"`` is what the value network J predicts, by which candidates are
    ranked where no reward is learned or given. The action proposal is conditioned on every other
    one, such as ``"goal"``. ``"cost"`` is not there: a budget is kept by ranking alone.

    The networks are this package's temporal U-Nets instead of transformers, and all have
    `diffusion_steps` levels.

    Attributes:
        dynamics_conditions: As there; the paper's dynamics model sees none.
        value_unet: Size of the value network's encoder; None for the proposal's.
    """

    own = ("proposal", "dynamics", "value")
    output = "actions"

    dynamics_conditions: bool = False
    value_unet: UnetConfig | None = None

    @property
    def initial_state(self) -> str:
        """Where x_0 stands."""
        return "film"

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """It asks for no budget, and scores plans by a value instead of learned rewards.

        Candidates are all its search: 16 here, 64 in its paper. Given clean actions, the states are
        nearly known: predicted noise leaves them 0.6 m off in the maze, predicted x̂_0 0.2 m
        (``python -m studies dynamics-accuracy``).
        """
        kept = tuple(spec for spec in base.conditions if spec.kind not in ("cost", "return"))
        value = base.condition("return") or ConditionSpec("return")
        return {
            "conditions": (*kept, replace(value, when="always")),
            "reward_model": False,
            "dynamics_conditions": False,
            "dynamics_prediction": "x0",
            "sampling": replace(
                base.sampling,
                composition="planner_only",
                num_candidates=16,
                samples_per_candidate=1,
            ),
        }


@final
class DMPCAgent(DiffusionAgent[DMPCConfig]):
    """Actions are proposed, then the states are predicted that they lead to, then plans are scored.

    Make one with `fit` or `load`. Each of N candidates is one run of Algorithm 2 of the paper: an
    action sequence from the proposal ρ(u | x_0), states from the dynamics model p(x | x_0, u) given
    these actions without noise, and their value J. Another reward is optimised after `set_reward`,
    other dynamics after `finetune_dynamics`.
    """

    name = "dmpc"
    config_type = DMPCConfig

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        nx = self.layout.states
        proposal = self._denoiser("proposal", request, levels, columns=slice(nx, None))
        actions = sample(
            self._step(proposal), start[..., nx:], levels, lambda: request.noise()[..., nx:]
        )
        dynamics = self._denoiser("dynamics", request, levels)

        def prediction(states: Tensor, k: int) -> Tensor:
            return dynamics(torch.cat((states, actions), dim=-1), k)

        states = sample(
            self._step(prediction), start[..., :nx], levels, lambda: request.noise()[..., :nx]
        )
        return torch.cat((states, actions), dim=-1)

    def _task(self, role: str) -> TrainingTask:
        if role == "proposal":
            return self._denoising_task(role, rearrange=actions_only)
        if role == "dynamics":
            return self._denoising_task(role, actions_given=True)
        target = self.config.condition("return")
        assert target is not None, "or there would be no value network"
        return ValueTask(None, (), target.name, self.device, self.config.initial_state)
