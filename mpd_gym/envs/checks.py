"""Checks of arguments, which environments make before they change anything, and of making them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import Space

from mpd_gym.boundary import as_numbers
from mpd_gym.errors import ConfigError, InputError, MpdError
from mpd_gym.types import Array

__all__ = ["checked_action", "checked_array", "checked_number", "checked_options", "make_env"]


def checked_array(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Return a float64 copy of an array argument.

    Raises:
        InputError: If it is no array of numbers of this shape, or has a non-finite value.
    """
    array = as_numbers(name, value).astype(np.float64)
    if array.shape != shape:
        raise InputError(f"{name}: expected shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite values, got {array}")
    return array


def checked_action(action: Any, space: Space[Any]) -> Array:
    """Return a float64 copy of one action; it may lie outside its space's bounds.

    Raises:
        InputError: If it is no array of its space's shape, or has a non-finite value.
    """
    return checked_array("action", action, space.shape or ())


def checked_number(name: str, value: Any, *, least: float = 0.0, strictly: bool = False) -> float:
    """Return a finite number as a float.

    Args:
        name: Name of the argument.
        value: Its value.
        least: Smallest number allowed.
        strictly: Whether to refuse `least` itself.

    Raises:
        InputError: If it is no finite number or too small.
    """
    number = float(checked_array(name, value, ()))
    if number < least or (strictly and number == least):
        raise InputError(f"{name}: expected {'>' if strictly else '>='} {least}, got {number}")
    return number


def checked_options(options: Mapping[str, Any] | None, known: Collection[str]) -> Mapping[str, Any]:
    """Return the options of `reset`, an empty mapping for None.

    Raises:
        InputError: If there is an unknown key.
    """
    options = {} if options is None else options
    unknown = set(options) - set(known)
    if unknown:
        raise InputError(f"options: expected keys among {sorted(known)}, got {sorted(unknown)}")
    return options


def make_env(env_id: str, env_kwargs: Mapping[str, Any] | None) -> gym.Env[Any, Any]:
    """Make an environment.

    Raises:
        ConfigError: If Gymnasium cannot make it with this id and arguments.
    """
    try:
        return gym.make(env_id, **(env_kwargs or {}))
    except MpdError:
        raise
    except Exception as error:  # a foreign environment may raise anything for a bad argument
        raise ConfigError(
            f"env: {env_id} cannot be made: {type(error).__name__}: {error}"
        ) from error
