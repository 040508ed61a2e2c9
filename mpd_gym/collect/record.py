"""Recording a policy in an environment as a Minari data set."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import minari
import numpy as np
from minari import MinariDataset
from minari.serialization import serialize_space
from tqdm import tqdm

from mpd_gym._version import __version__
from mpd_gym.boundary import check_spaces
from mpd_gym.collect.rollout import Assignment, Views
from mpd_gym.collect.sb3_normalize import warn_normalized
from mpd_gym.collect.storage import Decision, Place, Status, already_there, discard
from mpd_gym.collect.workers import Schedule, run_here, run_in_processes
from mpd_gym.collect.writer import Content, DatasetInfo, assemble, describe, plain, write_dataset
from mpd_gym.errors import (
    InputError,
    SolverError,
    WorkerError,
    check_function,
    check_integer,
    check_kind,
    check_policy,
)
from mpd_gym.types import Episode, Policy

__all__ = ["DatasetInfo", "Progress", "Views", "discard", "record", "write_dataset"]


@final
@dataclass(frozen=True)
class Progress:
    """Progress of a collection. Everything counted here is on disk.

    Attributes:
        stored: Episodes that are kept.
        episodes: Episodes wanted.
        steps: Steps of the stored episodes.
        unsolved: Episodes skipped because the policy's solver failed.
        rejected: Episodes skipped because the filter refused them.
    """

    stored: int
    episodes: int
    steps: int
    unsolved: int
    rejected: int


def record(
    policy: Policy | Callable[[], Policy],
    env_id: str,
    dataset_id: str,
    *,
    episodes: int,
    seed: int,
    env_kwargs: Mapping[str, Any] | None = None,
    processes: int = 1,
    deterministic: bool = False,
    accept: Callable[[Episode], bool] | None = None,
    max_discarded: int | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    views: Views | None = None,
    info: DatasetInfo | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    on_stored: Callable[[Progress], None] | None = None,
) -> MinariDataset:
    """Run a policy in an environment and record its episodes as a Minari data set.

    Equal arguments give equal data sets, for any number of processes and interruptions, if a
    policy that draws random numbers has ``reseed(seed)``. The recorder calls it before each
    episode.

    Every reported episode is on disk and survives kill −9. Repeat the call to resume an interrupted
    collection (`episodes`, `processes`, `max_discarded`, `info` and `metadata` may change). The
    data set appears in its place when it is complete.

    Episodes with `solved=False` in the policy's state (a key or attribute, a flag or an array), or
    with SolverError, are skipped, counted and replaced.

    Args:
        policy: Anything with SB3's `predict`, or a function without arguments that makes one;
            several processes need it picklable.
        env_id: Registered environment; ``module:id`` imports the module first.
        dataset_id: ``namespace/name-v0``.
        episodes: Number of episodes to store.
        seed: Seed of the collection; it determines the seeds of all episodes.
        env_kwargs: Arguments of the environment, or `max_episode_steps`; recorded with the data.
        processes: Processes that share the episodes; 1 runs all in this process. With more, a
            script needs ``if __name__ == "__main__":``.
        deterministic: Passed to `predict`.
        accept: Filter; episodes for which it returns False are skipped and counted.
        max_discarded: Most episodes to skip; None for as many as are stored.
        fingerprint: Plain JSON that distinguishes this policy from others of its class, beyond
            its public attributes that are plain values, networks or policies. It is recorded, and
            must be equal to resume.
        views: Parts of the observations to store, and to show to the policy.
        info: Author, reference scores and so on.
        metadata: More entries for the data set's metadata, plain JSON.
        overwrite: Replace a data set of that id once the new one is complete.
        progress: Show a progress bar.
        on_stored: Called with the progress each time episodes are stored.

    Returns:
        The data set.

    Raises:
        ConfigError: If an argument or the policy's spaces do not fit, the data set exists, or an
            unfinished collection has other arguments.
        DataError: If the environment gave a value that is not finite, or of a wrong shape.
        FileError: If the disk is full, or a folder cannot be written to; stored episodes are kept.
        InputError: If the policy gave an action that is not finite or outside the Box, or the
            filter refused more episodes than `max_discarded`.
        SolverError: If more episodes than `max_discarded` were skipped, any of them unsolved.
        WorkerError: If a process died.
        KeyboardInterrupt: On SIGINT, after storing finished episodes; says how to resume.
    """
    check_integer("episodes", episodes, 1)
    check_integer("seed", seed, 0)
    check_integer("processes", processes, 1)
    limit = episodes if max_discarded is None else max_discarded
    check_integer("max_discarded", limit, 0)
    if not callable(policy):
        check_policy(policy)
    check_function("accept", accept)
    check_function("on_stored", on_stored)
    check_kind("views", views, Views)
    check_kind("info", info, DatasetInfo)
    views = views or Views()
    place = Place(dataset_id)
    content = describe(env_id, env_kwargs, views.space, None, views.frame_stack)
    assert content.spec is not None
    space = content.observation_space
    if hasattr(policy, "predict"):  # what a function makes is checked where it is made
        warn_normalized(policy)
        with closing(gym.make(content.spec)) as env:
            check_spaces(policy, env, observes=views.shown is None)
    job = Assignment(dataset_id, content.spec, policy, seed, deterministic, space, views, accept)
    arguments = _arguments(job, plain(fingerprint, "fingerprint"))
    entries = {**(info or DatasetInfo()).metadata(), **plain(metadata, "metadata")}
    with place.exclusive():
        if not place.published():
            if place.final.exists() and not overwrite:
                raise already_there(dataset_id)
            entries["collection"] = {"id": place.begin(arguments), "arguments": arguments}
            with _with_resume_hint(place, episodes):
                schedule = Schedule(_decided(place), episodes)
                with _reporter(schedule, episodes, limit, progress, on_stored) as report:
                    _collect(job, place, schedule, processes, report)
                place.check_space()
                _assemble(place, schedule, content, entries, progress)
                place.publish(overwrite=overwrite)
        place.clear()
    return minari.load_dataset(dataset_id)


def _collect(
    job: Assignment, place: Place, schedule: Schedule, processes: int, report: Callable[[], None]
) -> None:
    """Run candidates until enough episodes are stored."""
    report()
    if processes == 1:
        runs = run_here(job, place.shards, schedule)
    else:
        runs = run_in_processes(job, place.shards, schedule, processes)
    with closing(runs):  # stops the processes, whatever happens
        for decisions in runs if schedule.missing else ():
            for decision in decisions:
                schedule.settle(decision)
            report()


def _assemble(
    place: Place, schedule: Schedule, content: Content, entries: dict[str, Any], progress: bool
) -> None:
    decisions = schedule.settled()
    for name, status in (("unsolved", Status.UNSOLVED), ("rejected", Status.REJECTED)):
        entries["collection"][name] = sum(d.status is status for d in decisions)
    stored = [d.candidate for d in decisions if d.status is Status.STORED]
    bar = tqdm(place.episodes(stored), "writing", len(stored), unit="episode", disable=not progress)
    assemble(place, bar, content, entries)


def _decided(place: Place) -> dict[int, Decision]:
    return {candidate: decision for candidate, (decision, _) in place.decisions().items()}


@contextmanager
def _reporter(
    schedule: Schedule,
    episodes: int,
    limit: int,
    progress: bool,
    on_stored: Callable[[Progress], None] | None,
) -> Iterator[Callable[[], None]]:
    """Yield a function that reports progress, and raises when too many episodes were skipped."""
    first = _progress(schedule, episodes).stored
    with tqdm(
        total=episodes, initial=first, desc="collecting", unit="episode", disable=not progress
    ) as bar:

        def report() -> None:
            now = _progress(schedule, episodes)
            left_out = f"{now.unsolved} unsolved, {now.rejected} rejected"
            bar.set_postfix_str(f"{now.steps} steps, {left_out}", refresh=False)
            bar.update(now.stored - bar.n if progress else 0)
            if on_stored is not None:
                on_stored(now)
            _check_discarded(now, limit)

        yield report


def _progress(schedule: Schedule, episodes: int) -> Progress:
    decisions = schedule.settled()
    stored = [decision for decision in decisions if decision.status is Status.STORED]
    return Progress(
        stored=len(stored),
        episodes=episodes,
        steps=sum(decision.steps for decision in stored),
        unsolved=sum(decision.status is Status.UNSOLVED for decision in decisions),
        rejected=sum(decision.status is Status.REJECTED for decision in decisions),
    )


def _check_discarded(now: Progress, limit: int) -> None:
    if now.unsolved + now.rejected <= limit:
        return
    problem = (
        f"{now.unsolved} episodes were not solved and {now.rejected} were refused by 'accept', "
        f"for {now.stored} stored; max_discarded allows {limit}"
    )
    if now.unsolved:
        raise SolverError(f"{problem}: improve the policy, or allow more")
    raise InputError(f"accept: {problem}: relax the filter, or allow more")


@contextmanager
def _with_resume_hint(place: Place, episodes: int) -> Iterator[None]:
    """Add to an error the number of stored episodes and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_hint(place, episodes)) from None
    except WorkerError as error:
        raise WorkerError(f"{error}; {_hint(place, episodes)}") from error
    except Exception as error:
        error.add_note(_hint(place, episodes))
        raise


def _hint(place: Place, episodes: int) -> str:
    stored = sum(d.status is Status.STORED for d in _decided(place).values())
    return (
        f"{stored} of {episodes} episodes of {place.dataset_id!r} are stored: run the same again "
        f"to resume, or discard them with mpd_gym.collect.record.discard({place.dataset_id!r})"
    )


def _arguments(job: Assignment, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that determines the episodes, as plain JSON."""
    return plain(
        {
            "environment": json.loads(job.spec.to_json()),
            "policy": _identity(job.policy),
            "fingerprint": fingerprint,
            "seed": job.seed,
            "deterministic": job.deterministic,
            "accept": _identity(job.accept),
            "frame_stack": job.views.frame_stack,
            "stored": _identity(job.views.stored),
            "shown": _identity(job.views.shown),
            "observation_space": serialize_space(job.observation_space),
            "mpd_gym_version": __version__,
        },
        "arguments",
    )


def _identity(thing: Any) -> Any:
    """Return plain JSON that is equal for the same thing in another process.

    Objects are described by class and public attributes that are plain values, arrays, networks or
    policies; networks by their weights.
    """
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, (Path, np.generic)):
        return str(thing)
    if isinstance(thing, np.ndarray):
        return [str(thing.dtype), list(thing.shape), hashlib.sha256(thing.tobytes()).hexdigest()]
    if isinstance(thing, Mapping):
        return {str(key): _identity(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_identity(value) for value in thing]
    if isinstance(thing, functools.partial):
        return [_identity(thing.func), _identity(thing.args), _identity(thing.keywords)]
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    if _is_network(thing):
        return [_identity(type(thing)), _digest(thing)]
    parameters = {
        name: _identity(value)
        for name, value in sorted(getattr(thing, "__dict__", {}).items())
        if not name.startswith("_") and _counts(value)
    }
    return [_identity(type(thing)), parameters]


def _counts(value: Any) -> bool:
    """Whether an attribute distinguishes its object from others of its class."""
    if isinstance(value, Mapping):
        return any(map(_is_network, value.values()))
    acts = callable(getattr(value, "predict", None))  # a policy inside another
    return isinstance(value, _PLAIN) or is_dataclass(value) or _is_network(value) or acts


def _is_network(value: Any) -> bool:
    """Whether this is a torch network, tested without torch."""
    return callable(getattr(value, "named_parameters", None)) and not isinstance(value, type)


def _digest(network: Any) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, weights in (*network.named_parameters(), *network.named_buffers()):
        digest.update(name.encode())
        digest.update(np.asarray(weights.detach().cpu().double()).tobytes())
    return digest.hexdigest()


_PLAIN = (bool, int, float, str, Path, np.generic, np.ndarray)
