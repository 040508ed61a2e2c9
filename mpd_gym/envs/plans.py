"""Planned trajectories in the pictures of environments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpd_gym.envs.drawing import Canvas, mix
from mpd_gym.envs.palette import AMBER, PAPER
from mpd_gym.errors import InputError
from mpd_gym.types import Array

__all__ = ["DrawnPlans", "checked_plans", "paint_plans"]


@dataclass(frozen=True, eq=False)
class DrawnPlans:
    """Plans that `draw_plan` of an environment keeps until the next call or reset.

    Attributes:
        states: Candidates, ``[N, H, size]``.
        chosen: Index of the candidate to draw thick.
    """

    states: Array
    chosen: int

    def __len__(self) -> int:
        return len(self.states)


def checked_plans(plans: Any, chosen: int, size: int) -> DrawnPlans | None:
    """Check and copy plans to draw.

    Args:
        plans: States ``[H, >= size]``, or candidates ``[N, H, >= size]``; None for no plan.
        chosen: Index of the candidate that is executed.
        size: Leading entries of a state that the picture shows.

    Returns:
        A copy of these entries.

    Raises:
        InputError: If `plans` has another shape, or there is no candidate `chosen`.
    """
    if plans is None:
        return None
    array = np.array(plans, dtype=np.float64)
    if array.ndim not in (2, 3) or array.shape[-1] < size:
        raise InputError(
            f"plans: expected shape [H, >= {size}] or [N, H, >= {size}], got {array.shape}"
        )
    array = array[..., :size] if array.ndim == 3 else array[None, :, :size]
    if not 0 <= chosen < len(array):
        raise InputError(f"chosen: expected an index below {len(array)}, got {chosen}")
    return DrawnPlans(array, chosen)


def paint_plans(canvas: Canvas, points: Array, chosen: int, *, radius: float) -> None:
    """Draw the chosen plan as a thick line with a dot at each step, the others as thin lines.

    `points` are world points ``[N, H, 2]``; `radius` is the dots' in world units.
    """
    for index, line in enumerate(points):
        if index != chosen:
            canvas.line(line, mix(PAPER, AMBER, 0.4), 1.2)
    canvas.line(points[chosen], AMBER, 3.5)
    for point in points[chosen]:
        canvas.disc(point, radius, AMBER)
