"""Results of a study: one JSON file that grows cell by cell and survives an interruption."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch

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

    def cell(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cell; compute and store it if it is missing.

        Args:
            key: Name of the cell.
            compute: Gives JSON values.
        """
        if key not in self._content["cells"]:
            self._content["cells"][key] = compute()
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self._content))
        found: dict[str, Any] = self._content["cells"][key]
        return found
