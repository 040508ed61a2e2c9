"""The canvas puts things where the world says, and the renderer keeps its promises."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mpd_gym.envs.drawing import Canvas, Renderer, mix
from mpd_gym.errors import InputError

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def canvas() -> Canvas:
    """100 × 60 pixels, 10 pixels for each unit, (1, 2) in the middle."""
    result = Canvas((100, 60), centre=(1.0, 2.0), scale=10.0)
    result.fill(WHITE)
    return result


def ink(picture: np.ndarray) -> np.ndarray:
    """Share of ink in each pixel."""
    return 1 - picture[..., 1] / 255


def test_box_covers_its_pixels_exactly() -> None:
    picture = canvas()
    picture.box(1.0, 2.0, 3.0, 4.0, BLACK)
    share = ink(picture.array())
    assert share.shape == (60, 100)
    assert share[11:29, 51:69].min() == 1 and share.sum() == pytest.approx(400, rel=0.03)
    assert share[:, :49].max() == 0 and share[32:].max() == 0


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_areas(radius) -> None:
    disc, ring = canvas(), canvas()
    disc.disc((1, 2), radius, BLACK)
    ring.ring((1, 2), radius, BLACK, 2.0)
    area = np.pi * (10 * radius) ** 2
    assert ink(disc.array()).sum() == pytest.approx(area, rel=0.05)
    hole = np.pi * (10 * radius - 2) ** 2
    assert ink(ring.array()).sum() == pytest.approx(area - hole, rel=0.12)


def test_lines_have_their_width_in_any_direction() -> None:
    for angle in np.linspace(0, np.pi, 7):
        picture = canvas()
        step = 2 * np.array([np.cos(angle), np.sin(angle)])
        picture.line([(1 - step[0], 2 - step[1]), (1 + step[0], 2 + step[1])], RED, 3.0)
        assert ink(picture.array()).sum() == pytest.approx(40 * 3 + np.pi * 1.5**2, rel=0.1)


def test_edges_are_smooth() -> None:
    picture = canvas()
    picture.polygon([(-1.0, 0.0), (3.0, 0.7), (3.0, 0.0)], BLACK)
    share = ink(picture.array())
    assert ((share > 0.05) & (share < 0.95)).sum() > 20


def test_far_and_missing_points_do_no_harm() -> None:
    picture = canvas()
    picture.line([(0, 2), (np.nan, 2), (2, 2)], BLACK, 2.0)
    picture.line([(1e12, 2), (np.inf, 3)], BLACK, 2.0)
    assert ink(picture.array()).sum() == pytest.approx(40, rel=0.2)


def test_text_is_anchored() -> None:
    picture = canvas()
    picture.text("left", (1, 2), BLACK, height=14, anchor="midleft")
    share = ink(picture.array())
    assert share.sum() > 20 and share[:, :49].max() == 0
    rows = np.nonzero(share.max(axis=1) > 0.2)[0]
    assert 20 < rows.min() and rows.max() < 40


def test_mix() -> None:
    assert mix(BLACK, WHITE, 0.0) == BLACK and mix(BLACK, WHITE, 1.0) == WHITE
    assert mix(BLACK, RED, 0.2) == (51, 0, 0)


def renderer(mode: str | None) -> Renderer:
    return Renderer(mode, size=(100, 60), centre=(1, 2), scale=10, fps=1000, title="test")


def test_renderer_returns_pictures_or_shows_them() -> None:
    picture = renderer("rgb_array").render(lambda c: c.fill(RED))
    assert picture.dtype == np.uint8 and (picture == RED).all()
    import pygame

    window = renderer("human")
    assert window.render(lambda c: c.fill(RED)) is None
    assert pygame.display.get_surface().get_at((3, 3))[:3] == RED
    twin = pickle.loads(pickle.dumps(window))
    twin.close()
    assert pygame.display.get_init(), "closing a copy without a window leaves other windows open"
    window.close()
    assert not pygame.display.get_init()


def test_renderer_without_a_mode_warns() -> None:
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert renderer(None).render(lambda c: None) is None


def test_unknown_mode() -> None:
    with pytest.raises(InputError, match="render_mode: expected None or one of"):
        renderer("ansi")
