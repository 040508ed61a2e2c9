"""How an agent samples: everything that can change at run time without training."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from mpd_gym.diffusion import COMPOSITIONS, SAMPLERS, SPACINGS
from mpd_gym.diffusion.samplers import Sampler
from mpd_gym.errors import (
    ConfigError,
    check_choice,
    check_integer,
    check_kind,
    check_number,
    known_fields,
)
from mpd_gym.models.backends.choice import PRECISIONS
from mpd_gym.rankers import RANKERS

__all__ = ["SamplingConfig"]

ACTIONS = ("planned", "inverse_dynamics")
_MAY_BE_NONE = ("budget", "dynamics_guidance_scale")
_MOST_ROWS = 2**24  # of all the plans of one observation
_NOT_NEGATIVE = (
    *("temperature", "guidance_scale", "termination_penalty", "cost_threshold", "cost_scale"),
    *_MAY_BE_NONE,
)
_RANGES: dict[str, tuple[float, ...]] = {
    "return_scale": (),
    "eta": (0, 1),
    "dynamics_weight": (0, 1),
    **dict.fromkeys(_NOT_NEGATIVE, (0,)),
}


@final
@dataclass(frozen=True)
class SamplingConfig:
    """Sampling options: defaults in an agent's configuration, changed by `with_options`.

    Attributes:
        num_candidates: N plans for each observation; the ranker picks one.
        samples_per_candidate: Trajectories that are sampled for each candidate, which is their
            mean. More than 1 removes what differs from sample to sample, so that a high
            temperature does no harm; only for tasks where the plans of one observation are alike,
            for the mean of two ways round an obstacle leads into it.
        composition: How planner and dynamics model are combined, a name in `COMPOSITIONS`.
        dynamics_weight: Weight of the dynamics model in ``"combined_score"``, in [0, 1].
        dynamics_levels: Range of k / K in which the dynamics model takes part.
        sampler: ``"ddpm"`` (ancestral), ``"ddim"`` (Song et al. 2021) or ``"dpm++"``
            (DPM-Solver++ 2M, Lu et al. 2022).
        eta: Stochasticity of DDIM and DPM-Solver++: 0 deterministic, 1 as much noise as DDPM.
        num_steps: Reverse steps, 1 … K; None for all K.
        spacing: Of those steps over the levels: ``"even"`` in k, or ``"log_snr"``: even in the
            logarithm of the signal-to-noise ratio. None takes ``"log_snr"`` for ``"dpm++"``, whose
            extrapolation needs it, and ``"even"`` for the others.
        temperature: Factor on every variance of the reverse process, >= 0 (Algorithm 1's α).
        guidance_scale: Classifier-free guidance ω (eq. 1); 1 is the plain conditional model.
        dynamics_guidance_scale: ω of the dynamics model; None for `guidance_scale`. 0 leaves its
            conditions out: a dynamics model that sees a high return predicts the states that
            bring it, whatever the actions.
        warm_start_steps: Reverse steps after the first plan, from the last plan shifted by the
            executed actions and noised; 0 plans from scratch each time, as is done where a goal, a
            condition's value or the budget of the episode changes.
        action_chunk: Actions executed before planning again, 1 … H; fewer where a goal, a
            condition's value or the budget changes.
        actions: Which are executed: the ``"planned"`` ones, or those that a learned
            ``"inverse_dynamics"`` model finds to lead from each planned state to the next. None
            takes the latter where the agent has learned it.
        return_scale: Return asked for where the agent is conditioned on it: 0 is the worst and 1
            the best of the data.
        cost_scale: Factor on the remaining budget where the agent is conditioned on cost.
        budget: Cost budget of an episode; None for no limit.
        condition_values: Values of other conditions, such as ``{"final_state": [0.0, 0.0]}``, in
            the environment's units.
        ranker: A name in `RANKERS`. None takes ``"within_budget"`` (Algorithm 2) where returns are
            predicted and there is a budget, ``"highest_return"`` where there is none,
            ``"nearest_goal"`` without predicted returns, ``"first"`` without a goal either.
        termination_penalty: Subtracted, discounted, where a candidate is predicted to end.
        cost_threshold: Predicted costs of a step below this count as none. Half the cost of a
            violation where costs are 0 or 1: a learned cost is never exactly 0, so that a budget
            of 0 could not be kept.
        precision: Arithmetic of the denoisers. ``"fp32"``: float32, on a CPU in C where that was
            built and agrees with the plain networks to 1e-4, on a GPU as a CUDA graph; ``"bf16"``:
            the same with factors of products rounded to bfloat16, where a CPU multiplies it: about
            1 % off, and up to twice as fast; ``"plain"``: the networks as they were trained.
    """

    num_candidates: int = 1
    samples_per_candidate: int = 1
    composition: str = "alternating_matched"
    dynamics_weight: float = 1.0
    dynamics_levels: tuple[float, float] = (0.0, 1.0)
    sampler: str = "ddpm"
    eta: float = 0.0
    num_steps: int | None = None
    spacing: str | None = None
    temperature: float = 0.5
    guidance_scale: float = 1.0
    dynamics_guidance_scale: float | None = None
    warm_start_steps: int = 0
    action_chunk: int = 1
    actions: str | None = None
    return_scale: float = 1.0
    cost_scale: float = 1.0
    budget: float | None = None
    condition_values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ranker: str | None = None
    termination_penalty: float = 100.0
    cost_threshold: float = 0.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_choice("composition", self.composition, COMPOSITIONS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_kind(f"SAMPLERS[{self.sampler!r}]", SAMPLERS[self.sampler], Sampler)
        check_choice("precision", self.precision, PRECISIONS)
        for name, known in (("spacing", SPACINGS), ("ranker", RANKERS), ("actions", ACTIONS)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), known)
        for name in ("num_candidates", "samples_per_candidate", "action_chunk"):
            check_integer(name, getattr(self, name), 1)
        check_integer("warm_start_steps", self.warm_start_steps, 0)
        if self.num_steps is not None:
            check_integer("num_steps", self.num_steps, 1)
        for name, bounds in _RANGES.items():
            if getattr(self, name) is not None or name not in _MAY_BE_NONE:
                object.__setattr__(self, name, check_number(name, getattr(self, name), *bounds))
        levels = _numbers("dynamics_levels", self.dynamics_levels)
        object.__setattr__(self, "dynamics_levels", levels)
        values = {
            key: _numbers(f"condition_values[{key!r}]", value)
            for key, value in self.condition_values.items()
        }
        object.__setattr__(self, "condition_values", values)

    @functools.cached_property
    def asked(self) -> dict[str, Any]:
        """What a plan is made for, beside a goal: another value makes a new plan."""
        names = ("budget", "condition_values", "cost_scale", "return_scale")
        return {name: getattr(self, name) for name in names}

    @property
    def num_samples(self) -> int:
        """Trajectories sampled for each observation."""
        return self.num_candidates * self.samples_per_candidate

    @property
    def level_spacing(self) -> str:
        """Name in `SPACINGS`: `spacing`, or what suits the sampler."""
        return self.spacing or SAMPLERS[self.sampler].spacing

    def check_plans(self, horizon: int, num_levels: int) -> None:
        """Check that plans of H steps and K levels allow the options.

        Raises:
            ConfigError: Naming the first that they do not.
        """
        if self.action_chunk > horizon:
            raise ConfigError(
                f"action_chunk: a plan has {horizon} actions, got {self.action_chunk}"
            )
        if self.num_samples * horizon > _MOST_ROWS:
            raise ConfigError(
                f"num_candidates: expected at most {_MOST_ROWS // horizon:,} samples of plans of "
                f"{horizon} steps, got {self.num_samples:,}"
            )
        for name in ("num_steps", "warm_start_steps"):
            if (getattr(self, name) or 0) > num_levels:
                raise ConfigError(
                    f"{name}: the agent has {num_levels} diffusion levels, got "
                    f"{getattr(self, name)}"
                )

    def updated(self, options: Mapping[str, Any]) -> SamplingConfig:
        """Return a copy with other values.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        known_fields(SamplingConfig, options)
        return replace(self, **options)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}: expected numbers, got {values!r}")
    return tuple(check_number(name, value) for value in values)
