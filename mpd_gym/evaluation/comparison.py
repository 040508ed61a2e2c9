"""Comparison of policies on the same seeds, with a table, CSV files and a film."""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import numpy as np

from mpd_gym.atomic import check_writable, user_path, write_csv
from mpd_gym.boundary import check_spaces
from mpd_gym.envs.checks import make_env
from mpd_gym.errors import CheckpointError, ConfigError, FileError, check_policy
from mpd_gym.evaluation.figures import (
    captioned,
    draws_plan,
    halved,
    rollout_frames,
    save_gif,
    side_by_side,
)
from mpd_gym.evaluation.returns import Evaluation, Stopwatch, as_seeds, evaluate
from mpd_gym.types import Array, Policy

__all__ = [
    "Entry",
    "compare",
    "load_entries",
    "parse_entry",
    "parse_options",
]

SHIPPED = "shipped"
SB3 = "sb3:"
SUFFIXES = {".safetensors", ".zip"}  # policy files
MAX_FRAMES = 200
_NEXT_OPTION = re.compile(r",(?=[A-Za-z_]\w*=)")
_LABEL = re.compile(r"[^/\\:]+")


@final
@dataclass(frozen=True)
class Entry:
    """One policy of a comparison.

    Attributes:
        label: Name in tables and files.
        policy: Anything with Stable-Baselines3's `predict`.
        deterministic: Passed to `predict`.

    Raises:
        ConfigError: If the policy has no `predict`.
    """

    label: str
    policy: Policy
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_policy(self.policy)


def load_entries(
    texts: Sequence[str],
    env_id: str,
    *,
    options: Mapping[str, Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    deterministic: bool | None = None,
    device: str = "auto",
) -> list[Entry]:
    """Load policies and check that they fit the environment, without playing.

    Args:
        texts: ``[LABEL=]SOURCE[,OPTION=VALUE…]`` each, see `parse_entry`. A source is an agent's
            file, the id of a shipped agent, ``shipped`` for the agent that ships for the
            environment, or ``sb3:FILE`` for a Stable-Baselines3 zip, whose pickles stay closed,
            with ``vecnormalize=FILE`` for a policy trained under ``VecNormalize``.
        env_id: Registered id.
        options: Sampling options of all agents; an entry's own override them.
        env_kwargs: Keyword arguments of the environment.
        deterministic: Passed to `predict`. By default True for policies of Stable-Baselines3, as
            in its `evaluate_policy`, and False for agents, which draw from their own seed. An
            entry's own option ``deterministic`` overrides it.
        device: Device of the agents.

    Raises:
        ConfigError: If the environment does not exist, an option is unknown or out of range, two
            labels are equal, or an agent's spaces differ from the environment's.
        CheckpointError: If a file is missing, damaged, or does not fit the environment.
    """
    env = make_env(env_id, env_kwargs)
    try:
        entries = [
            _load_entry(text, env, env_id, options or {}, deterministic, device) for text in texts
        ]
    finally:
        env.close()
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"label: {label!r} appears twice; write OTHER_LABEL={label}")
    return entries


def parse_entry(text: str) -> tuple[str, str, dict[str, Any]]:
    """Split ``[LABEL=]SOURCE[,OPTION=VALUE…]`` into label, source and options.

    The default label is the text without folder and file suffix. Values are as in `parse_options`.
    """
    head, *pairs = _NEXT_OPTION.split(text)
    label, separator, source = head.partition("=")
    if not separator or not _LABEL.fullmatch(label) or os.path.exists(user_path(head)):
        prefix = SB3 if head.startswith(SB3) else ""
        file = Path(head.removeprefix(SB3))
        name = file.stem if file.suffix in SUFFIXES else file.name
        label, source = ",".join([prefix + name, *pairs]), head
    return label, source, parse_options(pairs)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["temperature=0.5"]`` to ``{"temperature": 0.5}``; values are JSON, Python, or else words.

    Raises:
        ConfigError: If there is no ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise ConfigError(f"option: expected name=value, got {pair!r}")
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
        except (RecursionError, MemoryError) as error:
            raise ConfigError(f"option: the value {text[:20]}… is nested too deep") from error
    return text


def compare(
    policies: Mapping[str, Policy] | Sequence[Entry],
    env_id: str,
    *,
    seeds: int | Sequence[int] = 20,
    num_envs: int = 10,
    env_kwargs: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    film: bool = True,
    progress: bool = False,
    on_played: Callable[[Mapping[str, Evaluation]], None] | None = None,
) -> dict[str, Evaluation]:
    """Play the same episodes with every policy.

    Args:
        policies: Each by its name. Agents of this package draw from their own seed, all others act
            deterministically, as in Stable-Baselines3's `evaluate_policy`; an `Entry` tells
            otherwise.
        env_id: Registered id.
        seeds: One for each episode, a number n stands for ``range(n)``; the film shows the first.
        num_envs: Copies of the environment per call of `predict`.
        env_kwargs: Keyword arguments of the environment.
        folder: Folder for ``summary.csv``, ``episodes.csv`` and the film ``side-by-side.gif``;
            None writes nothing.
        film: Whether to make a film.
        progress: Show bars.
        on_played: Called with the measures before any file is written.

    Returns:
        Each policy's measures by label. `seconds` are from one more episode in a single
        environment (the film's, if there is one), after an uncounted first call. What one policy's
        infos report and another's never do, because it did not occur, is 0 for that one.

    Raises:
        ConfigError: If there is no policy, the environment does not exist, a policy's spaces differ
            from its, or it draws no pictures for the film.
        FileError: If the folder cannot be written to, which is tried first. If a file fails after
            the episodes and there is no `on_played`, that is a warning: no measure is lost.
        InputError: If there is no seed, or one is no whole number of at least 0; from playing, see
            `evaluate`.
    """
    seeds = as_seeds(seeds)
    entries = _entries(policies)
    filmed = film and folder is not None
    first = _first_observation(entries, env_id, env_kwargs, seeds, film=filmed)
    if folder is not None:
        check_writable(folder)
    results: dict[str, Evaluation] = {}
    columns: list[list[Array]] = []
    for entry in entries:
        shown = entry.label if progress else False
        measured = evaluate(
            entry.policy,
            env_id,
            seeds=seeds,
            num_envs=num_envs,
            progress=shown,
            env_kwargs=env_kwargs,
            deterministic=entry.deterministic,
        )
        entry.policy.predict(first, deterministic=entry.deterministic)
        frames, seconds = _timed(entry, env_id, int(seeds[0]), env_kwargs, film=filmed)
        results[entry.label] = replace(measured, seconds=seconds)
        columns += [frames] if filmed else []
    results = _filled(results)
    if on_played is not None:
        on_played(results)
    if folder is not None:
        try:
            _write(Path(folder), results, columns)
        except FileError as error:
            if on_played is not None:
                raise
            warnings.warn(f"{error}; the measures are returned all the same", stacklevel=2)
    return results


def _filled(results: dict[str, Evaluation]) -> dict[str, Evaluation]:
    """Fill in zeros where one policy never saw what another shows the environment to report."""
    for name in ("costs", "successes", "successes_ever", "collisions"):
        told = [getattr(found, name) for found in results.values()]
        zeros: Any = next((np.zeros_like(values) for values in told if values is not None), None)
        for label, found in results.items():
            if getattr(found, name) is None:
                results[label] = replace(found, **{name: zeros})
    return results


def _entries(policies: Mapping[str, Policy] | Sequence[Entry]) -> Sequence[Entry]:
    if isinstance(policies, Mapping):
        policies = [Entry(name, one, not hasattr(one, "plan")) for name, one in policies.items()]
    if not policies or not all(isinstance(one, Entry) for one in policies):
        raise ConfigError(f"policies: expected at least one, each by its name; got {policies!r}")
    return policies


def _timed(
    entry: Entry, env_id: str, seed: int, env_kwargs: Mapping[str, Any] | None, *, film: bool
) -> tuple[list[Array], Array]:
    """Play one episode in one environment; return pictures, if `film`, and seconds per action."""
    watch = Stopwatch(entry.policy)
    settings: dict[str, Any] = {"env_kwargs": env_kwargs, "deterministic": entry.deterministic}
    pictures: list[Array] = []
    if film:
        draw = draws_plan(entry.policy)
        frames = rollout_frames(
            watch, env_id, seed=seed, draw=draw, max_frames=MAX_FRAMES, **settings
        )
        pictures = captioned([halved(frame) for frame in frames], entry.label)
    else:
        evaluate(watch, env_id, seeds=[seed], **settings)
    return pictures, np.array(watch.seconds)


def _load_entry(
    text: str,
    env: gym.Env[Any, Any],
    env_id: str,
    options: Mapping[str, Any],
    deterministic: bool | None,
    device: str,
) -> Entry:
    label, source, own = parse_entry(text)
    is_sb3 = source.startswith(SB3)
    chosen = own.pop("deterministic", is_sb3 if deterministic is None else deterministic)
    if not isinstance(chosen, bool):
        raise ConfigError(f"deterministic: expected true or false, got {chosen!r}")
    if not is_sb3:
        policy = _load_agent(env_id if source == SHIPPED else source, device, {**options, **own})
        check_spaces(policy, env, label)
        return Entry(label, policy, chosen)
    statistics = own.pop("vecnormalize", None)
    if own:
        raise ConfigError(
            f"{label}: a policy of Stable-Baselines3 has only the options deterministic and "
            f"vecnormalize, got {sorted(own)}"
        )
    from mpd_gym.collect.sb3_zip import load_sb3

    statistics = None if statistics is None else str(statistics)
    policy = load_sb3(source.removeprefix(SB3), env, vecnormalize=statistics)
    return Entry(label, policy, chosen)


def _load_agent(source: str, device: str, options: Mapping[str, Any]) -> Any:
    from mpd_gym.agents import load_agent

    if source.endswith(".zip"):
        raise CheckpointError(f"{source}: for a Stable-Baselines3 zip write {SB3}{source}")
    return load_agent(source, device, **options)


def _first_observation(
    entries: Sequence[Entry],
    env_id: str,
    env_kwargs: Mapping[str, Any] | None,
    seeds: Sequence[int],
    *,
    film: bool,
) -> Any:
    """Return the first episode's first observation, after a check that all policies fit.

    For a `film`, check that pictures exist.
    """
    env = make_env(env_id, env_kwargs)
    try:
        for entry in entries:
            check_spaces(entry.policy, env, entry.label)
        if film and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ConfigError(f"env: {env_id} draws no pictures; ask for no GIF (--no-gif)")
        first = env.reset(seed=int(seeds[0]))[0]
    finally:
        env.close()
    if not film:
        return first
    try:
        with closing(make_env(env_id, {**(env_kwargs or {}), "render_mode": "rgb_array"})) as seen:
            seen.reset(seed=int(seeds[0]))
            captioned([halved(np.asarray(seen.render()))], "")
    except Exception as error:  # simulators without a display raise anything
        raise ConfigError(
            f"env: {env_id} cannot be drawn here ({error}); ask for no GIF (--no-gif), or set "
            "MUJOCO_GL=egl where MuJoCo has no display"
        ) from error
    return first


def _write(
    folder: Path, results: Mapping[str, Evaluation], columns: Sequence[Sequence[Array]]
) -> None:
    """Write the CSV files, and the film if there are pictures."""
    write_csv(folder / "summary.csv", [_summary(*item) for item in results.items()])
    rows = [row for item in results.items() for row in _episodes(*item)]
    write_csv(folder / "episodes.csv", rows)
    if columns:
        save_gif(side_by_side(columns), folder / "side-by-side.gif")


def _summary(label: str, found: Evaluation) -> dict[str, Any]:
    """One row of ``summary.csv``: means, bounds of their 95 % intervals, milliseconds."""
    row: dict[str, Any] = {"policy": label, "episodes": len(found.seeds)}
    for measure, interval in found.summary().items():
        name = measure.replace(" ", "_")
        row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    taken = 1e3 * found.seconds
    p50, p99 = np.percentile(taken, (50, 99))
    return {**row, "ms_mean": float(taken.mean()), "ms_p50": float(p50), "ms_p99": float(p99)}


def _episodes(label: str, found: Evaluation) -> list[dict[str, Any]]:
    """Rows of ``episodes.csv``."""
    columns = {
        "seed": found.seeds,
        "return": found.returns,
        "length": found.lengths,
        "cost": found.costs,
        "success": found.successes,
        "success_ever": found.successes_ever,
        "collision": found.collisions,
        "final_error": found.final_errors,
    }
    return [
        {"policy": label}
        | {name: values[index].item() for name, values in columns.items() if values is not None}
        for index in range(len(found.seeds))
    ]
