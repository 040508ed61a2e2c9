"""The window in which policies are watched: what is shown, keys, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pygame
import pytest
from typer.testing import CliRunner

from mpd_gym.cli import app
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.evaluation import watch as watching
from mpd_gym.evaluation.comparison import Entry
from mpd_gym.evaluation.watch import watch
from mpd_gym.types import Array

LENGTH = 6
Shown = list[tuple[int, int]]  # seed and number of each picture


class Still:
    """A policy that does nothing."""

    def predict(self, observation: Any, state: Any = None, *_: Any) -> tuple[Array, Any]:
        return np.zeros(1, np.float32), state


class Invisible(gym.Wrapper[Any, Any, Any, Any]):
    """An environment without pictures."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]


@pytest.fixture(autouse=True)
def no_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(watching, "_LINGER", 0.0)
    yield
    pygame.display.quit()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Pictures that were made; each episode has `LENGTH` of them."""
    made: Shown = []

    def frames(policy: Any, env_id: str, *, seed: int, **_: Any) -> Iterator[Array]:
        for number in range(LENGTH):
            made.append((seed, number))
            yield np.full((20, 30, 3), number, np.uint8)

    monkeypatch.setattr(watching, "rollout_frames", frames)
    return made


def press(monkeypatch: pytest.MonkeyPatch, keys: dict[int, list[int]]) -> None:
    """Press keys after the n-th picture that the window shows."""
    show, shown = watching._Window.show, iter(range(1000))

    def shown_and_pressed(self: Any, picture: Array) -> None:
        show(self, picture)
        for key in keys.get(next(shown), ()):
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))

    monkeypatch.setattr(watching._Window, "show", shown_and_pressed)


def test_all_starts_are_played_to_their_end(played: Shown) -> None:
    assert watch([Entry("still", Still())], "LQR-v0", seed=3, episodes=2, fps=240) == 2
    assert played == [(seed, number) for seed in (3, 4) for number in range(LENGTH)]


def test_a_policy_in_an_environment_and_its_plan() -> None:
    drawn = []

    class Planner(Still):
        encoder = None

        def planned(self, state: Any) -> tuple[Array, Array]:
            drawn.append(state)
            return np.zeros((1, 4, 2)), np.zeros((1, 4, 1))

        def predict(self, observation: Any, state: Any = None, *_: Any) -> tuple[Array, Any]:
            class State:
                position = np.ones(1, int)

            return np.zeros(1, np.float32), State()

    entries = [Entry("plans", Planner()), Entry("still", Still())]
    options = {"max_episode_steps": 5}
    assert watch(entries, "LQR-v0", episodes=1, fps=240, env_kwargs=options) == 1
    assert len(drawn) == 6


def test_keys_go_on_begin_again_and_end(played: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    press(monkeypatch, {1: [pygame.K_n], 3: [pygame.K_r], 5: [pygame.K_q]})
    assert watch([Entry("still", Still())], "LQR-v0", fps=240) == 0
    assert played == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1)]


def test_a_paused_film_goes_on_step_by_step(played: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr(pygame.display, "set_caption", captions.append)
    press(monkeypatch, {0: [pygame.K_SPACE, pygame.K_RIGHT, pygame.K_RIGHT, pygame.K_ESCAPE]})
    assert watch([Entry("still", Still())], "LQR-v0", fps=240) == 0
    assert played == [(0, 0), (0, 1), (0, 2)]
    assert ["paused" in text for text in captions] == [False] + [True] * 6
    assert captions[0].startswith("LQR-v0, seed 0 | 240 pictures per second | space: pause")


def test_speed_is_doubled_halved_and_bounded(
    played: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    monkeypatch.setattr(pygame.display, "set_caption", captions.append)
    minus, plus = pygame.K_MINUS, pygame.K_PLUS
    press(monkeypatch, {0: [plus], 1: [plus, plus], 2: [minus], 3: [pygame.K_q]})
    watch([Entry("still", Still())], "LQR-v0", fps=50)
    speeds = [float(text.split(" | ")[1].split()[0]) for text in captions]
    assert speeds == [50, 100, 100, 200, 240, 240, 120, 120, 120]


def test_closing_the_window_ends(played: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    show = watching._Window.show

    def closed(self: Any, picture: Array) -> None:
        show(self, picture)
        pygame.event.post(pygame.event.Event(pygame.QUIT))

    monkeypatch.setattr(watching._Window, "show", closed)
    assert watch([Entry("still", Still())], "LQR-v0", fps=240) == 0
    assert played == [(0, 0)]
    assert not pygame.display.get_init()


def test_an_environment_that_ends_pygame_does_not_end_the_window() -> None:
    options = {"max_episode_steps": 3}
    entries = [Entry("still", Still())]  # Pendulum-v1 calls pygame.quit when it is closed
    assert watch(entries, "Pendulum-v1", episodes=2, fps=240, env_kwargs=options) == 2


def test_without_a_display_a_film_is_named(played: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDL_VIDEODRIVER")
    monkeypatch.setattr(pygame.display, "init", lambda: None)
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "offscreen")
    with pytest.raises(ConfigError, match=r"there is no display.*`mpd-gym compare` makes a GIF"):
        watch([Entry("still", Still())], "LQR-v0")


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(InputError, match="at least one policy, got none"):
        watch([], "LQR-v0")
    for fps in (0.0, float("nan")):
        with pytest.raises(InputError, match="fps: expected a positive number"):
            watch([Entry("still", Still())], "LQR-v0", fps=fps)
    with pytest.raises(ConfigError, match="Nowhere-v0 cannot be made"):
        watch([Entry("still", Still())], "Nowhere-v0")

    gym.register("test/Invisible-v0", lambda **_: Invisible(gym.make("LQR-v0")))
    try:
        with pytest.raises(ConfigError, match="test/Invisible-v0 draws no pictures"):
            watch([Entry("still", Still())], "test/Invisible-v0")
    finally:
        del gym.registry["test/Invisible-v0"]


def test_the_command_plays_a_shipped_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = []
    monkeypatch.setattr(watching._Window, "show", lambda self, picture: pictures.append(picture))
    arguments = ["watch", "LQR-v0", "shipped", "alone=shipped,composition=planner_only"]
    options = ["--episodes", "1", "--fps", "240", "-e", "max_episode_steps=3"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert [picture.shape for picture in pictures] == [(524, 1008, 3)] * 4
