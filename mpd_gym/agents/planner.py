"""MPDiffuser's planner alone: the ablation of its dynamics model (Balim et al. 2025, app. H)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, final

from torch import Tensor

from mpd_gym.agents.config import DiffusionConfig, FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.losses import DenoisingTask
from mpd_gym.agents.planning import Request
from mpd_gym.diffusion import PLANNER_COMPOSITIONS, sample
from mpd_gym.errors import InputError

__all__ = ["PlannerAgent", "PlannerConfig", "planner_of"]

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
    """

    own = ("planner",)

    initial_state: str = "film"

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """Nothing but the missing dynamics model."""
        return {}


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

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        step = self._composed(request, levels, self._known(request.initial))
        return sample(step, start, levels, request.noise)

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role)


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
    parts = replace(
        agent.parts,
        config=kind.config_type(**{**values, "sampling": options, **changes}),
        models={role: model for role, model in agent.models.items() if role != "dynamics"},
        history={role: entry for role, entry in agent.history.items() if "dynamics" not in role},
    )
    made = kind(parts)
    made.follow(agent)
    return made
