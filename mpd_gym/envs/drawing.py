"""Pictures of environments: a canvas in world coordinates, and a renderer for the render modes.

The first picture imports pygame, so importing the package stays fast. Only the mode ``"human"``
needs a display; without one, set ``SDL_VIDEODRIVER=dummy``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from mpd_gym.errors import InputError
from mpd_gym.types import Array

if TYPE_CHECKING:
    import pygame

__all__ = ["RENDER_MODES", "Canvas", "Color", "Renderer", "mix"]

Color = tuple[int, int, int]
Point = Sequence[float] | Array
RENDER_MODES = ("human", "rgb_array")
_SUPERSAMPLING = 4  # 16 samples for each pixel; powers of 2 are averaged without rounding down


def mix(first: Color, second: Color, share: float) -> Color:
    """Mix two colours; `share` (0 to 1) is the part of `second`."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


class Canvas:
    """An anti-aliased picture in world coordinates, x to the right and y upwards.

    Positions and radii are in world units, line widths and text heights in pixels.

    Args:
        size: Width and height in pixels.
        centre: World point in the middle of the picture.
        scale: Pixels for each world unit.
    """

    def __init__(self, size: tuple[int, int], *, centre: tuple[float, float], scale: float) -> None:
        import pygame

        self._pygame = pygame
        self.size, self.centre, self.scale = size, centre, scale
        self._surface = pygame.Surface((size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING))
        self._fonts: dict[int, pygame.font.Font] = {}

    def fill(self, color: Color) -> None:
        """Cover the whole picture."""
        self._surface.fill(color)

    def polygon(self, points: Sequence[Point] | Array, color: Color) -> None:
        """Fill the polygon with the corners `points`, ``[M, 2]``."""
        self._pygame.draw.polygon(self._surface, color, self._pixels(points))

    def box(self, left: float, bottom: float, right: float, top: float, color: Color) -> None:
        """Fill the axis-aligned rectangle."""
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], color)

    def disc(self, centre: Point, radius: float, color: Color) -> None:
        """Fill the circle of `radius` world units."""
        self._dots(self._pixels([centre]), radius * self.scale * _SUPERSAMPLING, color)

    def ring(self, centre: Point, radius: float, color: Color, width: float = 2.0) -> None:
        """Draw a circle's outline, `width` pixels wide, its outer edge at `radius`."""
        pixels = self._pixels([centre])[0]
        reach = radius * self.scale * _SUPERSAMPLING
        thick = max(1, round(width * _SUPERSAMPLING))
        self._pygame.draw.circle(self._surface, color, pixels, reach, thick)

    def line(self, points: Sequence[Point] | Array, color: Color, width: float = 2.0) -> None:
        """Draw the polyline through `points`, ``[M, 2]``, `width` pixels wide, with round joints.

        The line skips points that are not finite.
        """
        pixels = self._pixels(points)
        reach = width * _SUPERSAMPLING / 2
        for (x0, y0), (x1, y1) in pairwise(pixels):
            length = math.hypot(x1 - x0, y1 - y0)
            if length > 0:
                across, along = reach * (y0 - y1) / length, reach * (x1 - x0) / length
                corners = [
                    (x0 + across, y0 + along),
                    (x1 + across, y1 + along),
                    (x1 - across, y1 - along),
                    (x0 - across, y0 - along),
                ]
                self._pygame.draw.polygon(self._surface, color, corners)
        self._dots(pixels, reach, color)

    def text(
        self, text: str, position: Point, color: Color, *, height: int = 16, anchor: str = "center"
    ) -> None:
        """Write one line.

        Args:
            text: Text to write.
            position: World point of `anchor`.
            color: Colour of the letters.
            height: Height of the line, pixels.
            anchor: Part of the text's box, in pygame's words: ``"center"``, ``"midleft"``, ….
        """
        if height not in self._fonts:
            self._pygame.font.init()
            self._fonts[height] = self._pygame.font.Font(None, height * _SUPERSAMPLING)
        picture = self._fonts[height].render(text, True, color)
        self._surface.blit(picture, picture.get_rect(**{anchor: self._pixels([position])[0]}))

    def array(self) -> Array:
        """Return the picture, uint8 ``[height, width, 3]``."""
        small = self._pygame.transform.smoothscale(self._surface, self.size)
        width, height = self.size
        rows = np.frombuffer(self._pygame.image.tobytes(small, "RGB"), dtype=np.uint8)
        return rows.reshape(height, width, 3).copy()

    def _dots(self, pixels: list[tuple[float, float]], radius: float, color: Color) -> None:
        for pixel in pixels:
            self._pygame.draw.circle(self._surface, color, pixel, radius)

    def _pixels(self, points: Sequence[Point] | Array) -> list[tuple[float, float]]:
        """Supersampled pixel positions of the finite `points`."""
        world = np.asarray(points, dtype=np.float64)
        world = world[np.isfinite(world).all(axis=-1)]
        offset = (world - self.centre) * (self.scale, -self.scale)
        pixels = (offset + np.asarray(self.size) / 2) * _SUPERSAMPLING
        limit = 8.0 * _SUPERSAMPLING * max(self.size)  # pygame has integers of 16 bits in places
        return [(x, y) for x, y in np.clip(pixels, -limit, limit).tolist()]


class Renderer:
    """Draws an environment's pictures for its render mode, and holds the window.

    It can be pickled at any time; the copy opens its own window when it needs one.

    Args:
        mode: None, ``"rgb_array"`` or ``"human"``.
        size: Width and height in pixels.
        centre: World point in the middle of the picture.
        scale: Pixels for each world unit.
        fps: Most pictures per second in the window.
        title: Title of the window.

    Raises:
        InputError: If the mode is unknown.
    """

    def __init__(
        self,
        mode: str | None,
        *,
        size: tuple[int, int],
        centre: tuple[float, float],
        scale: float,
        fps: float,
        title: str,
    ) -> None:
        if mode is not None and mode not in RENDER_MODES:
            raise InputError(f"render_mode: expected None or one of {RENDER_MODES}, got {mode!r}")
        self.mode, self.fps, self.title = mode, fps, title
        self.size, self.centre, self.scale = size, centre, scale
        self._canvas: Canvas | None = None
        self._window: pygame.Surface | None = None
        self._clock: pygame.time.Clock | None = None

    def render(self, paint: Callable[[Canvas], None]) -> Array | None:
        """Draw one picture.

        Args:
            paint: Draws on a canvas that still holds the last picture.

        Returns:
            uint8 ``[height, width, 3]`` in the mode ``"rgb_array"``, else None. Without a mode it
            draws nothing, and Gymnasium's logger warns.
        """
        if self.mode is None:
            gymnasium.logger.warn(
                "render() draws nothing without a render mode: make the environment with "
                "render_mode='rgb_array' or 'human'"
            )
            return None
        if self._canvas is None:
            self._canvas = Canvas(self.size, centre=self.centre, scale=self.scale)
        paint(self._canvas)
        picture = self._canvas.array()
        if self.mode == "rgb_array":
            return picture
        self._show(picture)
        return None

    def close(self) -> None:
        """Close the window, if one is open, and free the canvas."""
        if self._window is not None:
            import pygame

            pygame.display.quit()
        self._canvas = self._window = self._clock = None

    def _show(self, picture: Array) -> None:
        import pygame

        if self._window is None:
            pygame.display.init()
            self._window = pygame.display.set_mode(self.size)
            self._clock = pygame.time.Clock()
            pygame.display.set_caption(self.title)
        pygame.surfarray.blit_array(self._window, picture.swapaxes(0, 1))
        pygame.event.pump()
        pygame.display.flip()
        if self._clock is not None:
            self._clock.tick(self.fps)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_canvas": None, "_window": None, "_clock": None}
