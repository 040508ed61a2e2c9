"""Validated episodes from Minari data sets, flat D4RL and DSRL files, or memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import minari
from minari import MinariDataset
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage import get_dataset_path

from mpd_gym.atomic import user_path, writing
from mpd_gym.collect.storage import DATASETS
from mpd_gym.datasets.hdf5_source import FlatFormat, FlatSource
from mpd_gym.datasets.minari_source import MinariSource
from mpd_gym.datasets.source import EpisodeSource, MemorySource
from mpd_gym.errors import ConfigError, DataError
from mpd_gym.types import Episode

__all__ = ["EpisodeSource", "FlatFormat", "load_episodes", "recover_env"]

_OURS = "mpd_gym"  # namespace of `mpd-gym collect`
_SUFFIXES = (".hdf5", ".h5")


def load_episodes(
    source: str | Path | MinariDataset | Sequence[Episode],
    *,
    metadata: Mapping[str, Any] | None = None,
    layout: FlatFormat | None = None,
    clip_actions: bool = False,
    stack_frames: bool = True,
    download: bool = True,
) -> EpisodeSource:
    """Open episodes for reading; each is checked before it is returned.

    The reader runs no code named in a file, follows no link in a file, and reads only the requested
    rows, so data may be larger than memory.

    Args:
        source: A Minari id (Minari downloads a missing one); a Minari data set, with its selection
            of episodes; the path of a flat D4RL or DSRL file (``.hdf5``, ``.h5``) or of a Minari
            data set's folder; or episodes in memory.
        metadata: Overrides or extends the data's own, for example `action_space` for flat files,
            which state no bounds.
        layout: Reading options for flat files (see `FlatFormat`).
        clip_actions: Clip actions into the action space; by default actions outside are refused.
        stack_frames: If each frame was recorded once (`frame_stack` in the metadata), return the
            environment's observations ``[T + 1, frame_stack, …]`` instead of single frames
            ``[T + 1, …]``.
        download: Let Minari download missing ids.

    Returns:
        Source of the episodes.

    Raises:
        DataError: If the data is missing, damaged, or cannot be downloaded.
        ConfigError: If `source` is none of the above, or `layout` does not apply to it.
    """
    extra = dict(metadata or {})
    if isinstance(source, (str, Path)) and str(source).endswith(_SUFFIXES):
        return FlatSource(
            user_path(source), extra, layout=layout or FlatFormat(), clip_actions=clip_actions
        )
    if layout is not None:
        raise ConfigError(f"layout: only for flat files ({', '.join(_SUFFIXES)}), got {source!r}")
    if isinstance(source, (str, Path)):
        folder = user_path(source) if isinstance(source, Path) else _local_folder(source, download)
        data = folder / "data" if (folder / "data").is_dir() else folder
        return MinariSource(data, str(source), extra, clip_actions=clip_actions, stack=stack_frames)
    if isinstance(source, MinariDataset):
        return MinariSource(
            Path(source.storage.data_path),
            source.id,
            extra,
            indices=[int(index) for index in source.episode_indices],
            clip_actions=clip_actions,
            stack=stack_frames,
        )
    if isinstance(source, Sequence):
        return MemorySource(cast("Sequence[Episode]", source), extra, clip_actions=clip_actions)
    raise ConfigError(
        "source: expected a Minari id or data set, a path, or a sequence of Episode, got "
        f"{type(source).__name__}"
    )


def recover_env(source: EpisodeSource, **kwargs: Any) -> gym.Env[Any, Any]:
    """Make the environment of a data set.

    It makes only ids registered in this process, with the arguments and time limit from the file.
    Unlike Minari's `recover_environment` it never uses the file's entry points.

    Args:
        source: Data that names its environment.
        **kwargs: Arguments that override the file's, such as `render_mode`.

    Raises:
        DataError: If the data names no environment, an unknown one, or an entry point or wrappers
            other than the registered ones.
    """
    known = source.metadata
    env_id, arguments = known.get("env_id"), known.get("env_kwargs", {})
    spec = gym.registry.get(env_id) if isinstance(env_id, str) else None
    if spec is None:
        raise DataError(
            f"the environment {env_id!r} is not registered here: import the package that has it, "
            "or make the environment yourself",
            source=source.name,
        )
    entry, wrappers = known.get("env_entry_point"), known.get("env_wrappers", [])
    ours = [{"name": w.name, "entry_point": w.entry_point, "kwargs": w.kwargs}
            for w in spec.additional_wrappers]  # fmt: skip
    if (isinstance(spec.entry_point, str) and entry not in (None, spec.entry_point)) or (
        wrappers and wrappers != ours
    ):
        raise DataError(
            f"the file names other code for {env_id!r} than the registry (entry point {entry!r}, "
            f"wrappers {wrappers}), which is not run; if you trust the registered environment: "
            f"gymnasium.make({env_id!r}, **{arguments})",
            source=source.name,
        )
    limit = {"max_episode_steps": known.get("max_episode_steps")}
    return gym.make(spec, **{**limit, **arguments, **kwargs})


def _local_folder(dataset_id: str, download: bool) -> Path:
    try:
        namespace, _, _ = parse_dataset_id(dataset_id)
    except (TypeError, ValueError) as error:  # TypeError: no version
        raise ConfigError(
            f"source: expected a Minari id such as 'namespace/name-v0' or a path ending in "
            f"{' or '.join(_SUFFIXES)}, got {dataset_id!r}"
        ) from error
    with writing(DATASETS):
        folder: Path = get_dataset_path(dataset_id)
    if (folder / "data").is_dir():
        return folder
    if (namespace or "").split("/")[0] == _OURS:
        raise DataError(
            f"there is no such data set in {folder.parent}: mpd-gym collect {dataset_id}",
            source=dataset_id,
        )
    if dataset_id in gym.registry:
        raise DataError(
            "this is an environment, not a data set: record a policy's episodes "
            "(mpd_gym.collect.record.record), or name a data set, as 'namespace/name-v0', or a "
            f"file ending in {' or '.join(_SUFFIXES)}",
            source=dataset_id,
        )
    if not download:
        raise DataError(
            f"there is no such data set in {folder.parent}: minari download {dataset_id}",
            source=dataset_id,
        )
    _download(dataset_id, folder)
    return folder


def _download(dataset_id: str, folder: Path) -> None:
    try:
        minari.download_dataset(dataset_id)
    except Exception as error:  # clients raise many errors without a network
        raise DataError(
            f"there is no such data set in {folder.parent}, and the download failed "
            f"({type(error).__name__}: {error}): on a machine with a network run "
            f"'minari download {dataset_id}' (pip install 'minari[hdf5,hf]'), then copy the folder "
            f"to {folder}",
            source=dataset_id,
        ) from error
    if not (folder / "data").is_dir():
        raise DataError("the download left no data behind", source=dataset_id)
