"""Errors of the package, checks of arguments, and imports of optional dependencies.

Every message names the argument or file, the expectation, the value and the remedy.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = [
    "MALFORMED",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FileError",
    "InputError",
    "MissingExtraError",
    "MpdError",
    "PlanningError",
    "SolverError",
    "TrainingError",
    "WorkerError",
    "check_choice",
    "check_function",
    "check_integer",
    "check_kind",
    "check_number",
    "check_policy",
    "check_widths",
    "from_mapping",
    "known_fields",
    "require",
]

MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
    NotImplementedError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What parsing JSON, and building objects that it describes, may raise."""

_MOST_LAYERS = 64


class MpdError(Exception):
    """Base of every error that `mpd_gym` raises on purpose."""


class InputError(MpdError, ValueError):
    """An array or argument has the wrong shape or type, or a non-finite value."""


class ConfigError(MpdError, ValueError):
    """A configuration is unknown, out of range or contradicts itself."""


class DataError(MpdError, ValueError):
    """A data set is damaged or incomplete.

    Args:
        problem: The expectation, the value, and the remedy.
        source: File or data set id.
        episode: Index of the damaged episode, if there is one.
        step: Step within the episode, if there is one.
    """

    def __init__(
        self, problem: str, *, source: str, episode: int | None = None, step: int | None = None
    ) -> None:
        where = [source]
        if episode is not None:
            where.append(f"episode {episode}")
        if step is not None:
            where.append(f"step {step}")
        super().__init__(f"{', '.join(where)}: {problem}")
        self.problem, self.source, self.episode, self.step = problem, source, episode, step

    def __reduce__(self) -> tuple[object, ...]:
        made = functools.partial(
            DataError, self.problem, source=self.source, episode=self.episode, step=self.step
        )
        return made, ()


class CheckpointError(MpdError, ValueError):
    """A file is truncated, altered, of another kind, or does not match its configuration."""


class PlanningError(MpdError, RuntimeError):
    """No usable plan: every candidate is non-finite."""


class SolverError(MpdError, RuntimeError):
    """A numerical solver (the nonlinear MPC) did not converge."""


class TrainingError(MpdError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class WorkerError(MpdError, RuntimeError):
    """A worker process died; stored episodes are kept."""


class FileError(MpdError, OSError):
    """A file or folder cannot be written: no space, no permission, or no folder."""


class MissingExtraError(MpdError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency at the point of use.

    Args:
        module: Name to import, for example ``"casadi"``.
        extra: Extra of this package that installs it.
        purpose: Feature that needs it; the start of the message.

    Raises:
        MissingExtraError: With the exact pip line, if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module exists; one of its own imports is missing
        raise MissingExtraError(
            f"{purpose} needs '{module}', which is not installed: pip install 'mpd-gym[{extra}]'"
        ) from error


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Check that the argument `name` is one of the `known` words.

    Raises:
        ConfigError: With the known words and the closest one.
    """
    words = sorted(known)
    if isinstance(value, str) and value in words:
        return
    close = difflib.get_close_matches(str(value), words, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{name}: expected one of {', '.join(words)}; got {value!r}.{hint}")


def check_function(name: str, value: object) -> None:
    """Check that the argument `name` is callable or None.

    Raises:
        ConfigError: With the value.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name}: expected a function or None; got {value!r}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Check that the argument `name` is of this kind or None.

    Raises:
        ConfigError: With the kind and the value.
    """
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name}: expected {kind.__name__} or None; got {value!r}")


def check_policy(value: object) -> None:
    """Check that a policy has Stable-Baselines3's `predict`.

    Raises:
        ConfigError: With the value, and for a file name the functions that open files.
    """
    try:
        inspect.signature(getattr(value, "predict", None)).bind(*[None] * 4)  # type: ignore[arg-type]
    except ValueError:  # written in C: what it takes is not known before the call
        pass
    except TypeError as error:  # no function, or of other arguments
        is_name = isinstance(value, (str, os.PathLike))
        hint = "load_agent and load_sb3 open files" if is_name else f"{error}: wrap it in one"
        raise ConfigError(
            "policy: expected an object with predict(observation, state, episode_start, "
            f"deterministic); got {value!r}; {hint}"
        ) from error


def check_integer(name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    """Check that the argument `name` is an integer of at least `low`, and of at most `high`.

    Raises:
        ConfigError: With the bounds and the value.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not low <= value <= high:  # type: ignore[operator]
        open_ended = high == 2**63 - 1 and not (whole and value > high)  # type: ignore[operator]
        bounds = f">= {low}" if open_ended else f"from {low} to {high}"
        raise ConfigError(f"{name}: expected an integer {bounds}; got {value!r}")


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> int | float:
    """Return the argument `name` as a plain finite number from `low`, or `above` it, to `high`.

    Raises:
        ConfigError: With the bounds and the value.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        number = value if isinstance(value, int) else float(value)
    inside = abs(number) <= sys.float_info.max and low <= number <= high
    if inside and not (above and number == low):
        return number
    bounds = f" in {'(' if above else '['}{low}, {high}]"
    if high == math.inf:
        bounds = "" if low == -math.inf else f" {'>' if above else '>='} {low}"
    raise ConfigError(f"{name}: expected a finite number{bounds}, got {value!r}")


def check_widths(name: str, values: Sequence[int]) -> None:
    """Check that the argument `name` holds the widths of a network's layers, at most 64.

    Raises:
        ConfigError: With the number of layers, or a width that is no integer of at least 1.
    """
    if len(values) > _MOST_LAYERS:
        raise ConfigError(f"{name}: expected at most {_MOST_LAYERS} layers; got {len(values)}")
    for width in values:
        check_integer(name, width, 1)


def known_fields(config: type, values: Mapping[str, Any]) -> None:
    """Check that every key of `values` is a field of the dataclass `config`.

    Raises:
        ConfigError: Naming the closest match.
    """
    for name in values:
        check_choice(f"{config.__name__} option", name, _hints(config))


def from_mapping(config: type, values: Any) -> Any:
    """Build a dataclass from plain JSON values, refusing unknown names and other types.

    Raises:
        ConfigError: If `values` is not a mapping, or a name, type or value is wrong.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{config.__name__}: expected a mapping, got {type(values).__name__}")
    known_fields(config, values)
    for name, value in values.items():
        if not _fits(value, hint := _hints(config)[name]):
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ConfigError(f"{config.__name__}.{name}: expected {expected}; got {value!r:.80}")
    try:
        return config(**values)
    except TypeError as error:
        raise ConfigError(f"{config.__name__}: {error}") from error


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    """Annotations of a dataclass's fields."""
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value, or a part of it, is what a field's annotation says."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(v, parts[1]) for v in value.values())
    if origin is not None:  # tuples and sequences
        many = origin is not tuple or parts[-1] is ...
        right = isinstance(value, (list, tuple)) and (many or len(value) == len(parts))
        return right and all(map(_fits, value, parts[:1] * len(value) if many else parts))
    if hint in (int, float):  # and finite
        right = isinstance(value, Integral if hint is int else Real)
        return right and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    kinds: Any = (hint, Mapping) if is_dataclass(hint) else hint
    return isinstance(value, kinds)
