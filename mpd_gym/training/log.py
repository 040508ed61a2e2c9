"""The log of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from mpd_gym.errors import TrainingError
from mpd_gym.types import Array

__all__ = ["History", "Log", "Record"]


@final
@dataclass(frozen=True)
class Record:
    """One row of the log; callbacks receive it.

    Attributes:
        step: Optimisation steps done.
        split: ``"training"``: means of the raw weights over the steps since the last record; or
            ``"validation"``: means of the averaged weights over the validation batches.
        values: ``"loss"`` and the other parts; for training also ``"gradient_norm"``, before
            clipping.
    """

    step: int
    split: str
    values: Mapping[str, float]


@final
@dataclass(frozen=True)
class History:
    """All L records of one split.

    Attributes:
        names: Names of the columns.
        steps: ``[L]`` int64.
        values: ``[L, len(names)]`` float64.
    """

    names: tuple[str, ...]
    steps: Array
    values: Array

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> Array:
        """Column `name`, ``[L]``."""
        if name not in self.names:
            raise KeyError(f"'{name}' was not logged; the columns are {list(self.names)}")
        column: Array = self.values[:, self.names.index(name)]
        return column


@final
class Log:
    """Rows of named scalars, gathered on the device so that no step waits.

    Args:
        split: ``"training"`` or ``"validation"``.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self.names: tuple[str, ...] = ()
        self._table: list[list[float]] = []  # step, then the values
        self._pending: list[Tensor] = []  # [len(names)] for each step since the last record

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the scalars of one step, with the same names every time, without waiting."""
        self.names = tuple(parts)
        self._pending.append(torch.stack(list(parts.values())))

    def check(self, step: int) -> Tensor | None:
        """Return the pending rows, ``[steps since the last record, len(names)]``.

        Args:
            step: Optimisation steps done.

        Raises:
            TrainingError: If a value is not finite, naming its step.
        """
        if not self._pending:
            return None
        rows = torch.stack(self._pending)
        bad = (~torch.isfinite(rows)).nonzero().tolist()
        if bad:
            row, column = bad[0]
            where = step - len(rows) + row + 1 if self.split == "training" else step
            raise TrainingError(
                f"{self.split} {self.names[column]} is {rows[row, column].item()} at step {where}"
            )
        return rows

    def close(self, step: int) -> Record:
        """Turn the pending rows into one record.

        Raises:
            TrainingError: As `check`.
        """
        rows = self.check(step)
        assert rows is not None, "close without add"
        means = rows.double().mean(0).tolist()
        self._table.append([step, *means])
        self._pending.clear()
        return Record(step, self.split, dict(zip(self.names, means, strict=True)))

    def history(self) -> History:
        """All records so far."""
        table = self._as_array()
        return History(self.names, table[:, 0].astype(np.int64), table[:, 1:])

    def _as_array(self) -> Array:
        return np.array(self._table, np.float64).reshape(len(self._table), 1 + len(self.names))

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint; `names` is saved separately."""
        pending = self.check(step)
        table = {"table": torch.from_numpy(self._as_array())}
        return table if pending is None else table | {"pending": pending}

    def restore(
        self, names: list[str], tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Continue from `names` and `tensors`, and gather on `device`."""
        self.names = tuple(names)
        self._table = tensors["table"].tolist()
        self._pending = list(tensors["pending"].to(device)) if "pending" in tensors else []
