"""Safe reading of foreign HDF5 files.

A file may refer to other files by links, external storage or virtual data sets, and a reader would
open those. This module checks each step of a path before it follows it. It uses h5py's low level,
which follows nothing by itself and opens an array three times as fast.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s

from mpd_gym.errors import DataError
from mpd_gym.types import Array

__all__ = ["Hdf5File"]

_KEPT_OPEN = 64  # arrays; each may hold a chunk cache of 1 MiB
_AGAIN = "download or record it again"
_ONE_FILE = "copy the data into one file, for example with h5repack"


@final
class Hdf5File:
    """One HDF5 file, open for reading, one handle in each process.

    After pickling or a fork it opens again, as processes cannot share handles.

    Args:
        path: File.
        source: Name for messages.

    Raises:
        DataError: If the file is missing, truncated or no HDF5 file.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path = path
        self._source = source
        self._process: int | None = None
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_source": self._source, "_process": None}

    def exists(self, path: str) -> bool:
        """Return whether the file holds `path`; only hard links are followed.

        Raises:
            DataError: If the path contains a soft or external link.
        """
        with self.reading():
            return self._find(path, None) is not None

    def attributes(self, path: str, episode: int | None = None) -> dict[str, Any]:
        """Return the attributes of a group.

        Raises:
            DataError: If there is no such group.
        """
        with self.reading(episode):
            found = self._find(path, episode)
            if not isinstance(found, h5g.GroupID):
                raise DataError(f"'{path}' is missing", source=self._source, episode=episode)
            return dict(h5py.Group(found).attrs)

    def array(self, path: str, episode: int | None = None) -> Any:
        """Open an array.

        Returns:
            Handle with `shape` and `dtype`.

        Raises:
            DataError: If it is missing, stored outside this file, or declared larger than it is.
        """
        self._open()
        kept = self._arrays.get(path)
        if kept is not None:
            return kept
        with self.reading(episode):
            found = self._find(path, episode)
            if not isinstance(found, h5d.DatasetID):
                raise DataError(f"'{path}' is missing", source=self._source, episode=episode)
            properties = found.get_create_plist()
            if properties.get_layout() == h5d.VIRTUAL or properties.get_external_count():
                problem = f"'{path}' is stored in another file, which is not opened: {_ONE_FILE}"
                raise DataError(problem, source=self._source, episode=episode)
            if math.prod(found.shape) > self.size and not _is_whole(found):
                problem = f"'{path}' has shape {found.shape}, but its values were not written"
                raise DataError(f"{problem}: {_AGAIN}", source=self._source, episode=episode)
        if len(self._arrays) >= _KEPT_OPEN:
            self._arrays.clear()
        self._arrays[path] = found
        return found

    def rows(self, path: str, start: int, stop: int, episode: int | None = None) -> Array:
        """Read rows `start` … `stop` - 1 of an array, and no others.

        Raises:
            DataError: If it is missing, damaged, too short, or stored outside this file.
        """
        array = self.array(path, episode)
        with self.reading(episode):
            shape = (stop - start, *array.shape[1:])
            if array.dtype.hasobject:  # values of different sizes, such as JPEG pictures
                return np.asarray(h5py.Dataset(array)[start:stop])
            result = np.empty(shape, array.dtype)
            there = array.get_space()
            there.select_hyperslab((start, *(0 for _ in shape[1:])), shape)
            array.read(h5s.create_simple(shape), there, result)
            return result

    @contextmanager
    def reading(self, episode: int | None = None) -> Iterator[None]:
        """Turn the errors of a damaged file into a DataError that names it."""
        try:
            yield
        except DataError:
            raise
        except (OSError, RuntimeError, LookupError, MemoryError, TypeError, ValueError) as error:
            cause, remedy = "is missing or damaged", _AGAIN
            if "unable to lock" in str(error):
                cause, remedy = "is locked", "wait, or set HDF5_USE_FILE_LOCKING=FALSE"
            problem = f"the file {cause} ({error}): {remedy}"
            raise DataError(problem, source=self._source, episode=episode) from error

    def _open(self) -> None:
        if self._process == os.getpid():
            return
        with self.reading():
            self._file = h5py.File(self._path, "r")
            self._root = self._file["/"].id
            self.size = self._path.stat().st_size  # bytes
        self._arrays: dict[str, Any] = {}
        self._process = os.getpid()

    def _find(self, path: str, episode: int | None) -> Any:
        """Follow a path link by link; None if it ends early."""
        self._open()
        found: Any = self._root
        for name in path.encode().split(b"/"):
            if not isinstance(found, h5g.GroupID) or not found.links.exists(name):
                return None
            if found.links.get_info(name).type != h5l.TYPE_HARD:
                problem = (
                    f"'{path}' has a soft or external link, which is not followed: {_ONE_FILE}"
                )
                raise DataError(problem, source=self._source, episode=episode)
            found = h5o.open(found, name)
        return found


def _is_whole(array: Any) -> bool:
    """Whether the file holds a value for each element; HDF5 makes up those that it does not."""
    properties = array.get_create_plist()
    if properties.get_layout() == h5d.CHUNKED:
        sides = zip(array.shape, properties.get_chunk(), strict=True)
        return bool(array.get_num_chunks() >= math.prod(-(-n // side) for n, side in sides))
    return bool(array.get_storage_size() >= math.prod(array.shape))
