"""Configurations that work: the paper's, and laptop-size ones for each environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, overload

from mpd_gym.agents import AGENTS, agent_class
from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.mpdiffuser import MPDiffuserConfig
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.datasets import ConditionSpec
from mpd_gym.diffusion import LossConfig
from mpd_gym.errors import check_choice
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig

__all__ = ["DATASETS", "PRESETS", "preset"]

PRESETS = ("laptop", "paper")
DATASETS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "LQR-v0": (("mpd_gym/lqr/noisy-p40-v0",), None),
    "CarUMaze-v0": (
        ("mpd_gym/car-umaze/expert-v0",),
        ("mpd_gym/car-umaze/expert-v0", "mpd_gym/car-umaze/random-v0"),
    ),
    "ConstrainedPendulum-v0": (("mpd_gym/constrained-pendulum/mixed-v0",), None),
    "LatentPendulum-v0": (("mpd_gym/latent-pendulum/replay-v0",), None),
}
"""What the planner of an environment learns from, and the dynamics model if from other data."""


@overload
def preset(name: str, env_id: str | None = None) -> MPDiffuserConfig: ...


@overload
def preset(name: str, env_id: str | None, method: str) -> AgentConfig: ...


def preset(name: str, env_id: str | None = None, method: str = "mpdiffuser") -> AgentConfig:
    """Configuration of an agent for an environment.

    Presets are made for MPDiffuser. A peer's is derived from it, so that comparisons are fair: data
    windows, networks, training, diffusion levels, inverse dynamics and sampling are the same but
    for what makes the method, which its configuration's `changes` name.

    Args:
        name: ``"paper"``: the network, schedule and training of appendix B, conditioned on
            return; ``"laptop"``: a planner and a dynamics model that train on two cores within an
            hour.
        env_id: Registered id. For one of the package's environments, conditions, horizon and
            sampling suit its task; any other gets the general configuration.
        method: A key of `AGENTS`.

    Raises:
        ConfigError: If there is no such preset or method.
    """
    check_choice("preset", name, PRESETS)
    check_choice("method", method, AGENTS)
    base = _TASKS.get(env_id or "", _general)()
    size = _PAPER if name == "paper" else {**_LAPTOP, **_LAPTOP_TASKS.get(env_id or "", _GENERAL)}
    base = replace(base, **size)
    kind = agent_class(method).config_type
    common = {entry.name for entry in fields(kind)} & {entry.name for entry in fields(base)}
    values = {field: getattr(base, field) for field in common}
    values["sampling"] = replace(base.sampling, composition="planner_only")
    return kind(**{**values, **kind.changes(base, env_id or "")})


def _general() -> MPDiffuserConfig:
    """Any environment: asked for its goal, or else for return; ranked by learned rewards.

    Far from a goal the best return of a number of steps is out of reach: conditioned on both, 8 of
    100 walks through PointMaze's U got stuck; conditioned on the goal alone, none did.
    """
    return MPDiffuserConfig(
        conditions=(
            ConditionSpec("goal", when="goals"),
            ConditionSpec("return", when="no_goals"),
        ),
        loss=LossConfig(prediction="auto"),
        reward_model=True,
        sampling=SamplingConfig(guidance_scale=2.0, action_chunk=4),
    )


def _lqr() -> MPDiffuserConfig:
    """The final state of a trajectory is asked to be the origin (paper, appendix E).

    Guidance of 1.5 changed the planner's cost by 0.2 % on a tuning seed (64 trials, temperature
    0.001) and doubles the time. Ten of the 50 steps cost no more than all (``python -m studies
    lqr-steps``, at temperature 1). Means of samples and warm starts were chosen on training seed 0
    and starts from 100000 on, where they cut the cost above the optimum from 3.7 to 0.6 %.
    """
    return MPDiffuserConfig(
        conditions=(ConditionSpec("final_state"),),
        discount=1.0,
        sampling=SamplingConfig(
            samples_per_candidate=8,
            guidance_scale=1.0,
            num_steps=10,
            warm_start_steps=1,
            temperature=0.5,
            condition_values={"final_state": (0.0, 0.0)},
        ),
    )


def _car() -> MPDiffuserConfig:
    """The plan is asked to end at the goal (paper, appendix C).

    Whole plans are executed from an episode's start, so a quarter of the windows begins there and
    all actions weigh the same. Planned states are better than planned actions, so the agent learns
    inverse dynamics from the expert's drives. A plan made in one step from the last plan arrives as
    often as a plan made in ten steps from noise. Both were found on starts from 100000 on.
    """
    return MPDiffuserConfig(
        conditions=(ConditionSpec("goal"),),
        padding="none",
        first_step_share=0.25,
        loss=LossConfig(first_action_weight=1.0, condition_dropout=0.1),
        inverse_dynamics=True,
        sampling=SamplingConfig(
            guidance_scale=1.0, num_steps=10, warm_start_steps=1, temperature=0.5
        ),
    )


def _constrained_pendulum() -> MPDiffuserConfig:
    """The best candidate that is predicted to keep the limit (Algorithm 2).

    Returns are those of the window, and no window is padded: episodes end by a time limit, and
    padding would make "nothing more to lose" look like success. The dynamics model does not see
    return and budget; if it does, it predicts the states of a high return whatever the actions. The
    planner does the same to a smaller extent, so guidance is 0 and the ranker chooses. Costs are 0
    or 1 and learned as probabilities: a step counts where a violation is likelier than 1 %, which
    leaves room for errors of the predicted states. Steps, guidance and threshold were chosen on
    starts from 100000 on.
    """
    return MPDiffuserConfig(
        conditions=(ConditionSpec("return", horizon="window"), ConditionSpec("cost")),
        padding="none",
        dynamics_conditions=False,
        loss=LossConfig(first_action_weight=1.0, condition_dropout=0.1),
        reward_model=True,
        cost_model=True,
        binary_costs=True,
        regressor_inputs="transition",
        sampling=SamplingConfig(
            num_candidates=8,
            num_steps=5,
            guidance_scale=0.0,
            cost_threshold=0.01,
            action_chunk=4,
            budget=0.0,
        ),
    )


def _latent_pendulum() -> MPDiffuserConfig:
    """Conditioned on the return of the next 96 steps, ranked by a learned reward.

    A swing-up takes longer than a plan of 32 steps, in which all actions near hanging are about as
    bad: conditioned on the return of a plan, 5 of 64 episodes returned less than -400; conditioned
    on 96 steps, none did (starts from 100000 on). Temperature and guidance then no longer matter
    (``python -m studies pendulum-images``); guidance 1 needs half the network calls. No window is
    padded: an episode ends by its time limit, after which there is nothing to lose.

    The networks predict x̂_0: the noise of 33 columns does not fit through a width of 32. On 32
    starts from 100000 on, the return was -666 with noise predicted, after 12,000 steps of training,
    and -166 with x̂_0 after 6,000.
    """
    return MPDiffuserConfig(
        conditions=(ConditionSpec("return", horizon=96),),
        padding="none",
        loss=LossConfig(prediction="x0"),
        reward_model=True,
        sampling=SamplingConfig(
            num_candidates=4, num_steps=5, temperature=0.1, guidance_scale=1.0, action_chunk=2
        ),
    )


_TASKS: dict[str, Callable[[], MPDiffuserConfig]] = {
    "LQR-v0": _lqr,
    "CarUMaze-v0": _car,
    "ConstrainedPendulum-v0": _constrained_pendulum,
    "LatentPendulum-v0": _latent_pendulum,
}


def _size(width: int, steps: int, batch_size: int = 64) -> dict[str, Any]:
    """A network and a training that fit each other: both are smaller for smaller tasks."""
    return {
        "unet": UnetConfig(width=width, multipliers=(1, 2, 4)),
        "training": TrainingConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=200,
        ),
    }


_LAPTOP: dict[str, Any] = {"diffusion_steps": 50}
# Time-limit cuts say nothing about plan quality. At this width, plan 8 steps and replan every step.
_GENERAL: dict[str, Any] = {
    **_size(width=32, steps=20_000, batch_size=256),
    "horizon": 8,
    "conditions": (
        ConditionSpec("goal", when="goals"),
        ConditionSpec("return", horizon="auto", when="no_goals"),
    ),
    "padding": "terminal",
    "sampling": SamplingConfig(num_steps=10),
}
_LAPTOP_TASKS = {
    "LQR-v0": _size(width=32, steps=6_000),
    "CarUMaze-v0": _size(width=32, steps=24_000),
    "LatentPendulum-v0": _size(width=32, steps=12_000),
    "ConstrainedPendulum-v0": {**_size(width=32, steps=12_000), "diffusion_steps": 100},
}
_PAPER: dict[str, Any] = {
    "unet": UnetConfig(),
    "diffusion_steps": 100,
    "null": "zeros",
    "normalizer": "cdf",
    "padding": "zeros",
    "training": TrainingConfig(ema_warmup=False),
}
