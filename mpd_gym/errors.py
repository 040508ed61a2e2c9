"""Errors of the package, checks of arguments, and imports of optional dependencies.

Every message names the argument or file, the expectation, the value and the remedy.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable
from types import ModuleType

__all__ = [
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
    "check_policy",
    "require",
]


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
        return _rebuild_data_error, (self.problem, self.source, self.episode, self.step)


def _rebuild_data_error(
    problem: str, source: str, episode: int | None, step: int | None
) -> DataError:
    return DataError(problem, source=source, episode=episode, step=step)


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


def check_policy(value: object) -> None:
    """Check that a policy has Stable-Baselines3's `predict`.

    Raises:
        ConfigError: With the value, and for a file name the functions that open files.
    """
    if not callable(getattr(value, "predict", None)):
        is_name = isinstance(value, (str, os.PathLike))
        hint = "; load_agent and load_sb3 open files" if is_name else ""
        raise ConfigError(
            "policy: expected an object with predict(observation, state, episode_start, "
            f"deterministic); got {value!r}{hint}"
        )


def check_integer(name: str, value: object, low: int) -> None:
    """Check that the argument `name` is an integer of at least `low`.

    Raises:
        ConfigError: With the bound and the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}: expected an integer >= {low}; got {value!r}")
