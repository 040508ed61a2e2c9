"""MPDiffuser's planner alone: the ablation of its dynamics model (Balim et al. 2025, app. H)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, final

from torch import Tensor

from mpd_gym.agents.config import DiffusionConfig, Layout, planner_sampling
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.fitting import DenoisingTask
from mpd_gym.agents.request import Request
from mpd_gym.diffusion import PLANNER_COMPOSITIONS, make_schedule
from mpd_gym.errors import InputError
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser
from mpd_gym.types import Array, Step

__all__ = ["PlannerAgent", "PlannerConfig", "planner_denoiser", "planner_of"]

A = TypeVar("A", bound=DiffusionAgent[Any])


@final
@dataclass(frozen=True)
class PlannerConfig(DiffusionConfig):
    """Configuration of a planner without a dynamics model.

    For as many network calls as MPDiffuser has at K levels, either train with twice as many
    `diffusion_steps`, or sample with the composition ``"planner_resampled"``, which takes every
    level twice and needs no other network. The other fields are those of `DiffusionConfig` and
    `AgentConfig`.

    Attributes:
        initial_state: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    initial_state: str = "film"

    def networks(self) -> list[str]:
        """The planner."""
        return ["planner"]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> TrajectoryDenoiser:
        """Make the planner's network."""
        return TrajectoryDenoiser(planner_denoiser(self, nx, nu, sizes))

    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""
        return Layout(self.horizon, nx + nu, self.plan_horizon, self.diffusion_steps)

    def _check(self) -> None:
        object.__setattr__(self, "sampling", planner_sampling(self.sampling))
        planner_denoiser(self, 1, 1, self.unit_sizes)
        make_schedule(self.schedule, self.diffusion_steps)


@final
class PlannerAgent(DiffusionAgent[PlannerConfig]):
    """A planner of states and actions, conditioned on x_0 as MPDiffuser's.

    Make one with `fit` or `load`, or with `of` from an agent whose planner is trained already.
    """

    name = "planner"
    config_type = PlannerConfig

    @classmethod
    def of(cls, agent: DiffusionAgent[Any]) -> PlannerAgent:
        """Agent of another one's planner, see `planner_of`."""
        return planner_of(cls, agent)

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        return self._composed(request, levels, self._known(request.initial))

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        return self._future(trajectories[..., : self._nx], trajectories[..., self._nx :])

    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        return [self.normalizers.observation.clip_range, self.normalizers.action.clip_range]

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role)


def planner_denoiser(
    config: DiffusionConfig, nx: int, nu: int, sizes: Mapping[str, int]
) -> DenoiserConfig:
    """Configuration of a planner's network, the same as MPDiffuser's.

    Args:
        config: Of the agent.
        nx: Size of an observation.
        nu: Size of an action; 0 for a planner of states alone.
        sizes: Length of each condition.
    """
    return DenoiserConfig(
        observation_dim=nx,
        action_dim=nu,
        horizon=config.horizon,
        conditions=config.condition_sizes(sizes),
        null=config.null,  # type: ignore[arg-type]
        initial_state=config.initial_state,  # type: ignore[arg-type]
        unet=config.unet,
    )


def planner_of(kind: type[A], agent: DiffusionAgent[Any], **changes: Any) -> A:
    """Make an agent of another one's planner; they share the weights.

    Options, rewards, costs and rankers are those of the other agent; a composition that needs a
    dynamics model becomes ``"planner_only"``.

    Args:
        kind: Class of the new agent.
        agent: An agent whose planner is laid out like MPDiffuser's.
        changes: Other fields of the new configuration.

    Raises:
        InputError: If the planner is laid out in another way.
    """
    names = {entry.name for entry in fields(agent.config)}
    if "initial_state" not in names:
        raise InputError(
            f"agent: expected one with a planner like MPDiffuser's, got {type(agent).__name__}; "
            f"train with {kind.__name__}.fit"
        )
    options = agent.options
    if options.composition not in PLANNER_COMPOSITIONS:
        options = replace(options, composition="planner_only")
    common = {entry.name for entry in fields(kind.config_type)} & names
    values = {name: getattr(agent.config, name) for name in common}
    made = kind(
        kind.config_type(**{**values, "sampling": options, **changes}),
        {role: model for role, model in agent.models.items() if role != "dynamics"},
        agent.observation_space,
        agent.action_space,
        agent.normalizers,
        agent.conditions,
        history={role: entry for role, entry in agent.history.items() if "dynamics" not in role},
        device=agent.device,
    )
    made.follow(agent)
    return made
