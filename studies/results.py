"""Results of a study: one JSON file that grows with each measurement and survives interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Self, final

import torch
from tqdm import tqdm

from mpd_gym._version import __version__
from mpd_gym.atomic import atomic_path
from mpd_gym.errors import DataError
from mpd_gym.processes import die_with_parent

__all__ = ["Results"]

Compute = Callable[..., dict[str, Any]]


@final
class Results:
    """Cells of a study, by key.

    Args:
        path: JSON file; read if it is there.
        setting: What all cells share; must be the same to go on.
        free: Names in it that may change.

    Raises:
        DataError: If the file is damaged or of another setting.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any], *, free: Sequence[str] = ()) -> None:
        self.path = path
        self._content: dict[str, Any] = {
            "setting": json.loads(json.dumps(dict(setting))),
            "made_with": {
                "mpd_gym": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": f"{machine()}, {os.cpu_count()} cores",
            },
            "networks": {},
            "cells": {},
        }
        if path.exists():
            stored = _read(path)
            if _without(stored["setting"], free) != _without(self.setting, free):
                raise DataError(
                    f"holds results of the setting {stored['setting']}, wanted is {dict(setting)}; "
                    "choose another folder",
                    source=str(path),
                )
            self._content |= {name: stored[name] for name in ("made_with", "networks", "cells")}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Results of a file, whatever their setting.

        Raises:
            DataError: If the file is missing or damaged.
        """
        return cls(path, _read(path)["setting"])

    @property
    def setting(self) -> dict[str, Any]:
        """What all cells share."""
        return dict(self._content["setting"])

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """What is stored."""
        return dict(self._content["cells"])

    @property
    def made_with(self) -> dict[str, str]:
        """Versions and machine of the first run."""
        return dict(self._content["made_with"])

    @property
    def networks(self) -> dict[str, float]:
        """Seconds of training of each network that the cells are of."""
        return dict(self._content["networks"])

    def add_network(self, name: str, seconds: float) -> None:
        """Note how long a network was trained."""
        self._content["networks"][name] = round(seconds, 1)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(self._content))

    def fill(
        self,
        jobs: Mapping[str, tuple[Any, ...]],
        compute: Compute,
        processes: int,
        *,
        again: Callable[[str, dict[str, Any]], bool] = lambda key, cell: False,
    ) -> dict[str, dict[str, Any]]:
        """Compute what is missing, several cells at a time, and store each when it is done.

        Args:
            jobs: Arguments of each cell, by its key.
            compute: Function at the top of a module that gives a cell's JSON values.
            processes: Of one torch thread each; 0 computes in this process.
            again: Whether a stored cell has to be computed again.

        Returns:
            All cells of `jobs`.
        """
        cells: dict[str, Any] = self._content["cells"]
        missing = {
            key: arguments
            for key, arguments in jobs.items()
            if key not in cells or again(key, cells[key])
        }
        total, known = len(jobs), len(jobs) - len(missing)
        with tqdm(total=total, initial=known, unit="cell", disable=not missing) as bar:
            for key, cell in _computed(missing, compute, processes):
                cells[key] = cell
                self.save()
                bar.update()
        return {key: cells[key] for key in jobs}


def machine() -> str:
    """Name of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _without(setting: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name not in names}


def _read(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        known = {key: dict(stored[key]) for key in ("setting", "made_with", "cells")}
        return {"networks": {}, **stored, **known}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"not a file of results ({error})", source=str(path)) from error


def _computed(
    jobs: Mapping[str, tuple[Any, ...]], compute: Compute, processes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells as they are done."""
    if not jobs:
        return
    if processes == 0:
        yield from ((key, compute(*arguments)) for key, arguments in jobs.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin) as pool:
        running = {pool.submit(compute, *rest): key for key, rest in jobs.items()}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """In each process, before its first cell."""
    die_with_parent()
    torch.set_num_threads(1)
