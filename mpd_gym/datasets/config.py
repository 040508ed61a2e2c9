"""Configuration of training windows and of a plan's conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from mpd_gym.errors import (
    ConfigError,
    DataError,
    check_choice,
    check_integer,
    check_number,
    from_mapping,
)

__all__ = ["ConditionSpec", "WindowConfig"]

KINDS = ("cost", "custom", "final_state", "goal", "return")
HORIZONS = ("to_go", "window", "auto")
_LONGEST = 2**16
_AUTO_AT_MOST = 100  # steps; 96 serve the pendulum from pictures
WHEN = ("always", "goals", "no_goals")
PADDINGS = ("repeat", "zeros", "terminal", "none")
# Kind of a discounted sum -> its default horizon, and its scalings with the default first.
_SUMS = {"return": ("to_go", ("range", "authors")), "cost": ("window", ("range", "raw"))}


@final
@dataclass(frozen=True)
class ConditionSpec:
    """One condition of a plan. Missing fields get explicit defaults.

    Kinds, and their value at a window's first step t (``[size]``):

    - ``"return"``: discounted rewards from t on, scaled.
    - ``"cost"``: discounted costs from t on, scaled; the remaining budget at prediction time.
    - ``"goal"``: ``desired_goal`` of a Dict observation at t, normalised.
    - ``"final_state"``: last observation of the episode, normalised like all observations.
    - ``"custom"``: row t of ``function(episode) -> [T, size]``, unscaled.

    Args:
        kind: One of the above.
        name: Key of the condition, an identifier; the kind by default.
        size: Length of the value; only for ``"custom"``, others have a known size.
        horizon: Steps of a sum: ``"to_go"``, up to the end of the episode (default of
            ``"return"``), or ``"window"``, the H steps of the window (default of ``"cost"``). With
            a time limit, the sum to go depends on the remaining time, which a planner cannot see;
            with ``"window"`` it does so in the last H steps only. A number of steps suits tasks
            that take longer than a plan; with the paddings ``"terminal"`` and ``"none"``, windows
            whose sum a time limit cuts are not drawn. ``"auto"``: half the longest episode, at
            most 100 steps and at least H; `fit` replaces it by the number.
        scaling: Scaling of a sum: ``"range"``, from 0 for the smallest value in the data to 1 for
            the largest, also for negative values; for ``"return"`` also ``"authors"``, divided by
            the largest value at t = 0; for ``"cost"`` also ``"raw"``, multiplied by `scale`.
        scale: Factor of the scaling ``"raw"``.
        terminal_penalty: At most 0; added to the reward of a step that terminates the episode
            without success (the authors use -100 if a robot falls).
        when: ``"always"``; ``"goals"``, for data whose observations have a ``desired_goal``; or
            ``"no_goals"``, for other data. `fit` drops the condition for the rest.

    Raises:
        ConfigError: If a field is unknown, out of range or has no meaning for the kind.
    """

    kind: str
    name: str = ""
    size: int | None = None
    horizon: str | int | None = None
    scaling: str | None = None
    scale: float = 1.0
    terminal_penalty: float = 0.0
    when: str = "always"

    def __post_init__(self) -> None:
        check_choice("condition kind", self.kind, KINDS)
        if not isinstance(self.name, str) or not (self.name or self.kind).isidentifier():
            raise ConfigError(f"condition name: expected an identifier, got {self.name!r}")
        object.__setattr__(self, "name", self.name or self.kind)
        self._check_size()
        self._check_sum()
        check_number(f"condition {self.name!r}, scale", self.scale, 0, above=True)
        if self.scale != 1 and self.scaling != "raw":
            raise ConfigError(
                f"condition {self.name!r}: scale is a positive factor of scaling='raw', got "
                f"{self.scale} with scaling={self.scaling!r}"
            )
        penalty = check_number(f"condition {self.name!r}, terminal_penalty", self.terminal_penalty)
        if penalty > 0 or (penalty and self.kind != "return"):
            raise ConfigError(
                f"condition {self.name!r}: terminal_penalty is for kind 'return', finite and at "
                f"most 0 (such as -100), got {penalty} with kind {self.kind!r}"
            )
        check_choice(f"condition {self.name!r}, when", self.when, WHEN)

    @property
    def is_settled(self) -> bool:
        """Whether it does not depend on the data, see `WindowConfig.settled`."""
        return self.when == "always" and self.horizon != "auto"

    def _check_size(self) -> None:
        fixed = 1 if self.kind in _SUMS else None
        if self.kind == "custom":
            if not _whole(self.size):
                raise ConfigError(
                    f"condition {self.name!r}: kind 'custom' needs size >= 1, got {self.size!r}"
                )
        elif self.size not in (None, fixed):
            raise ConfigError(
                f"condition {self.name!r}: the size of kind {self.kind!r} is known; leave out "
                f"size, got {self.size!r}"
            )
        else:
            object.__setattr__(self, "size", fixed)

    def _check_sum(self) -> None:
        if self.kind not in _SUMS:
            if self.horizon is not None or self.scaling is not None:
                raise ConfigError(
                    f"condition {self.name!r}: horizon and scaling are for kinds 'return' and "
                    f"'cost', got {self.horizon!r} and {self.scaling!r} with kind {self.kind!r}"
                )
            return
        horizon, scalings = _SUMS[self.kind]
        for field, default in ("horizon", horizon), ("scaling", scalings[0]):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        check_choice(f"condition {self.name!r}, scaling", self.scaling, scalings)
        if isinstance(self.horizon, str):
            check_choice(f"condition {self.name!r}, horizon", self.horizon, HORIZONS)
        elif not _whole(self.horizon):
            raise ConfigError(
                f"condition {self.name!r}, horizon: expected one of {', '.join(HORIZONS)}, or a "
                f"whole number of steps >= 1, got {self.horizon!r}"
            )


@final
@dataclass(frozen=True)
class WindowConfig:
    """Shape of the training windows. Round-trips through ``dataclasses.asdict`` and JSON.

    Args:
        horizon: Steps H of a window.
        discount: γ of returns and costs, in (0, 1].
        padding: Steps after the end of an episode: ``"repeat"``, the last observation with zero
            actions, or ``"zeros"``, zero observations and actions (the authors'). Zeros are in
            environment units, clipped to the normaliser's `clip_range`. ``"none"``: no padding;
            windows lie inside their episode. It suits episodes that end by a time limit, which
            means nothing to a plan. ``"terminal"``: ``"repeat"`` if the environment ended the
            episode, ``"none"`` if a time limit did.
        conditions: Conditions of plans; mappings of fields are accepted.
        first_step_share: Probability of moving a drawn window to the first step of its episode,
            for plans that are executed whole from a reset; 0 draws all steps alike.

    Raises:
        ConfigError: If a value is out of range, or two conditions share a name.
    """

    horizon: int = 32
    discount: float = 0.997
    padding: str = "repeat"
    conditions: tuple[ConditionSpec, ...] = ()
    first_step_share: float = 0.0

    def __post_init__(self) -> None:
        check_integer("horizon", self.horizon, 1, _LONGEST)
        check_number("discount", self.discount, 0, 1, above=True)
        check_choice("padding", self.padding, PADDINGS)
        check_number("first_step_share", self.first_step_share, 0, 1)
        specs = tuple(
            from_mapping(ConditionSpec, spec) if isinstance(spec, Mapping) else spec
            for spec in self.conditions
        )
        if not all(isinstance(spec, ConditionSpec) for spec in specs):
            raise ConfigError(f"conditions: expected ConditionSpec objects, got {self.conditions}")
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise ConfigError(f"conditions: names must differ, got {names}; pass name=...")
        object.__setattr__(self, "conditions", specs)

    def steps_summed(self, spec: ConditionSpec) -> int | None:
        """Number of steps in the sum of a return or cost; None up to the episode's end.

        Raises:
            ConfigError: If the horizon is still ``"auto"``.
        """
        if spec.horizon == "auto":
            raise ConfigError(
                f"condition {spec.name!r}: horizon='auto' needs the lengths of the episodes; call "
                "settled(longest, goals=...) first, like fit"
            )
        if isinstance(spec.horizon, int):
            return spec.horizon
        return self.horizon if spec.horizon == "window" else None

    def settled(self, longest: int, *, goals: bool) -> WindowConfig:
        """Replace what depends on the data: the horizon ``"auto"`` and the field `when`.

        Args:
            longest: Steps of the longest episode.
            goals: Whether observations have a ``desired_goal``.
        """
        ahead = max(self.horizon, min(_AUTO_AT_MOST, longest // 2))
        specs = tuple(
            replace(spec, horizon=ahead if spec.horizon == "auto" else spec.horizon, when="always")
            for spec in self.conditions
            if spec.when in ("always", "goals" if goals else "no_goals")
        )
        return replace(self, conditions=specs)

    def windows_in(self, length: int, terminated: bool) -> int:
        """Number of windows in an episode; they begin at its first steps.

        Args:
            length: Steps of the episode.
            terminated: Whether the environment, not a time limit, ended it.
        """
        if self.padding in ("repeat", "zeros"):
            return length
        needed = self.steps_ahead
        if terminated:
            needed = 1 if self.padding == "terminal" else self.horizon
        return max(0, length - needed + 1)

    @property
    def steps_ahead(self) -> int:
        """Steps that a window and its conditions need if a time limit ends the episode."""
        ahead = (spec.horizon for spec in self.conditions)
        return max([self.horizon, *(steps for steps in ahead if isinstance(steps, int))])

    def no_windows(self, source: str) -> DataError:
        """Return the error for a source without a long enough episode."""
        return DataError(
            f"no episode has the {self.steps_ahead} steps that a window and its conditions need; "
            "shorten horizon, or set padding to 'repeat'",
            source=source,
        )


def _whole(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**63
