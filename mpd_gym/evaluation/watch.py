"""A window that shows policies side by side with their plans."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, final

import numpy as np

from mpd_gym.envs.checks import make_env
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.evaluation.comparison import Entry
from mpd_gym.evaluation.figures import captioned, draws_plan, halved, rollout_frames, side_by_side
from mpd_gym.types import Array

__all__ = ["KEYS", "watch"]

KEYS = "space: pause; right: one step; N: next start; R: again; + and -: speed; Q: end"
_WIDEST = 1600  # pixels; wider pictures are halved
_LINGER = 0.7  # seconds that an episode's last picture stays
_SLOWEST, _FASTEST = 1.0, 240.0  # pictures per second


def watch(
    entries: Sequence[Entry],
    env_id: str,
    *,
    seed: int = 0,
    episodes: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    fps: float | None = None,
) -> int:
    """Play in a window until it is closed; `KEYS` lists its keys.

    Args:
        entries: Policies that play the same starts side by side.
        env_id: Registered id of an environment that draws pictures.
        seed: Seed of the first start; it rises by 1 for each further start.
        episodes: Most starts; None for no end.
        env_kwargs: Keyword arguments of the environment.
        fps: Most pictures per second; the environment's own by default.

    Returns:
        The number of starts that were played to their end.

    Raises:
        InputError: If there are no entries, or `fps` is not positive.
        ConfigError: If the environment does not exist or draws no pictures, or no window can open.
    """
    if not entries:
        raise InputError("entries: expected at least one policy, got none")
    if fps is not None and not 0 < fps < math.inf:
        raise InputError(f"fps: expected a positive number, got {fps}")
    env = make_env(env_id, env_kwargs)
    metadata = env.metadata
    env.close()
    if "rgb_array" not in metadata.get("render_modes", ()):
        raise ConfigError(f"env: {env_id} draws no pictures, so there is nothing to watch")
    ended, start = 0, seed
    with _Window(fps or metadata.get("render_fps") or 30) as window:
        while episodes is None or start < seed + episodes:
            window.title = f"{env_id}, seed {start}"
            films = [_film(entry, env_id, start, env_kwargs, alone=len(entries) == 1)
                     for entry in entries]  # fmt: skip
            wish = _play(window, films)
            if wish == "quit":
                break
            ended += wish == "ended"
            start += wish != "again"
    return ended


def _film(
    entry: Entry, env_id: str, seed: int, env_kwargs: Mapping[str, Any] | None, *, alone: bool
) -> Iterator[Array]:
    """Yield the pictures of one policy's episode."""
    frames = rollout_frames(
        entry.policy,
        env_id,
        seed=seed,
        env_kwargs=env_kwargs,
        draw=draws_plan(entry.policy),
        deterministic=entry.deterministic,
    )
    return frames if alone else (captioned([frame], entry.label)[0] for frame in frames)


def _play(window: _Window, films: Sequence[Iterator[Array]]) -> str:
    """Show one start until it ends or the user wishes otherwise."""
    shown = [next(film) for film in films]
    while True:
        window.show(side_by_side([[picture] for picture in shown])[0])
        wish = window.wish()
        if wish != "step":
            return wish
        following = [next(film, None) for film in films]
        if all(picture is None for picture in following):
            return window.linger()
        shown = [
            last if picture is None else picture
            for last, picture in zip(shown, following, strict=True)
        ]


@final
class _Window:
    """A pygame window and its keys.

    Args:
        fps: Most pictures per second.
    """

    def __init__(self, fps: float) -> None:
        import pygame

        self._pygame = pygame
        self._fps, self._running = float(fps), True
        self._clock = pygame.time.Clock()
        self._events: deque[pygame.event.Event] = deque()
        self.title = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pygame.display.quit()

    def show(self, picture: Array) -> None:
        """Show a picture, uint8 ``[height, width, 3]``."""
        while picture.shape[1] > _WIDEST:
            picture = halved(picture)
        surface = self._opened((picture.shape[1], picture.shape[0]))
        self._entitle()
        self._pygame.surfarray.blit_array(surface, np.swapaxes(picture, 0, 1))
        self._pygame.display.flip()

    def _entitle(self) -> None:
        state = f"{self._fps:g} pictures per second" if self._running else "paused"
        self._pygame.display.set_caption(f"{self.title} | {state} | {KEYS}")

    def _opened(self, size: tuple[int, int]) -> Any:
        """Return the window in a size; open it again if an environment's `close` ended pygame."""
        display = self._pygame.display
        surface = display.get_surface() if display.get_init() else None
        if surface is None or surface.get_size() != size:
            try:
                display.init()
                if display.get_driver() == "offscreen" and "SDL_VIDEODRIVER" not in os.environ:
                    raise self._pygame.error("there is no display")
                surface = display.set_mode(size)
            except self._pygame.error as error:
                raise ConfigError(
                    f"no window can be opened ({error}); `mpd-gym compare` makes a GIF without one"
                ) from None
        return surface

    def wish(self) -> str:
        """Wait for the next picture, or the end of a pause; return the user's wish.

        It is ``"step"``, ``"next"``, ``"again"`` or ``"quit"``.
        """
        while True:
            self._clock.tick(self._fps if self._running else 30)
            wish = self._asked()
            if wish is not None:
                return wish
            if self._running:
                return "step"

    def linger(self) -> str:
        """Leave the last picture for a moment; return ``"ended"`` or the user's wish."""
        left = _LINGER
        while left > 0:
            left -= self._clock.tick(30) / 1000
            wish = self._asked()
            if wish not in (None, "step"):
                return str(wish)
        return "ended"

    def _asked(self) -> str | None:
        """Return the first open wish."""
        if self._pygame.display.get_init():
            self._events.extend(self._pygame.event.get())
        while self._events:
            wish = self._answer(self._events.popleft())
            if wish is not None:
                return wish
        return None

    def _answer(self, event: Any) -> str | None:
        """Return the wish of an event; None if it only changes the window."""
        game = self._pygame
        if event.type == game.QUIT:
            return "quit"
        if event.type != game.KEYDOWN:
            return None
        if event.key == game.K_SPACE:
            self._running = not self._running
        elif event.key in (game.K_PLUS, game.K_EQUALS, game.K_KP_PLUS):
            self._fps = min(_FASTEST, self._fps * 2)
        elif event.key in (game.K_MINUS, game.K_KP_MINUS):
            self._fps = max(_SLOWEST, self._fps / 2)
        elif event.key == game.K_RIGHT:
            self._running = False
        self._entitle()
        wishes = {game.K_RIGHT: "step", game.K_n: "next", game.K_r: "again",
                  game.K_q: "quit", game.K_ESCAPE: "quit"}  # fmt: skip
        return wishes.get(event.key)
