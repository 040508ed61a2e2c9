"""Agents: MPDiffuser and its peers, which act through Stable-Baselines3's `predict`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpd_gym.agents.behavior_cloning import BehaviorCloningAgent, BehaviorCloningConfig
    from mpd_gym.agents.decision_diffuser import DecisionDiffuserAgent, DecisionDiffuserConfig
    from mpd_gym.agents.diffuser import DiffuserAgent, DiffuserConfig
    from mpd_gym.agents.dmpc import DMPCAgent, DMPCConfig
    from mpd_gym.agents.mpdiffuser import MPDiffuserAgent, MPDiffuserConfig
    from mpd_gym.agents.options import SamplingConfig
    from mpd_gym.agents.planner import PlannerAgent, PlannerConfig
    from mpd_gym.agents.safediffuser import SafeDiffuserAgent, SafeDiffuserConfig, StateLimit
    from mpd_gym.agents.serialization import load_agent
    from mpd_gym.agents.trained import TrainedAgent

__all__ = [
    "AGENTS",
    "BehaviorCloningAgent",
    "BehaviorCloningConfig",
    "DMPCAgent",
    "DMPCConfig",
    "DecisionDiffuserAgent",
    "DecisionDiffuserConfig",
    "DiffuserAgent",
    "DiffuserConfig",
    "MPDiffuserAgent",
    "MPDiffuserConfig",
    "PlannerAgent",
    "PlannerConfig",
    "SafeDiffuserAgent",
    "SafeDiffuserConfig",
    "SamplingConfig",
    "StateLimit",
    "agent_class",
    "load_agent",
]

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

_LAZY = {
    "BehaviorCloningAgent": "behavior_cloning",
    "BehaviorCloningConfig": "behavior_cloning",
    "DMPCAgent": "dmpc",
    "DMPCConfig": "dmpc",
    "DecisionDiffuserAgent": "decision_diffuser",
    "DecisionDiffuserConfig": "decision_diffuser",
    "DiffuserAgent": "diffuser",
    "DiffuserConfig": "diffuser",
    "MPDiffuserAgent": "mpdiffuser",
    "MPDiffuserConfig": "mpdiffuser_config",
    "PlannerAgent": "planner",
    "PlannerConfig": "planner",
    "SafeDiffuserAgent": "safediffuser",
    "SafeDiffuserConfig": "safediffuser",
    "SamplingConfig": "options",
    "StateLimit": "safediffuser",
    "load_agent": "serialization",
}


def agent_class(name: str) -> type[TrainedAgent[Any]]:
    """Class of an agent; its `config_type` is the class of its configuration.

    Args:
        name: A key of `AGENTS`.

    Raises:
        ConfigError: If there is no such agent.
    """
    from mpd_gym.errors import check_choice

    check_choice("agent", name, AGENTS)
    module, _, attribute = AGENTS[name].partition(":")
    found: type[TrainedAgent[Any]] = getattr(import_module(module), attribute)
    return found


def __getattr__(name: str) -> Any:
    """Load an agent when it is first asked for, and torch with it."""
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
