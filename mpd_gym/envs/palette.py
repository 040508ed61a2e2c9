"""Colours that the pictures of the environments share."""

from __future__ import annotations

from mpd_gym.envs.drawing import Color

__all__ = ["AMBER", "AXIS", "BLUE", "GREEN", "GRID", "INK", "PAPER", "RED", "SLATE"]

PAPER: Color = (252, 252, 253)
GRID: Color = (226, 230, 237)
AXIS: Color = (148, 160, 178)
INK: Color = (71, 85, 105)
SLATE: Color = (30, 41, 59)
BLUE: Color = (37, 99, 235)
AMBER: Color = (234, 118, 20)
GREEN: Color = (22, 163, 74)
RED: Color = (220, 38, 38)
