"""Configurations of MPDiffuser's peers, derived from its own so that comparisons are fair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from mpd_gym.agents import AGENTS, agent_class
from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.mpdiffuser_config import MPDiffuserConfig
from mpd_gym.agents.presets import preset
from mpd_gym.agents.safediffuser import StateLimit
from mpd_gym.datasets import ConditionSpec
from mpd_gym.errors import check_choice

__all__ = ["LIMITS", "VALUE_GUIDANCE_SCALE", "peer_preset"]

LIMITS: dict[str, tuple[StateLimit, ...]] = {
    "ConstrainedPendulum-v0": (StateLimit(2, low=-6.5, high=6.5),),
}
"""Sets that SafeDiffuser keeps to, where bounds on single entries describe the task's own."""

VALUE_GUIDANCE_SCALE = 0.1  # of the authors' Diffuser


def peer_preset(method: str, env_id: str | None = None, name: str = "laptop") -> AgentConfig:
    """Configuration of any agent for an environment.

    Data windows, networks, training, diffusion levels, inverse dynamics and sampling are those of
    MPDiffuser's `preset`; what differs is what makes the method.

    Args:
        method: A key of `AGENTS`.
        env_id: As for `preset`.
        name: As for `preset`.

    Raises:
        ConfigError: If there is no such method or preset.
    """
    check_choice("method", method, AGENTS)
    base = preset(name, env_id)
    if method == "mpdiffuser":
        return base
    kind = agent_class(method).config_type
    common = {entry.name for entry in fields(kind)} & {entry.name for entry in fields(base)}
    values = {field: getattr(base, field) for field in common}
    values["sampling"] = replace(base.sampling, composition="planner_only")
    return kind(**{**values, **_CHANGES[method](base, env_id or "")})


def _planner(base: MPDiffuserConfig, env_id: str) -> dict[str, Any]:
    return {}


def _safediffuser(base: MPDiffuserConfig, env_id: str) -> dict[str, Any]:
    return {"limits": LIMITS.get(env_id, ())}


def _diffuser(base: MPDiffuserConfig, env_id: str) -> dict[str, Any]:
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


def _decision_diffuser(base: MPDiffuserConfig, env_id: str) -> dict[str, Any]:
    """It inpaints x_0, so that its plans are a step shorter, and predicts x̂_0.

    The inverse dynamics see all steps of 64 windows at a time, as the authors'.
    """
    return {
        "initial_state": "inpaint",
        "loss": replace(base.loss, prediction="x0"),
        "inverse_dynamics": True,
        "regressor_training": replace(base.regressor_training, batch_size=64),
        "sampling": replace(
            base.sampling,
            composition="planner_only",
            action_chunk=min(base.sampling.action_chunk, base.horizon - 1),
        ),
    }


def _dmpc(base: MPDiffuserConfig, env_id: str) -> dict[str, Any]:
    """It asks for no budget, and scores plans by a value in the place of learned rewards.

    Candidates are all its search: 16 here, 64 in its paper. Given clean actions, the states are
    nearly known: predicted noise leaves them 0.6 m off in the maze, predicted x̂_0 0.2 m (``python
    benchmarks/dynamics_accuracy.py``).
    """
    kept = tuple(spec for spec in base.conditions if spec.kind not in ("cost", "return"))
    value = next((spec for spec in base.conditions if spec.kind == "return"), None)
    return {
        "conditions": (*kept, replace(value or ConditionSpec("return"), when="always")),
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


def _behavior_cloning(base: MPDiffuserConfig, env_id: str) -> dict[str, Any]:
    """As many optimisation steps, each on 256 transitions; one action at a time."""
    return {
        "conditions": tuple(spec for spec in base.conditions if spec.kind != "cost"),
        "training": replace(base.training, batch_size=256),
        "sampling": replace(
            base.sampling,
            num_candidates=1,
            action_chunk=1,
            num_steps=None,
            warm_start_steps=0,
            budget=None,
        ),
        "reward_model": False,
        "cost_model": False,
        "binary_costs": False,
        "termination_model": False,
    }


_CHANGES: dict[str, Callable[[MPDiffuserConfig, str], dict[str, Any]]] = {
    "behavior_cloning": _behavior_cloning,
    "decision_diffuser": _decision_diffuser,
    "diffuser": _diffuser,
    "dmpc": _dmpc,
    "planner": _planner,
    "safediffuser": _safediffuser,
}
