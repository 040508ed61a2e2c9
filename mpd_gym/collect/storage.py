"""Storage of episodes until a data set is complete.

A hidden folder ``.<name>.collecting`` next to the data set, which Minari does not list, holds::

    lock            held by the one process that writes
    manifest.json   identity and arguments of the collection
    shards/*.npz    decided episodes, each file renamed into place when it is complete on disk
    assembled/      the new data set, renamed into place as a whole
    replaced/       the old data set, between two renames

An episode in a shard survives kill −9 of any process at any time.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, final

import numpy as np
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage import get_dataset_path

from mpd_gym.atomic import atomic_path, lock_file, sync_directory, writing
from mpd_gym.errors import MALFORMED, ConfigError, DataError, FileError
from mpd_gym.types import Array, Episode
from mpd_gym.validation import columns

__all__ = ["Attempt", "Decision", "Place", "Status", "discard", "store_shard"]

DATASETS = "the folder of data sets (MINARI_DATASETS_PATH)"  # Minari makes it where it looks
OPTIONAL = {"costs": np.float64, "successes": np.bool_}
"""Columns that an environment need not report, with their types."""
_LONGEST_ID = 200  # bytes; a name of 255 is the longest that file systems take, and some is added


@final
class Status(IntEnum):
    """Fate of an episode."""

    STORED = 0
    UNSOLVED = 1  # the policy reported that its solver failed
    REJECTED = 2  # refused by the caller's filter


@final
@dataclass(frozen=True)
class Decision:
    """Fate of one candidate, and its steps."""

    candidate: int
    status: Status
    steps: int


@final
@dataclass(frozen=True)
class Attempt:
    """A decision and, if it is stored, the episode."""

    decision: Decision
    episode: Episode | None = None


@final
class Place:
    """Folders of one data set id; `exclusive` creates them.

    Args:
        dataset_id: ``namespace/name-v0``.

    Raises:
        ConfigError: If the id is malformed.
        FileError: If the folder of data sets cannot be made.
    """

    def __init__(self, dataset_id: str) -> None:
        try:
            self.namespace, _, _ = parse_dataset_id(dataset_id)
            if len(dataset_id.encode()) > _LONGEST_ID:
                raise ValueError("file systems do not take it")
        except (TypeError, ValueError) as error:  # TypeError: no version
            raise ConfigError(
                f"dataset_id: expected 'name-v0' or 'namespace/name-v0', the namespace of at least "
                f"two characters, all of at most {_LONGEST_ID} bytes; got {dataset_id!r}"
            ) from error
        self.dataset_id = dataset_id
        with writing(DATASETS):
            self.final: Path = get_dataset_path(dataset_id)
        self.staging = self.final.parent / f".{self.final.name}.collecting"
        self.shards = self.staging / "shards"
        self.assembled = self.staging / "assembled"
        self._manifest = self.staging / "manifest.json"
        self._replaced = self.staging / "replaced"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the data set for writing, and repair what a killed process left.

        Afterwards the staging folder is gone, unless it has episodes.

        Raises:
            ConfigError: If another process is writing it.
            FileError: If the folder cannot be written to.
        """
        taken = f"another process is writing {self.dataset_id!r}: wait for it, or choose another id"
        lock = lock_file(self.staging / "lock", taken)
        try:
            self._repair()
            yield
        finally:
            with lock:
                self._repair()
                if not self.stored():
                    shutil.rmtree(self.staging, ignore_errors=True)

    def _repair(self) -> None:
        """Give a replaced data set its place back if the new one is not there."""
        if self._replaced.exists() and not self.final.exists():
            os.rename(self._replaced, self.final)
        for rest in (self._replaced, self.assembled):
            shutil.rmtree(rest, ignore_errors=True)

    def stored(self) -> list[Path]:
        """Return the files of an unfinished collection's episodes."""
        return sorted(self.shards.glob("[!.]*.npz"))

    def published(self) -> bool:
        """Return whether the collection is in its place and only needs cleaning up."""
        metadata = self.final / "data" / "metadata.json"
        if not (self._manifest.exists() and metadata.exists()):
            return False
        collection = _read_json(metadata).get("collection", {})
        return bool(collection.get("id") == _read_json(self._manifest)["collection"])

    def begin(self, arguments: Mapping[str, Any]) -> str:
        """Start a collection, or resume the interrupted one.

        Args:
            arguments: Everything that determines the episodes, as plain JSON.

        Returns:
            Identity of the collection.

        Raises:
            ConfigError: If the interrupted collection had other arguments.
            DataError: If its manifest is damaged.
            FileError: If the folder cannot be written to.
        """
        if self.stored():
            found = _read_json(self._manifest)
        else:
            shutil.rmtree(self.shards, ignore_errors=True)
            found = {"collection": uuid.uuid4().hex, "arguments": dict(arguments)}
            with atomic_path(self._manifest) as path:
                path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        changed = _differences(found["arguments"], arguments)
        if changed:
            raise ConfigError(
                f"an unfinished collection of {self.dataset_id!r} was started with other "
                f"arguments ({'; '.join(changed)}): run it with the same ones to continue, choose "
                f"another id, or discard its episodes with mpd_gym.collect.record.discard("
                f"{self.dataset_id!r})"
            )
        with writing(self.shards):
            self.shards.mkdir(exist_ok=True)
            for rest in self.shards.glob(".*"):  # files that a killed worker did not finish
                rest.unlink(missing_ok=True)
        return str(found["collection"])

    def decisions(self) -> dict[int, tuple[Decision, Path]]:
        """Return the decisions so far by candidate, each with the file of its episode.

        Raises:
            DataError: If a file is damaged.
        """
        found: dict[int, tuple[Decision, Path]] = {}
        for path in self.stored():
            with _open_shard(path) as shard:
                for candidate, status, steps in shard["decisions"].tolist():
                    decision = Decision(candidate, Status(status), steps)
                    found.setdefault(candidate, (decision, path))
        return found

    def episodes(self, candidates: Sequence[int]) -> Iterator[Episode]:
        """Read stored episodes, one file at a time.

        What infos reported in one episode at least (costs, successes) is 0 in those without it.

        Raises:
            DataError: If a file is damaged.
        """
        places = self.decisions()
        told: set[str] = set()
        for path in {places[candidate][1] for candidate in candidates}:
            with _open_shard(path) as shard:
                told |= {key.rpartition("/")[2] for key in shard} & OPTIONAL.keys()
        read: dict[int, Episode] = {}
        for candidate in candidates:
            if candidate not in read:
                with _open_shard(places[candidate][1]) as shard:
                    read |= _unpack(shard)
            episode = read.pop(candidate)
            for name in told:
                if getattr(episode, name) is None:
                    zeros: Any = np.zeros(len(episode), OPTIONAL[name])
                    episode = replace(episode, **{name: zeros})
            yield episode

    def check_space(self) -> None:
        """Check that the disk has room for the stored episodes once more.

        Raises:
            FileError: If it has not.
        """
        needed = sum(path.stat().st_size for path in self.stored())
        free = shutil.disk_usage(self.staging).free
        if needed > free:
            raise FileError(
                f"{self.final}: the data set needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are "
                "free: free space"
            )

    def publish(self, *, overwrite: bool) -> None:
        """Move the assembled data set into its place as a whole.

        Raises:
            ConfigError: If a data set exists and `overwrite` is False.
            FileError: If it cannot be moved; the old one stays.
        """
        if self.final.exists() and not overwrite:
            raise already_there(self.dataset_id)
        with writing(self.final):
            for folder, _, files in os.walk(self.assembled):
                for name in files:
                    with open(Path(folder, name), "rb+") as file:
                        os.fsync(file.fileno())
                sync_directory(Path(folder))
            if self.final.exists():
                os.rename(self.final, self._replaced)
            os.rename(self.assembled, self.final)
            sync_directory(self.final.parent)
        self.clear()

    def clear(self) -> None:
        """Remove the staged files; the manifest last, so that a repeated call finishes the job."""
        for rest in (self._replaced, self.assembled, self.shards):
            shutil.rmtree(rest, ignore_errors=True)
        self._manifest.unlink(missing_ok=True)


def already_there(dataset_id: str) -> ConfigError:
    """Return the error for a data set that exists."""
    return ConfigError(
        f"a data set {dataset_id!r} exists: choose another id, pass overwrite=True to replace it, "
        f"or remove it with 'minari delete {dataset_id}'"
    )


def discard(dataset_id: str) -> int:
    """Delete the episodes of an unfinished collection.

    Args:
        dataset_id: ``namespace/name-v0``; a finished data set of that id stays.

    Returns:
        Number of deleted episodes.

    Raises:
        ConfigError: If the id is malformed, or a process is collecting it.
    """
    place = Place(dataset_id)
    if not place.staging.exists():
        return 0
    with place.exclusive():
        decided = [decision for decision, _ in place.decisions().values()]
        place.clear()
    return sum(decision.status is Status.STORED for decision in decided)


def store_shard(folder: Path, outcomes: Sequence[Attempt]) -> None:
    """Write decided episodes to one file, whole or not at all.

    Args:
        folder: Folder of the shards; without it the collection is gone, and nothing is written.
        outcomes: At least one.
    """
    if not folder.is_dir():
        return
    decisions = [outcome.decision for outcome in outcomes]
    arrays: dict[str, Array] = {
        "decisions": np.array([(d.candidate, d.status, d.steps) for d in decisions], np.int64)
    }
    for outcome in outcomes:
        episode, prefix = outcome.episode, f"{outcome.decision.candidate}/"
        if episode is not None:
            seed = {} if episode.seed is None else {"seed": np.array(episode.seed, np.uint64)}
            arrays |= {prefix + key: value for key, value in (columns(episode) | seed).items()}
    name = f"{min(d.candidate for d in decisions):08d}-{uuid.uuid4().hex[:8]}.npz"
    with atomic_path(folder / name) as path, open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _unpack(shard: Mapping[str, Array]) -> dict[int, Episode]:
    fields: dict[int, dict[str, Any]] = {}
    for key in shard:
        candidate, _, name = key.partition("/")
        if name:
            fields.setdefault(int(candidate), {})[name] = shard[key]
    return {candidate: _episode(arrays) for candidate, arrays in fields.items()}


def _episode(fields: dict[str, Any]) -> Episode:
    """Build an episode from its packed arrays."""
    seed = fields.pop("seed", None)
    parts = {name: fields.pop(name) for name in list(fields) if name.startswith("observations/")}
    observations = {name.removeprefix("observations/"): parts[name] for name in parts}
    return Episode(
        observations=observations or fields.pop("observations"),
        seed=None if seed is None else int(seed),
        **fields,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**found}
    except (OSError, *MALFORMED) as error:
        raise DataError(
            f"cannot be read ({error}): discard the collection", source=str(path)
        ) from error


@contextmanager
def _open_shard(path: Path) -> Iterator[Mapping[str, Array]]:
    try:
        with np.load(path, allow_pickle=False) as shard:
            yield shard
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"cannot be read ({error}): delete it to collect its episodes again",
            source=str(path),
        ) from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
