"""Results of a study: one JSON file that grows cell by cell and survives an interruption."""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, final

import torch
from tqdm import tqdm

from mpd_gym._version import __version__
from mpd_gym.errors import DataError
from mpd_gym.files import atomic_path

__all__ = ["Results"]


@final
class Results:
    """Cells of a study, by key.

    Args:
        path: JSON file; read if it is there.
        setting: What all cells share, such as the number of trials; must be the same to go on.

    Raises:
        DataError: If the file is damaged or of another setting.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.path = path
        self._content: dict[str, Any] = {
            "setting": dict(setting),
            "made_with": {
                "mpd_gym": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "cells": {},
        }
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                same = stored["setting"] == json.loads(json.dumps(dict(setting)))
                self._content["cells"] = stored["cells"]
            except (json.JSONDecodeError, KeyError) as error:
                raise DataError(f"not a file of results ({error})", source=str(path)) from error
            if not same:
                raise DataError(
                    f"holds results of the setting {stored['setting']}, wanted is {dict(setting)}; "
                    "choose another folder",
                    source=str(path),
                )

    def fill(
        self,
        jobs: Mapping[str, tuple[Any, ...]],
        compute: Callable[..., dict[str, Any]],
        processes: int,
    ) -> dict[str, dict[str, Any]]:
        """Compute what is missing, several cells at a time, and store each when it is done.

        Args:
            jobs: Arguments of each cell, by its key.
            compute: Function at the top of a module that gives a cell's JSON values.
            processes: Of one torch thread each.

        Returns:
            All cells of `jobs`.
        """
        cells: dict[str, Any] = self._content["cells"]
        missing = {key: arguments for key, arguments in jobs.items() if key not in cells}
        context = multiprocessing.get_context("spawn")
        with (
            tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="cell") as bar,
            ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool,
        ):
            running = {pool.submit(compute, *rest): key for key, rest in missing.items()}
            try:
                for future in as_completed(running):
                    cells[running[future]] = future.result()
                    with atomic_path(self.path) as temporary:
                        temporary.write_text(json.dumps(self._content))
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return {key: cells[key] for key in jobs}
