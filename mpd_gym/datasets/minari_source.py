"""Episodes of Minari data sets, read with h5py alone.

Minari checks nothing, follows links, and creates environments from entry points in the file. Its
layout (episode groups, `metadata.json`) is simple, so this module reads it directly.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import numpy as np
from minari.dataset.minari_storage import is_image_space
from minari.serialization import deserialize_space
from PIL import Image

from mpd_gym.datasets.hdf5_files import Hdf5File
from mpd_gym.datasets.source import EpisodeSource
from mpd_gym.errors import MALFORMED, DataError
from mpd_gym.types import SUCCESS_KEYS, Array, Episode
from mpd_gym.validation import Column, check_structure

__all__ = ["MinariSource"]

_MOST_FRAMES = 1000


@final
class MinariSource(EpisodeSource):
    """Episodes of a Minari data set in HDF5 format.

    Args:
        folder: The data set's ``data`` folder.
        name: Data set id or folder, for messages.
        metadata: Overrides what the file says.
        indices: Episodes to use; None for all.
        clip_actions: As for `EpisodeSource`.
        stack: Stack frames that were recorded once (the file's `frame_stack`).

    Raises:
        DataError: If a file is missing, damaged, or of an unsupported format.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        metadata: Mapping[str, Any],
        *,
        indices: Sequence[int] | None = None,
        clip_actions: bool = False,
        stack: bool = True,
    ) -> None:
        known = {**_read_metadata(folder, name), **metadata}
        self._file = Hdf5File(folder / "main_data.hdf5", name)
        numbers = range(known["total_episodes"]) if indices is None else indices
        if not numbers:
            raise DataError("the data set has no episodes: record some", source=name)
        found = [self._file.attributes(f"episode_{number}", number) for number in numbers]
        self._seeds = [_whole(attributes.get("seed")) for attributes in found]
        lengths = [_whole(attributes.get("total_steps")) for attributes in found]
        if None in lengths:
            raise DataError(
                "attribute 'total_steps' is missing or no whole number",
                source=name,
                episode=numbers[lengths.index(None)],
            )
        frames = known["frame_stack"] if stack else 1
        super().__init__(
            name,
            np.array(lengths),
            known,
            clip_actions=clip_actions,
            frames=frames,
            numbers=numbers,
        )
        self._jpeg = {key for key, leaf in self._rules.leaves.items() if is_image_space(leaf)}
        if not known.get("jpeg_encoding", True):
            self._jpeg = set()
        self._has_costs = self._has_info("cost")
        self._success = next((key for key in SUCCESS_KEYS if self._has_info(key)), None)
        if self._lengths.sum(dtype=float) > self._file.size:  # before anything of that size is made
            for index in range(len(self)):
                self._check(index)

    def _has_info(self, key: str) -> bool:
        """Return whether the first episode has an info; then all must have it."""
        return self._file.exists(f"episode_{self._numbers[0]}/infos/{key}")

    def _infos(self) -> dict[str, str]:
        """Return the keys of infos in the file by their names in an Episode."""
        infos = {"costs": "cost"} if self._has_costs else {}
        return infos | ({"successes": self._success} if self._success else {})

    def _check(self, index: int) -> None:
        number, length = self._numbers[index], int(self._lengths[index])
        group = f"episode_{number}"
        found: dict[str, Column] = {}
        for key, leaf in self._rules.leaves.items():
            stored = self._file.array(_join(group, "observations", key), number)
            if key in self._jpeg:
                stored = _Declared((*stored.shape[:1], *leaf.shape), np.dtype(np.uint8))
            found[_join("observations", key)] = stored
        for name in ("actions", "rewards", "terminations", "truncations"):
            found[name] = self._file.array(f"{group}/{name}", number)
        for name, key in self._infos().items():
            stored = self._file.array(f"{group}/infos/{key}", number)
            if stored.shape == (length + 1,):
                stored = _Declared((length,), stored.dtype)  # the first value is the reset's
            found[name] = stored
        check_structure(found, length, self._rules, number)
        if self._has_costs and self._first_info_row("cost", index):
            self._check_first_cost(number)

    def _check_first_cost(self, number: int) -> None:
        first = self._file.rows(f"episode_{number}/infos/cost", 0, 1, number)[0]
        if first != 0:
            problem = (
                f"'infos/cost' has T + 1 values; the first, at the reset, must be 0, got {first}: "
                "it is not clear which step each cost belongs to"
            )
            raise DataError(problem, source=self._name, episode=number, step=0)

    def _first_info_row(self, key: str, index: int) -> int:
        """Return the row of the first step: 1 if an info also has a value for the reset."""
        number = self._numbers[index]
        rows = self._file.array(f"episode_{number}/infos/{key}", number).shape[0]
        return int(rows) - int(self._lengths[index])

    def _read(self, index: int, start: int, stop: int, lead: int) -> Episode:
        number = self._numbers[index]
        group = f"episode_{number}"
        observations = {
            key: self._read_observations(number, key, start - lead, stop + 1)
            for key in self._rules.leaves
        }
        arrays = {
            name: self._file.rows(f"{group}/{name}", start, stop, number)
            for name in ("actions", "rewards", "terminations", "truncations")
        }
        for name, key in self._infos().items():
            first = self._first_info_row(key, index)
            path = f"{group}/infos/{key}"
            arrays[name] = self._file.rows(path, first + start, first + stop, number)
        return Episode(
            observations=observations[""] if "" in observations else observations,
            seed=self._seeds[index],
            **arrays,
        )

    def _read_observations(self, number: int, key: str, start: int, stop: int) -> Array:
        path = _join(f"episode_{number}", "observations", key)
        rows = self._file.rows(path, start, stop, number)
        if key not in self._jpeg:
            return rows
        with self._file.reading(number):
            frames = [np.asarray(Image.open(io.BytesIO(bytes(row)), formats=["JPEG"]))
                      for row in rows]  # fmt: skip
            return np.stack(frames).reshape(len(rows), *self._rules.leaves[key].shape)


@final
@dataclass(frozen=True)
class _Declared:
    """Shape and dtype of a stored array after decoding."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, np.integer)) and value < 2**63 else None


def _read_metadata(folder: Path, name: str) -> dict[str, Any]:
    """Read ``metadata.json``; build the spaces, but not the environment."""
    try:
        raw = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        metadata = {key: value for key, value in raw.items() if not key.endswith("env_spec")}
        for key in ("observation_space", "action_space"):
            metadata[key] = deserialize_space(raw[key])  # JSON to gymnasium.spaces, no code
        metadata["total_episodes"] = int(raw["total_episodes"])
        metadata["frame_stack"] = int(raw.get("frame_stack", 1))
        if raw.get("env_spec") is not None:
            metadata |= _environment(json.loads(raw["env_spec"]))
    except (OSError, *MALFORMED) as error:
        problem = f"metadata.json is missing or malformed ({type(error).__name__}: {error})"
        raise DataError(f"{problem}: download or record it again", source=name) from error
    _check_metadata(metadata, name)
    return metadata


def _environment(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "env_id": str(spec["id"]),
        "env_kwargs": dict(spec.get("kwargs") or {}),
        "max_episode_steps": spec.get("max_episode_steps"),
        "env_entry_point": spec.get("entry_point"),
        "env_wrappers": list(spec.get("additional_wrappers") or []),
    }


def _check_metadata(metadata: Mapping[str, Any], name: str) -> None:
    if metadata.get("data_format") != "hdf5":
        raise DataError(
            f"data_format must be 'hdf5', got {metadata.get('data_format')!r}: rewrite the data "
            "set with minari.create_dataset_from_buffers(..., data_format='hdf5')",
            source=name,
        )
    frames, space = metadata["frame_stack"], metadata["observation_space"]
    if not 1 <= frames <= _MOST_FRAMES or (frames > 1 and not isinstance(space, gym.spaces.Box)):
        raise DataError(
            f"frame_stack must be 1, or up to {_MOST_FRAMES} where observations are a Box; got "
            f"{frames} with {space}",
            source=name,
        )
