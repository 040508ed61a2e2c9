"""Tables, figures and films: what a person sees is what was measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest

import mpd_gym  # noqa: F401 - registers the environments
from mpd_gym.collect.scripted import PendulumSwingUp
from mpd_gym.envs.image_pendulum import draw as draw_pendulum
from mpd_gym.errors import InputError
from mpd_gym.evaluation.figures import (
    captioned,
    draws_plan,
    evaluation_table,
    halved,
    rollout_frames,
    save_gif,
    side_by_side,
    state_error_figure,
)
from mpd_gym.evaluation.returns import Evaluation

PENDULUM = "ConstrainedPendulum-v0"


def evaluation(**changes: Any) -> Evaluation:
    content: dict[str, Any] = {
        "seeds": np.arange(4),
        "returns": np.array([1.0, 2.0, 3.0, 4.0]),
        "lengths": np.full(4, 9),
        "costs": np.array([0.0, 2.0, 0.0, 0.0]),
        "successes": np.array([True, False, True, True]),
        "collisions": None,
        "seconds": np.array([0.04, 0.0, 0.0, 0.0]),
    }
    return Evaluation(**{**content, **changes})


def cells(table: Any) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in table.columns}


def test_time_per_action_counts_the_calls_that_plan() -> None:
    table = cells(evaluation_table("LQR-v0", {"chunks of four": evaluation()}))
    assert table["ms/action (p99)"] == ["10.0 (38.8)"]


def test_a_table_has_each_measure_that_any_policy_has() -> None:
    other = evaluation(costs=None, final_errors=np.array([0.5, 0.5, 0.7, 0.7]))
    table = evaluation_table("E-v0", {"a": evaluation(), "b": other})
    shown = cells(table)
    assert table.title == "E-v0" and "4 episodes" in str(table.caption)
    assert shown["policy"] == ["a", "b"]
    assert shown["success"] == ["75% [30, 95]"] * 2
    assert shown["return"] == ["2.5 ± 2.1"] * 2
    assert shown["cost"] == ["0.5 ± 1.6", "–"] and shown["violation"] == ["25% [5, 70]", "–"]
    assert shown["final error"] == ["–", "0.60 ± 0.18"]
    assert "length" not in shown


def test_figures_and_films_have_their_sizes() -> None:
    errors = np.random.default_rng(0).random((5, 8))
    errors[0, 6:] = np.nan
    figure = state_error_figure({"planner": errors})
    assert len(figure.axes[0].lines) == 1
    short, long = [np.zeros((4, 6, 3), np.uint8)] * 2, [np.ones((4, 6, 3), np.uint8)] * 3
    film = side_by_side([short, long], gap=2)
    assert len(film) == 3 and film[0].shape == (4, 14, 3)


def test_halving_averages_four_pixels() -> None:
    frame = np.zeros((5, 4, 3), np.uint8)
    frame[:2, :2, 0] = [[255, 255], [255, 253]]
    frame[2:4, 2:] = 255
    small = halved(frame)
    assert small.shape == (2, 2, 3) and small.dtype == np.uint8
    assert small[0, 0].tolist() == [255, 0, 0] and small[1, 1].tolist() == [255] * 3
    assert small[0, 1].max() == 0


def test_captions_lie_above_and_keep_their_end_if_too_long() -> None:
    frames = [np.full((30, 180, 3), shade, np.uint8) for shade in (0, 255)]
    short, long, longer = (
        captioned(frames, text) for text in ("name", "x" * 100 + "tail of it", "y" * 99 + "xxtail")
    )
    assert short[0].shape == (54, 180, 3) and len(short) == 2
    np.testing.assert_array_equal(short[1][24:], frames[1])
    np.testing.assert_array_equal(short[0][:24], short[1][:24])
    inked = np.nonzero(short[0][:24].min(axis=(0, 2)) < 150)[0]
    assert 60 < inked.min() and inked.max() < 120
    edges = np.nonzero(long[0][:24].min(axis=(0, 2)) < 150)[0]
    assert edges.min() > 0 and edges.max() < 179, "it fits"
    assert (long[0] != longer[0]).any()


def test_a_gif_keeps_pictures_and_their_number(tmp_path: Path) -> None:
    frames = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 100, 255)]
    stored = iio.imread(save_gif(frames, tmp_path / "new" / "film.gif"))
    np.testing.assert_array_equal(stored, frames)
    with pytest.raises(InputError, match="at least one picture"):
        save_gif([], tmp_path / "film.gif")


class Planning:
    """A controller that says which observations it expects, as an agent does."""

    def __init__(self, chunk: int) -> None:
        self.controller, self.chunk = PendulumSwingUp(6.5), chunk
        self.flags: list[bool] = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        position = 1 if state is None or state.position[0] == self.chunk else state.position[0] + 1
        self.flags.append(deterministic)
        action, _ = self.controller.predict(observation)
        return action, SimpleNamespace(position=np.array([position]))

    def planned(self, state: Any) -> tuple[Any, None]:
        angles = np.linspace(0.0, 1.0, 6)
        return np.stack([np.cos(angles), np.sin(angles), angles], -1)[None], None


def test_the_plan_that_is_drawn_is_the_part_to_come() -> None:
    shown: list[Any] = []
    env = SimpleNamespace(unwrapped=SimpleNamespace(draw_plan=shown.append))
    policy = Planning(chunk=3)
    draw = draws_plan(policy)
    assert draw is not None
    state = None
    for _ in range(4):
        _, state = policy.predict(np.zeros(3), state)
        draw(env, state)
    whole = policy.planned(None)[0][0]
    for drawn, begin in zip(shown, (0, 1, 2, 0), strict=True):
        np.testing.assert_array_equal(drawn, whole[begin:])
    draw(SimpleNamespace(unwrapped=SimpleNamespace()), state)  # an environment that draws no plans
    assert draws_plan(PendulumSwingUp()) is None


def test_plans_of_latents_are_drawn_as_pictures() -> None:
    env = gym.make("LatentPendulum-v0", render_mode="rgb_array")
    inner: Any = env.unwrapped
    env.reset(seed=0, options={"state": [0.0, 0.0]})
    plain = np.asarray(env.render())
    angles = np.linspace(0.0, 1.0, 6)
    stacks = np.repeat(draw_pendulum(angles)[:, None], 4, axis=1)
    encoder = env.get_wrapper_attr("encoder")
    latents = encoder.encode(stacks)
    policy = SimpleNamespace(encoder=encoder, planned=lambda _: (latents[None], None))
    draw = draws_plan(policy)
    assert draw is not None
    draw(env, SimpleNamespace(position=np.array([3])))
    picture = np.asarray(env.render())
    inner.draw_plan(draw_pendulum(angles[2:]))
    exact = np.asarray(env.render())
    changed = (exact != plain).any(axis=-1)
    assert changed.mean() > 0.02
    assert np.abs(picture.astype(int) - exact)[changed].mean() < 40  # what the decoder blurs
    inner.draw_plan(np.stack([draw_pendulum(-angles[2:]), draw_pendulum(angles[2:])]), chosen=1)
    np.testing.assert_array_equal(env.render(), exact)
    for wrong, chosen in ((np.zeros((3, 64)), 0), (np.zeros((2, 3, 64, 64)), 2)):
        with pytest.raises(InputError, match=r"plans|chosen"):
            inner.draw_plan(wrong, chosen)
    env.reset(seed=0, options={"state": [0.0, 0.0]})
    np.testing.assert_array_equal(env.render(), plain)
    env.close()


def test_rollouts_show_the_plan_and_pass_deterministic_on() -> None:
    policy = Planning(chunk=2)
    plain = list(rollout_frames(policy, PENDULUM, seed=1, max_frames=3))
    assert policy.flags == [True] * 3
    drawn = list(
        rollout_frames(policy, PENDULUM, seed=1, max_frames=3, draw=draws_plan(policy),
                       deterministic=False)
    )  # fmt: skip
    assert policy.flags[3:] == [False] * 3
    for before, after in zip(plain, drawn, strict=True):
        assert (before != after).any(axis=-1).sum() > 500


def orange(env: gym.Env) -> int:
    picture = np.asarray(env.render()).astype(int)
    return int(((picture[..., 0] - picture[..., 2]) > 50).sum())


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        (PENDULUM, {}),
        ("LQR-v0", {}),
        ("LQR-v0", {"A": 0.9 * np.eye(3), "B": np.eye(3)}),
        ("CarUMaze-v0", {}),
    ],
)
def test_environments_draw_plans_until_told_otherwise(env_id: str, kwargs: Any) -> None:
    env = gym.make(env_id, render_mode="rgb_array", **kwargs)
    inner: Any = env.unwrapped
    observation, _ = env.reset(seed=0)
    x = observation["observation"] if isinstance(observation, dict) else observation
    plain, picture = orange(env), np.asarray(env.render())
    reach = 3.0 if env_id == "CarUMaze-v0" else 0.1
    plan = x + np.linspace(0, reach, 12)[:, None] * np.ones(len(x))
    inner.draw_plan(plan)
    single = orange(env)
    assert single > plain + 50
    fan = np.stack([plan, plan + 0.05, plan - 0.05])
    inner.draw_plan(fan, chosen=1)
    assert orange(env) > plain + 50
    inner.draw_plan(np.full_like(plan, np.nan))
    np.testing.assert_array_equal(env.render(), picture)
    inner.draw_plan(plan)
    inner.draw_plan(None)
    np.testing.assert_array_equal(env.render(), picture)
    inner.draw_plan(plan)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), picture)
    for wrong, chosen in ((np.zeros(3), 0), (np.zeros((4, 1)), 0), (fan, 3), (fan, -1)):
        with pytest.raises(InputError, match=r"plans|chosen"):
            inner.draw_plan(wrong, chosen)
    env.close()


def test_a_plan_changes_a_picture_and_nothing_else() -> None:
    env = gym.make(PENDULUM, render_mode="rgb_array")
    twin = gym.make(PENDULUM)
    first, _ = env.reset(seed=4)
    twin.reset(seed=4)
    for _ in range(3):
        env.unwrapped.draw_plan(np.tile(first, (5, 1)))  # type: ignore[attr-defined]
        env.render()
        np.testing.assert_equal(env.step(np.array([1.0]))[:4], twin.step(np.array([1.0]))[:4])
