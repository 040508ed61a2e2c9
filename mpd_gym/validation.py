"""Checks of episodes, for recording and reading, and of policies, where they meet environments.

Every array is checked against the spaces and the episode's length before use: `check_structure`
checks shapes and dtypes and reads no rows, `check_values` checks the values of given rows. Minari
and Gymnasium check none of this.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.types import SUCCESS_KEYS, Array, Episode, Observation, Policy

__all__ = [
    "STEP_ARRAYS",
    "Column",
    "EpisodeRules",
    "action_box",
    "as_flag",
    "as_number",
    "as_numbers",
    "as_typed",
    "check_answer",
    "check_episode",
    "check_spaces",
    "check_structure",
    "check_values",
    "columns",
    "copied",
    "decided",
    "inside",
    "observation_arrays",
    "observation_leaves",
    "returned",
    "stepped",
    "succeeded",
]

STEP_ARRAYS = ("actions", "rewards", "terminations", "truncations", "costs", "successes")
"""Fields of an `Episode` with one row for each step."""

_ACTION_TOLERANCE = 1e-5  # for float32 rounding at a bound
_FLAGS = ("terminations", "truncations", "successes")


class Column(Protocol):
    """Structure of an array; NumPy arrays and HDF5 data sets have it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        ...


@dataclass(frozen=True)
class EpisodeRules:
    """Requirements on the episodes of one source.

    Attributes:
        source: File or data set id, for messages.
        leaves: Box of each observation array, by key (``""`` for a plain Box).
        actions: Box of the actions, shape ``(nu,)``.
    """

    source: str
    leaves: Mapping[str, Box]
    actions: Box


def observation_leaves(space: gym.Space[Any]) -> dict[str, Box]:
    """Return the boxes of an observation space by key.

    Args:
        space: A Box, or a Dict of boxes, nested to any depth.

    Returns:
        ``{"": space}`` for a Box; for a Dict, its boxes by key, nested keys joined by ``/``.

    Raises:
        ConfigError: If the space holds another kind of space.
    """
    if isinstance(space, Box):
        return {"": space}
    if not isinstance(space, gym.spaces.Dict):
        raise ConfigError(
            f"observation space must be a Box or a Dict of Boxes, got {space}: "
            "wrap the environment, for example in gymnasium.wrappers.FlattenObservation"
        )
    leaves: dict[str, Box] = {}
    for key, part in space.spaces.items():
        for suffix, box in observation_leaves(part).items():
            leaves[f"{key}/{suffix}" if suffix else str(key)] = box
    return leaves


def action_box(space: gym.Space[Any]) -> Box:
    """Return the action space as a Box of shape ``(nu,)``.

    Raises:
        ConfigError: If it is another space.
    """
    if isinstance(space, Box) and len(space.shape) == 1:
        return space
    raise ConfigError(
        f"action space must be a Box of shape (nu,), got {space}: only continuous actions are "
        "supported"
    )


def as_number(name: str, value: Any) -> float:
    """A reward or cost as a float, also from an array of one element; else an `InputError`."""
    numbers = as_numbers(f"env: {name}", value)
    if numbers.size != 1:
        raise InputError(f"env: expected one number as {name}, got {value!r}; correct its step")
    return float(numbers.item())


def as_flag(name: str, value: Any) -> bool:
    """A flag of an environment: True, False, 0 or 1, alone or in an array; else an `InputError`."""
    found = np.asarray(value)
    if found.size != 1 or found.dtype.kind not in "biuf" or found.item() not in (0, 1):
        raise InputError(f"env: expected True or False as {name}, got {value!r}; correct its step")
    return bool(found.item())


def succeeded(info: Mapping[str, Any]) -> bool | None:
    """Return the success that a step's infos report; None if they report none.

    Raises:
        InputError: If it is no flag.
    """
    return next((as_flag(key, info[key]) for key in SUCCESS_KEYS if key in info), None)


def stepped(env: gym.Env[Any, Any], action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """Step an environment; returns observation, reward, terminated, truncated and infos.

    Raises:
        InputError: If reward, flags or infos are none.
    """
    observation, reward, terminated, truncated, info = env.step(action)
    if not isinstance(info, dict):
        raise InputError(f"env: expected a dict as info, got {info!r:.80}; correct its step")
    ends = as_flag("terminated", terminated), as_flag("truncated", truncated)
    return observation, as_number("reward", reward), *ends, info


def as_typed(actions: Array, box: Box) -> Array:
    """Actions in the type of their Box; whole ones are rounded, as a cast alone cuts towards 0."""
    return (np.rint(actions) if box.dtype.kind in "iu" else actions).astype(box.dtype)


def check_answer(
    answer: Any, policy: Policy, env: gym.Env[Any, Any], batch: tuple[int, ...] = ()
) -> tuple[Array, Any]:
    """Return actions and state of a policy's answer, after a check that they can be played.

    Args:
        answer: What its `predict` returned.
        policy: The policy, for messages.
        env: Environment of the actions.
        batch: ``(n,)`` for n observations, ``()`` for a single one.

    Raises:
        InputError: If it is not an action and a state, or an action has another shape than the
            environment's, is not finite, or none of a discrete space.
    """
    space, name = env.action_space, "?" if env.spec is None else env.spec.id
    source = f"from {type(policy).__name__} in {name}"
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise InputError(f"policy: expected (action, state) from predict; got {answer!r} {source}")
    actions = as_numbers(f"policy: actions {source}", answer[0])
    shape = (*batch, *(space.shape or ()))
    if isinstance(space, Box):
        fits = actions.shape == shape and bool(np.isfinite(actions).all())
    else:
        rows = actions if batch else [actions]
        fits = actions.shape[: len(batch)] == batch and all(map(space.contains, rows))
    if not fits:
        shown = np.array2string(actions, threshold=6, separator=", ").replace("\n", "")
        raise InputError(
            f"policy: expected a finite action of shape {shape} for {space}; got {shown} of shape "
            f"{actions.shape} {source}"
        )
    return actions, answer[1]


def as_numbers(name: str, value: Any) -> Array:
    """View anything that NumPy reads as an array of real numbers; copy it to keep it.

    Args:
        name: Of the argument, for messages.
        value: Array, tensor on any device and with or without gradient, or nested sequence.

    Raises:
        InputError: For complex numbers, masked entries, dates, text, or rows of unequal length.
    """
    masked = isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any()
    try:
        if hasattr(value, "detach"):  # a tensor; NumPy has no bfloat16
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value
        array = np.asarray(value)
        if array.dtype.kind == "O":
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{name}: expected numbers; {error}") from error
    if masked or array.dtype.kind not in "fiub":
        found = "masked entries: fill them" if masked else f"dtype {array.dtype}"
        raise InputError(f"{name}: expected numbers; got {found}")
    return array


def returned(
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
    shape: tuple[int, ...],
    finite: bool = False,
) -> Array:
    """Call a caller's function with copies, and copy what it returns: a new float64 array.

    Raises:
        InputError: If it returns no numbers of this shape, or not `finite` ones.
    """
    values = as_numbers(name, function(*map(copied, arguments))).astype(np.float64)
    if values.shape != shape or (finite and not np.isfinite(values).all()):
        also = " with NaN or infinity" if values.shape == shape else ""
        expected = f"{'finite ' if finite else ''}numbers of shape {shape}"
        raise InputError(f"{name}: expected {expected}, got {values.shape}{also}; correct it")
    return values


def decided(name: str, function: Callable[[Episode], Any], episode: Episode) -> bool:
    """Call a caller's function that says True or False to a copy of an episode.

    Raises:
        InputError: If it says anything else.
    """
    answer = function(copied(episode))
    if not isinstance(answer, bool | np.bool_):
        raise InputError(f"{name}: expected True or False, got {answer!r}; correct the function")
    return bool(answer)


def copied(value: Any) -> Any:
    """A copy of all arrays of a value; not read-only views, of which torch warns."""
    if isinstance(value, Mapping):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, Episode):
        return Episode(**copied(vars(value)))
    return value.copy() if isinstance(value, np.ndarray) else value


def check_spaces(
    policy: Any,
    env: Any,
    label: str = "policy",
    *,
    observes: bool = True,
    remedy: str = "use it in the environment that it was trained for",
) -> None:
    """Check that a policy's spaces fit an environment's, before anything is played.

    Keys, shapes, and the bounds of actions must be equal; the environment may have more keys. An
    infinite bound says nothing, as data without spaces have none. Other finite bounds of
    observations may come from another constant, or from a wrapper that rescales: a warning.

    Args:
        policy: With `observation_space` and `action_space`, as Stable-Baselines3's and ours, which
            also say what they read of it (`accepts`); one without spaces passes.
        env: The environment as it is played, with its wrappers, or a vector of it; or data, whose
            spaces must be those of other data, or of an agent.
        label: Name of the policy, for messages.
        observes: Whether the policy gets the environment's own observations.
        remedy: What to do.

    Raises:
        ConfigError: If they do not fit; names both spaces, the difference, and what to do.
    """
    for part in ("observation_space", "action_space") if observes else ("action_space",):
        acts = part == "action_space"
        own = getattr(policy, part, None)
        there = getattr(env, f"single_{part}", getattr(env, part))
        accepted = (own,) if acts else getattr(policy, "accepts", (own,))
        found = [_difference(space, there) for space in accepted if space is not None]
        if not found or ("", False) in found:
            continue
        problem, scaled = min(found, key=lambda one: not one[1])
        name = getattr(env, "name", None) or getattr(env.spec, "id", "the environment")
        text = f"{label}: its {part.replace('_', ' ')} is {own}, {name} has {there}: {problem}"
        if acts or not scaled:
            scale = "scale them with gymnasium.wrappers.RescaleAction, or " if scaled else ""
            raise ConfigError(f"{text}; {scale}{remedy}")
        warnings.warn(
            f"{text}; if one is rescaled, numbers mean another thing: {remedy}", stacklevel=3
        )


def _difference(wanted: gym.Space[Any], there: gym.Space[Any]) -> tuple[str, bool]:
    """What differs, empty for nothing, and whether it is but the scale of the numbers."""
    if isinstance(wanted, gym.spaces.Dict) and isinstance(there, gym.spaces.Dict):
        parts = {
            key: _difference(part, there[key]) if key in there.keys() else ("is missing", False)
            for key, part in wanted.items()
        }
        found = [(f"{key!r} {part[0]}", part[1]) for key, part in parts.items() if part[0]]
        return min(found, key=lambda one: one[1], default=("", False))
    if not (isinstance(wanted, Box) and isinstance(there, Box)):
        return ("", False) if wanted == there else ("they are of other kinds", False)
    turned = there.shape[-1:] + there.shape[:-1]  # SB3 turns pictures itself
    if len(there.shape) == 3 and there.dtype == np.uint8 and wanted.shape == turned:
        return "", False
    if wanted.shape != there.shape:
        return f"shape {wanted.shape} against {there.shape}", False
    if {wanted.dtype.kind, there.dtype.kind} == {"f", "u"}:
        return f"{wanted.dtype} against {there.dtype}", True
    for ours, theirs in ((wanted.low, there.low), (wanted.high, there.high)):
        known = np.isfinite(ours) & np.isfinite(theirs)
        if not np.allclose(ours[known], theirs[known], rtol=1e-5, atol=1e-8):
            return "bounds differ", True
    return "", False


def observation_arrays(observations: Observation) -> dict[str, Array]:
    """Return the arrays of plain or Dict observations by key (``""`` for a plain array)."""
    return dict(observations) if isinstance(observations, Mapping) else {"": observations}


def columns(episode: Episode) -> dict[str, Array]:
    """Return the arrays of an episode by name; observations are named ``observations/key``."""
    arrays = {
        f"observations/{key}" if key else "observations": array
        for key, array in observation_arrays(episode.observations).items()
    }
    for name in STEP_ARRAYS:
        array = getattr(episode, name)
        if array is not None:
            arrays[name] = array
    return arrays


def check_structure(
    found: Mapping[str, Column], length: int, rules: EpisodeRules, episode: int
) -> None:
    """Check names, shapes and dtypes of an episode's arrays without reading rows.

    Args:
        found: Arrays by name, as from `columns`.
        length: Steps T of the episode.
        rules: Requirements.
        episode: Index of the episode, for messages.

    Raises:
        DataError: If the episode is empty, or an array is missing, of a wrong shape or dtype.
    """
    damage = functools.partial(DataError, source=rules.source, episode=episode)
    if length < 1:
        raise damage("the episode is empty, at least one step is needed: remove it")
    for name, (rows, shape) in _expected(rules, length).items():
        column = found.get(name)
        if column is None:
            if name in ("costs", "successes"):
                continue
            raise damage(f"'{name}' is missing; found {sorted(found)}")
        _check_shape(name, column.shape, (rows, *shape), rules.source, episode)
        if column.dtype.kind not in "fiub":
            raise damage(f"'{name}' must hold numbers, got dtype {column.dtype}")


def check_values(
    episode: Episode,
    rules: EpisodeRules,
    index: int,
    *,
    start: int = 0,
    length: int | None = None,
    lead: int = 0,
) -> None:
    """Check the values of an episode, or of a window of it.

    Args:
        episode: Steps `start` … of the episode, with `lead` more observations before them.
        rules: Requirements.
        index: Index of the episode, for messages.
        start: First step of the window.
        length: Steps of the whole episode; None if `episode` is the whole one.
        lead: Extra observations before `start`.

    Raises:
        DataError: If a value is not finite, an action is outside its Box, or the episode ends
            before its last step.
    """
    last = (len(episode) if length is None else length) - 1
    for name, array in columns(episode).items():
        first = start - lead if name.startswith("observations") else start
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            _fail(rules, index, first, bad, f"'{name}' is not finite (NaN or infinity)")
        if name in ("terminations", "truncations"):
            early = array.astype(bool) & (start + np.arange(len(array)) < last)
            if early.any():
                problem = f"'{name}' is set here, but the episode goes on to step {last}"
                _fail(rules, index, start, early, problem)
        if name in _FLAGS and array.dtype != np.bool_ and ((array != 0) & (array != 1)).any():
            bad = (array != 0) & (array != 1)
            _fail(rules, index, start, bad, f"'{name}' must be 0 or 1")
    kept = inside(episode.actions, rules.actions)
    if not kept.all():
        problem = f"'actions' leave the action space {rules.actions}: clip them when reading"
        _fail(rules, index, start, ~kept, f"{problem} (clip_actions=True) or correct the space")


def check_episode(episode: Episode, rules: EpisodeRules, index: int) -> None:
    """Check the structure and all values of one episode.

    Raises:
        DataError: With the source, the episode and, if there is one, the step.
    """
    check_structure(columns(episode), len(episode), rules, index)
    check_values(episode, rules, index)


def inside(actions: Array, box: Box) -> Array:
    """Whether each row lies in the box, up to float32 rounding.

    Args:
        actions: ``[…, nu]``.
        box: Bounds.

    Returns:
        Booleans ``[…]``; False for rows that are not finite.
    """
    low = box.low - _ACTION_TOLERANCE * np.maximum(1.0, np.abs(box.low))
    high = box.high + _ACTION_TOLERANCE * np.maximum(1.0, np.abs(box.high))
    kept = (actions >= low) & (actions <= high) & np.isfinite(actions)
    return np.asarray(kept.all(axis=-1))


def _expected(rules: EpisodeRules, length: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    expected = {
        f"observations/{key}" if key else "observations": (length + 1, box.shape)
        for key, box in rules.leaves.items()
    }
    steps = {name: (length, ()) for name in STEP_ARRAYS}
    return {**expected, **steps, "actions": (length, rules.actions.shape)}


def _check_shape(
    name: str, shape: tuple[int, ...], wanted: tuple[int, ...], source: str, episode: int
) -> None:
    if shape == wanted:
        return
    problem = f"'{name}' must have shape {wanted}, got {shape}"
    if name.startswith("observations") and shape == (wanted[0] - 1, *wanted[1:]):
        problem += f": T = {shape[0]} rows where T + 1 are needed; the final observation is missing"
    step = None
    if shape[1:] == wanted[1:]:
        step = min(shape[0], wanted[0])  # the first missing or surplus row
    raise DataError(problem, source=source, episode=episode, step=step)


def _fail(rules: EpisodeRules, index: int, first: int, bad: Any, problem: str) -> None:
    step = first + int(np.argmax(bad))  # the first True
    raise DataError(problem, source=rules.source, episode=index, step=step)
