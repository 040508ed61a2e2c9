"""Agents: MPDiffuser and its peers, which act through Stable-Baselines3's `predict`.

The class of each registered agent and that of its configuration are names of this module:
``mpd_gym.agents.DMPCAgent``, ``mpd_gym.agents.DMPCConfig``. They are loaded when first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpd_gym.agents.trained import TrainedAgent

AGENTS = {
    "behavior_cloning": "mpd_gym.agents.behavior_cloning:BehaviorCloningAgent",
    "decision_diffuser": "mpd_gym.agents.decision_diffuser:DecisionDiffuserAgent",
    "diffuser": "mpd_gym.agents.diffuser:DiffuserAgent",
    "dmpc": "mpd_gym.agents.dmpc:DMPCAgent",
    "mpdiffuser": "mpd_gym.agents.mpdiffuser:MPDiffuserAgent",
    "planner": "mpd_gym.agents.planner:PlannerAgent",
    "safediffuser": "mpd_gym.agents.safediffuser:SafeDiffuserAgent",
}
"""Name of each agent, as it stands in its files, and where its class is."""

_OTHERS = {
    "SamplingConfig": "mpd_gym.agents.options",
    "StateLimit": "mpd_gym.agents.safediffuser",
}


def agent_class(name: str) -> type[TrainedAgent[Any]]:
    """Class of an agent; its `config_type` is the class of its configuration.

    Args:
        name: A key of `AGENTS`.

    Raises:
        ConfigError: If there is no such agent, or its row names no class of one.
    """
    from mpd_gym.errors import MALFORMED, ConfigError, check_choice

    check_choice("agent", name, AGENTS)
    try:
        module, _, attribute = AGENTS[name].partition(":")
        found: type[TrainedAgent[Any]] = getattr(import_module(module), attribute)
        found.config_type  # noqa: B018 - an agent has it
    except (ImportError, *MALFORMED) as error:
        raise ConfigError(
            f"AGENTS[{name!r}]: expected 'module:Class' of an agent; got {AGENTS[name]!r} ({error})"
        ) from error
    return found


def load_agent(
    source: str | os.PathLike[str], device: str = "auto", **options: Any
) -> TrainedAgent[Any]:
    """Read an agent of any method; arguments and errors as `TrainedAgent.load`.

    Raises:
        CheckpointError: Also if no agent of this package has the name that the file gives.
        ConfigError: If an option is unknown or out of range.
    """
    from mpd_gym.agents.serialization import read_agent
    from mpd_gym.errors import CheckpointError

    stored = read_agent(source)
    if stored.name not in AGENTS:
        raise CheckpointError(
            f"{stored.source}: holds the agent {stored.name!r}; this version has {sorted(AGENTS)}. "
            "Install the version that wrote it"
        )
    return agent_class(stored.name).restored(stored, device, **options)


def _places() -> dict[str, str]:
    """Module of each name that is loaded when first used."""
    places = dict(_OTHERS)
    for place in AGENTS.values():
        module, _, agent = place.partition(":")
        places |= {agent: module, f"{agent.removesuffix('Agent')}Config": module}
    return places


def __getattr__(name: str) -> Any:
    """Load a class when it is first used, and torch with it."""
    place = _places().get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted(["AGENTS", "agent_class", "load_agent", *_places()])


__all__ = __dir__()
