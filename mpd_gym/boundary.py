"""Where what is not ours comes in: numbers, environments, policies and callers' functions.

What comes in is checked here once, copied where it is kept, and trusted afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mpd_gym.errors import ConfigError, InputError
from mpd_gym.types import SUCCESS_KEYS, Array, Episode, Policy

__all__ = [
    "as_flag",
    "as_number",
    "as_numbers",
    "as_typed",
    "check_answer",
    "check_spaces",
    "copied",
    "decided",
    "returned",
    "stepped",
    "succeeded",
]


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


def as_typed(actions: Array, box: Box) -> Array:
    """Actions in the type of their Box; whole ones are rounded, as a cast alone cuts towards 0."""
    return (np.rint(actions) if box.dtype.kind in "iu" else actions).astype(box.dtype)


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


def succeeded(info: Mapping[str, Any]) -> bool | None:
    """Return the success that a step's infos report; None if they report none.

    Raises:
        InputError: If it is no flag.
    """
    return next((as_flag(key, info[key]) for key in SUCCESS_KEYS if key in info), None)


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


def copied(value: Any) -> Any:
    """A copy of all arrays of a value; not read-only views, of which torch warns."""
    if isinstance(value, Mapping):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, Episode):
        return Episode(**copied(vars(value)))
    return value.copy() if isinstance(value, np.ndarray) else value


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
