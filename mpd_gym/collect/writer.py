"""Writing Minari data sets, whole or not at all, and without jax."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from minari import MinariDataset
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from tqdm import tqdm

from mpd_gym._version import __version__
from mpd_gym.atomic import writing
from mpd_gym.collect.storage import Place, already_there
from mpd_gym.envs.checks import make_env
from mpd_gym.errors import ConfigError, InputError, check_kind
from mpd_gym.types import Array, Episode
from mpd_gym.validation import (
    EpisodeRules,
    action_box,
    check_episode,
    observation_arrays,
    observation_leaves,
)

__all__ = ["Content", "DatasetInfo", "assemble", "describe", "plain", "write_dataset"]


@final
@dataclass(frozen=True)
class DatasetInfo:
    """Description of a data set; ``minari show`` prints it.

    Args:
        author: Name of the author.
        author_email: Address of the author.
        code_permalink: Code that made the data.
        algorithm_name: Policy that acted.
        description: Content of the data set.
        ref_min_score: Return that counts as 0 in normalised scores, usually a random policy's.
        ref_max_score: Return that counts as 1, usually an expert's.
        requirements: Packages that the environment needs, in pip's notation; by default this
            package and Gymnasium at their installed versions.

    Raises:
        ConfigError: If only one reference score is given, or they are not in order.
    """

    author: str | None = None
    author_email: str | None = None
    code_permalink: str | None = None
    algorithm_name: str | None = None
    description: str | None = None
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    requirements: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        low, high = self.ref_min_score, self.ref_max_score
        if (low is None) != (high is None) or (
            low is not None and high is not None and not -np.inf < low < high < np.inf
        ):
            raise ConfigError(
                "ref_min_score, ref_max_score: expected two finite numbers, the first smaller, or "
                f"neither; got {low} and {high}"
            )

    def metadata(self) -> dict[str, Any]:
        """Return the fields that are set, in the form that Minari stores."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        for name in {"author", "author_email"} & known.keys():
            known[name] = {known[name]}
        installed = (
            f"mpd-gym=={__version__}",
            f"gymnasium=={importlib.metadata.version('gymnasium')}",
        )
        known["requirements"] = list(known.get("requirements", installed))
        return known


def write_dataset(
    dataset_id: str,
    episodes: Iterable[Episode],
    *,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
    frame_stack: int = 1,
    info: DatasetInfo | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> MinariDataset:
    """Write existing episodes as a Minari data set.

    Every episode is checked first. The data set is assembled in a staging folder and renamed when
    it is complete, so a crash leaves the old data set, or none.

    Args:
        dataset_id: ``namespace/name-v0``.
        episodes: At least one; consumed one at a time. All have costs, or none has; the same holds
            for `successes`.
        env_id: Environment of the episodes; its spaces are the default.
        env_kwargs: Arguments of the environment.
        observation_space: Space of one stored observation.
        action_space: Space of one action.
        frame_stack: Frames that the environment stacks in an observation, where `episodes` hold
            each frame once, ``[T + 1, …]``; readers stack them again.
        info: Author, reference scores and so on.
        metadata: More entries for the data set's metadata, plain JSON.
        overwrite: Replace a data set of that id.
        progress: Show a progress bar.

    Returns:
        The data set.

    Raises:
        ConfigError: If an argument does not fit, or the data set exists.
        DataError: If an episode is damaged; names the episode and the step.
        FileError: If the data set cannot be written, as on a full disk; the old one stays.
        InputError: If there are no episodes.
    """
    check_kind("info", info, DatasetInfo)
    place = Place(dataset_id)
    if place.final.exists() and not overwrite:
        raise already_there(dataset_id)
    content = describe(env_id, env_kwargs, observation_space, action_space, frame_stack)
    with place.exclusive():
        if place.stored():
            raise ConfigError(
                f"an unfinished collection of {dataset_id!r} has episodes in {place.staging}: "
                "finish it, choose another id, or discard them with "
                f"mpd_gym.collect.record.discard({dataset_id!r})"
            )
        assemble(
            place,
            tqdm(episodes, "writing", unit="episode", disable=not progress),
            content,
            {**(info or DatasetInfo()).metadata(), **plain(metadata, "metadata")},
        )
        place.publish(overwrite=overwrite)
    return minari.load_dataset(dataset_id)


@final
@dataclass(frozen=True)
class Content:
    """Environment and spaces of a data set's episodes.

    Attributes:
        spec: Environment of the episodes; None if unknown.
        observation_space: Space of one stored observation.
        action_space: Space of one action.
        frame_stack: Frames that the environment stacks; only the newest is stored.
    """

    spec: EnvSpec | None
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    frame_stack: int


def describe(
    env_id: str | None,
    env_kwargs: Mapping[str, Any] | None,
    observation_space: gym.Space[Any] | None,
    action_space: gym.Space[Any] | None,
    frame_stack: int,
) -> Content:
    """Describe the episodes of an environment, by making it once.

    Raises:
        ConfigError: If the arguments do not fit, or cannot be written down.
    """
    spec = None
    if env_id is not None:
        with closing(make_env(env_id, plain(env_kwargs, "env_kwargs"))) as env:
            spec = _spec(env)
            observation_space = observation_space or _newest(env.observation_space, frame_stack)
            action_space = action_space or env.action_space
    if observation_space is None or action_space is None:
        raise ConfigError("env_id: give it, or both observation_space and action_space")
    observation_leaves(observation_space)
    return Content(spec, observation_space, action_box(action_space), frame_stack)


def assemble(
    place: Place, episodes: Iterable[Episode], content: Content, metadata: Mapping[str, Any]
) -> None:
    """Write a whole data set into the place's staging folder.

    Args:
        place: Place that is held exclusively.
        episodes: At least one.
        content: Environment and spaces of the episodes.
        metadata: Entries besides the standard ones.

    Raises:
        DataError: If an episode is damaged.
        FileError: If the disk is full.
        InputError: If there are no episodes.
    """
    folder = place.assembled / "data"
    kept = {
        "dataset_id": place.dataset_id,
        "minari_version": minari.__version__,
        "mpd_gym_version": __version__,
        "frame_stack": content.frame_stack,
    }
    with writing(folder):
        folder.mkdir(parents=True)
        storage = MinariStorage.new(
            folder,
            observation_space=content.observation_space,
            action_space=content.action_space,
            env_spec=content.spec,
            data_format="hdf5",
            jpeg_encoding=False,  # JPEG would lose detail
        )
        storage.update_metadata({**metadata, **kept})
    rules = EpisodeRules(
        place.dataset_id,
        observation_leaves(content.observation_space),
        action_box(content.action_space),
    )
    _write(storage, folder / "main_data.hdf5", _buffers(episodes, rules))
    if storage.total_episodes == 0:
        raise InputError("episodes: expected at least one, got none")
    if place.namespace is not None and place.namespace not in list_local_namespaces():
        with writing(folder):
            create_namespace(place.namespace)


@final
class _Unfailing(io.FileIO):
    """A file that fails without telling: HDF5 crashes the process where a write fails.

    Attributes:
        error: The first failure; nothing is written after it.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data)
        try:
            while self.error is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


def _write(storage: Any, path: Path, buffers: Iterator[EpisodeBuffer]) -> None:
    """Write episodes; a full disk raises FileError."""

    def while_written(file: _Unfailing) -> Iterator[EpisodeBuffer]:
        for buffer in buffers:
            yield buffer
            if file.error is not None:
                return

    with _Unfailing(path, "r+") as file:
        storage._file_path = file  # h5py takes a path or a file
        try:
            storage.update_episodes(while_written(file))
        except Exception:
            if file.error is None:
                raise
        with writing(path):
            if file.error is not None:
                raise file.error


def _spec(env: gym.Env[Any, Any]) -> EnvSpec:
    """Return the specification that makes the same environment again, also elsewhere.

    It is the registered one with the arguments and time limit of `env`, so it does not list the
    wrappers of the entry point twice.
    """
    found = env.spec
    registered = gym.registry.get(found.id) if found is not None else None
    if found is None or registered is None or callable(registered.entry_point):
        raise ConfigError(
            f"environment {found.id if found else env!r} must be registered with a string entry "
            "point ('module:Class'), so that a data set can name it"
        )
    spec = copy.deepcopy(registered)
    spec.kwargs = plain(found.kwargs, "env_kwargs")
    spec.max_episode_steps = found.max_episode_steps
    return spec


def _newest(space: gym.Space[Any], frame_stack: int) -> gym.Space[Any]:
    """Return the space of a stored observation: the whole one, or its newest frame."""
    if frame_stack == 1:
        return space
    if isinstance(space, Box) and len(space.shape) > 1 and space.shape[0] == frame_stack:
        return Box(space.low[-1], space.high[-1], dtype=space.dtype.type)
    raise ConfigError(
        "frame_stack: expected the length of the first axis of the environment's observations, "
        f"got {frame_stack} with {space}"
    )


def plain(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """Return arguments as plain JSON, with arrays as lists.

    Raises:
        ConfigError: If an argument cannot be JSON, such as an object or a function.
    """
    check_kind(name, values, Mapping)
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(values or {}), default=_plain_array))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name}: expected numbers, strings, lists, mappings and arrays; got "
            f"{reprlib.repr(values)} ({error})"
        ) from error
    return result


def _plain_array(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain")


def _buffers(episodes: Iterable[Episode], rules: EpisodeRules) -> Iterator[EpisodeBuffer]:
    """Check the episodes and turn them into Minari's form."""
    optional: dict[str, bool] = {}
    for index, episode in enumerate(episodes):
        check_episode(episode, rules, index)
        for name in ("costs", "successes"):
            present = getattr(episode, name) is not None
            if optional.setdefault(name, present) is not present:
                raise InputError(
                    f"episodes: all have '{name}', or none; episode {index} differs from the first"
                )
        yield _buffer(episode)


def _buffer(episode: Episode) -> EpisodeBuffer:
    infos: dict[str, Array] = {}
    if episode.costs is not None:
        infos["cost"] = np.concatenate(([0.0], episode.costs))
    if episode.successes is not None:
        infos["is_success"] = np.concatenate(([False], episode.successes))
    return EpisodeBuffer(
        seed=episode.seed,
        observations=_nested(observation_arrays(episode.observations)),
        actions=episode.actions,
        rewards=episode.rewards,
        terminations=episode.terminations,
        truncations=episode.truncations,
        infos=infos,
    )


def _nested(arrays: Mapping[str, Array]) -> Any:
    """Undo the joining of nested keys."""
    if "" in arrays:
        return arrays[""]
    tree: dict[str, Any] = {}
    for key, array in arrays.items():
        *path, last = key.split("/")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = array
    return tree
