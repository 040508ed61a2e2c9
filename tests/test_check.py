"""Data that lie: every lie is found, with its episode and step, and sound data give no finding."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from helpers import PENDULUM, TINY, play, source
from typer.testing import CliRunner

from mpd_gym.agents.behavior_cloning import BehaviorCloningAgent, BehaviorCloningConfig
from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.cli import app
from mpd_gym.collect.recipes import collect
from mpd_gym.collect.record import record, write_dataset
from mpd_gym.collect.scripted import PendulumSwingUp
from mpd_gym.datasets import DataReport, WindowConfig, check_data, load_episodes
from mpd_gym.errors import DataError
from mpd_gym.training import TrainingConfig
from mpd_gym.types import Array, Episode

Change = Callable[[Episode], Episode]
SPACES = {
    "observation_space": Box(-np.inf, np.inf, (3,), np.float64),
    "action_space": Box(-1, 1, (2,), np.float64),
}


def system(episodes: int = 12, steps: int = 60) -> list[Episode]:
    """A stable linear system with noisy actions; rewards are quadratic; time limits end it."""
    rng = np.random.default_rng(0)
    a, b = 0.9 * np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.normal(size=(3, 2))
    found = []
    for _ in range(episodes):
        x, u = np.empty((steps + 1, 3)), rng.uniform(-1, 1, (steps, 2))
        x[0] = rng.normal(size=3)
        for t in range(steps):
            x[t + 1] = a @ x[t] + b @ u[t] + 0.01 * rng.normal(size=3)
        ends = np.arange(steps) == steps - 1
        rewards = -np.square(x[1:]).sum(axis=1)
        found.append(Episode(x, u, rewards, np.zeros(steps, bool), ends))
    return found


def looked_at(episodes: list[Episode], **spaces: Any) -> DataReport:
    return check_data(load_episodes(episodes, metadata={**SPACES, **spaces}))


def set_value(part: str, step: int, dimension: int, value: float) -> Change:
    def change(episode: Episode) -> Episode:
        rows: Array = np.array(getattr(episode, part))
        rows.reshape(len(rows), -1)[step, dimension] = value
        return replace(episode, **{part: rows})

    return change


def stuck(episode: Episode) -> Episode:
    x = np.array(episode.observations)
    x[17:, 1] = x[17, 1]
    return replace(episode, observations=x)


def rolled(part: str, shift: int) -> Change:
    return lambda episode: replace(
        episode, **{part: np.roll(getattr(episode, part), shift, axis=0)}
    )


# what is done to episode 5, what the message says, the step that it names
LIES: dict[str, tuple[Change, str, int]] = {
    "glitch": (
        set_value("observations", 17, 2, 1e3),
        r"observation 2 is 1000 here, 96 % .* lie in \[-.*, .*\], .*normalizer to 'cdf'", 17,
    ),
    "glitch of a reward": (set_value("rewards", 9, 0, -1e5), "reward 0 is -100000 here", 9),
    "dead sensor": (stuck, "observation 1 stays the same from here .* 1 of 12", 17),
    "actions late": (rolled("actions", 1), "actions seem to stand one step too late", 0),
    "actions early": (rolled("actions", -1), "actions seem to stand one step too early", 0),
    "rewards late": (rolled("rewards", 1), "rewards seem to stand one step too late", 0),
    "rewards early": (rolled("rewards", -1), "rewards seem to stand one step too early", 0),
}  # fmt: skip


def found(report: DataReport) -> list[tuple[str, int | None, int | None]]:
    return [(w.problem, w.episode, w.step) for w in (*report.errors, *report.warnings)]


@pytest.mark.fault("Data", "a glitch, or a sensor that dies", "warned: dimension, place, value")
@pytest.mark.fault("Data", "actions or rewards shifted by a step", "warned, with the episodes")
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_one_episode_is_found_there(lie: str) -> None:
    change, message, step = LIES[lie]
    episodes = system()
    episodes[5] = change(episodes[5])
    ((problem, *place),) = found(looked_at(episodes))
    assert place == [5, step]
    assert re.search(message, problem)


@pytest.mark.fault(
    "Data", "a small glitch, or one episode in other units", "warned: dimension, place, value"
)
def test_an_episode_that_reaches_much_further_than_all_others_is_found() -> None:
    largest = max(float(np.abs(episode.observations[:, 2]).max()) for episode in system())
    for change in (
        set_value("observations", 17, 2, 6 * largest),
        lambda e: replace(e, observations=np.asarray(e.observations) * [1, 1, 57.3]),
    ):
        episodes = system()
        episodes[5] = change(episodes[5])
        problem, episode, _ = found(looked_at(episodes))[0]
        assert episode == 5 and problem.startswith("observation 2 is ")


@pytest.mark.parametrize("lie", ["actions late", "actions early"])
def test_a_lie_in_all_episodes_is_found(lie: str) -> None:
    change, message, _ = LIES[lie]
    (warning,) = looked_at([change(episode) for episode in system()]).warnings
    assert message in warning.problem
    assert "so in 12 of 12 episodes" in warning.problem
    assert (warning.episode, warning.step) == (0, 0)


def test_a_linear_system_is_clean() -> None:
    assert not found(looked_at(system()))


GOALS = Dict(
    {key: Box(-np.inf, np.inf, (2,), np.float64)
     for key in ("observation", "achieved_goal", "desired_goal")}
)  # fmt: skip


def reaching(episodes: int = 12, steps: int = 40) -> list[Episode]:
    """A point walks to a goal of its own; reward 0 within 0.5 of it and -1 elsewhere."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(episodes):
        x, goal, u = np.empty((steps + 1, 2)), rng.uniform(-3, 3, 2), np.empty((steps, 2))
        x[0] = rng.uniform(-3, 3, 2)
        for t in range(steps):
            u[t] = np.clip(0.5 * (goal - x[t]) + 0.2 * rng.normal(size=2), -1, 1)
            x[t + 1] = x[t] + 0.5 * u[t]
        goals = np.repeat(goal[None], steps + 1, axis=0)
        near = np.linalg.norm(x[1:] - goal, axis=1) <= 0.5
        ends = np.arange(steps) == steps - 1
        parts = {"observation": x, "achieved_goal": x, "desired_goal": goals}
        found.append(Episode(parts, u, near - 1.0, np.zeros(steps, bool), ends))
    return found


def with_goals(episode: Episode, goals: Array, first: int = 0, last: int = 99) -> Episode:
    parts = dict(episode.observations)  # type: ignore[arg-type]
    parts["desired_goal"] = np.array(parts["desired_goal"])
    parts["desired_goal"][first:last] = goals
    return replace(episode, observations=parts)


def goal_of(episode: Episode) -> Array:
    goal: Array = episode.observations["desired_goal"][0]  # type: ignore[index]
    return goal


def goal_problems(episodes: list[Episode]) -> list[tuple[str, int | None, int | None]]:
    return found(looked_at(episodes, observation_space=GOALS))


@pytest.mark.fault("Data", "a goal that changes within an episode", "warned: episode and step")
def test_a_goal_that_changes_is_found() -> None:
    episodes = reaching()
    assert not goal_problems(episodes)
    episodes[4] = with_goals(episodes[4], np.array([9.0, 9.0]), first=13)
    changed = goal_problems(episodes)[0]
    assert "desired_goal changes here, and in 1 of 12 episodes" in changed[0]
    assert changed[1:] == (4, 13)


@pytest.mark.fault("Data", "a desired goal of the episode before", "warned: episode")
@pytest.mark.parametrize("last", [1, 99])
def test_a_goal_of_the_episode_before_is_found(last: int) -> None:
    episodes = reaching()
    episodes[4] = with_goals(episodes[4], goal_of(episodes[3]), last=last)
    problems = goal_problems(episodes)
    assert "desired_goal is that of the episode before, so in 1 of 12" in problems[0][0]
    assert problems[0][1:] == (4, 0)


def test_a_goal_of_another_episode_contradicts_rewards() -> None:
    episodes = reaching()
    late = with_goals(episodes[1], goal_of(episodes[0]))
    problems = goal_problems([*episodes, late])  # its goal is not that of the last episode
    assert any("rewards contradict the goal here" in p and e == 12 for p, e, _ in problems)


@pytest.mark.fault("Data", "sparse rewards of a goal, shifted by a step", "warned, with threshold")
@pytest.mark.parametrize(("shift", "way"), [(1, "late"), (-1, "early")])
def test_sparse_rewards_that_are_shifted_are_found(shift: int, way: str) -> None:
    problems = goal_problems([rolled("rewards", shift)(episode) for episode in reaching()])
    assert any(f"rewards stand one step too {way}" in problem for problem, *_ in problems)


@pytest.mark.fault(
    "Data", "copies of episodes, and episodes that overlap", "warned, with both places"
)
@pytest.mark.parametrize("rows", [20_000, 60])
def test_copies_are_found_in_small_and_in_large_data(rows: int) -> None:
    episodes = system()
    source = load_episodes([*episodes, episodes[3]], metadata=SPACES)
    (copy,) = [w for w in check_data(source, rows=rows).warnings if "repeats" in w.problem]
    assert "it repeats episodes in memory, episode 3, step 0; 1 of 13" in copy.problem
    assert (copy.episode, copy.step) == (12, 0)


def test_an_overlap_is_found() -> None:
    episodes = system()
    part = slice(20, None)
    cut = {name: getattr(episodes[3], name)[part] for name in ("observations", "actions", "rewards",
           "terminations", "truncations")}  # fmt: skip
    ((problem, *place),) = found(looked_at([*episodes, replace(episodes[3], **cut)]))
    assert "it repeats episodes in memory, episode 3, step 20" in problem
    assert place == [12, 0]


@pytest.mark.fault("Data", "fit([view, view])", "warned that every episode counts twice")
def test_one_source_twice_repeats_itself() -> None:
    view = load_episodes(system(), metadata=SPACES).select([1, 2, 3, 4])
    ((problem, *_),) = found(check_data([view, view]))
    assert "4 of 8 episodes repeat others" in problem


@pytest.mark.fault(
    "Data", "a time limit marked as termination", "warned, unless the limit is another"
)
def test_a_time_limit_marked_as_termination_is_found() -> None:
    ended = [replace(e, terminations=e.truncations, truncations=e.terminations) for e in system()]
    ((problem, *place),) = found(looked_at(ended))
    assert "all 12 terminated episodes have 60 steps" in problem and place == [0, 59]
    assert found(looked_at(ended, max_episode_steps=60))
    assert not found(looked_at(ended, max_episode_steps=100))


@pytest.mark.fault("Data", "a dimension that never varies", "warned: dimension and value")
def test_constant_dimensions_are_named() -> None:
    changed = [set_value("observations", slice(None), 1, 5.0)(e) for e in system()]  # type: ignore[arg-type]
    (problem, *place), *_ = found(looked_at(changed))
    assert "observations hardly vary in dimension 1 (5, range 0); agents ignore it" in problem
    assert place == [None, None]


@pytest.mark.fault("Data", "a float64 dimension of 1e-7 around 5", "warned: noise or a dead sensor")
def test_a_dimension_that_hardly_varies_is_named() -> None:
    episodes = system()
    for episode in episodes:
        episode.observations[:, 1] = 5 + 1e-7 * episode.observations[:, 1]  # type: ignore[call-overload]
    problems = [problem for problem, *_ in found(looked_at(episodes))]
    assert any("hardly vary in dimension 1 (5, range" in p and "round it" in p for p in problems)


@pytest.mark.fault(
    "Data", "actions that are nearly always at a bound", "warned: dimension and share"
)
def test_actions_at_a_bound_are_named() -> None:
    clipped = [replace(e, actions=np.sign(e.actions)) for e in system()]
    problems = [problem for problem, *_ in found(looked_at(clipped))]
    assert "action 1 is at a bound of [-1, 1] in 100% of the steps" in problems[1]


@pytest.mark.fault("Data", "episodes shorter than plans", "warned: share of padding, mean length")
@pytest.mark.parametrize(
    ("padding", "lost", "share"), [("repeat", "0%", "75%"), ("none", "100%", "0%")]
)
def test_episodes_shorter_than_plans_are_told(padding: str, lost: str, share: str) -> None:
    short = load_episodes(system(steps=3), metadata=SPACES)
    (warning,) = check_data(short, WindowConfig(8, padding=padding)).warnings
    assert f"{lost} of the episodes give no window, and {share} of what plans of 8" in str(warning)
    assert "episodes have 3 steps on average" in str(warning)
    assert not check_data(short, WindowConfig(3)).warnings


@pytest.mark.fault("Data", "an image in a Dict observation", "warned that agents do not read it")
def test_an_unused_image_is_named() -> None:
    spaces = Dict(
        {"observation": SPACES["observation_space"], "image": Box(0, 255, (4, 4), np.uint8)}
    )
    picture = np.zeros((61, 4, 4), np.uint8)
    seen = [
        replace(e, observations={"observation": e.observations, "image": picture}) for e in system()
    ]
    ((problem, *_),) = found(looked_at(seen, observation_space=spaces))
    assert "agents do not read ['image']" in problem


@pytest.mark.fault("Data", "data of one episode", "refused if one is to be held out, else warned")
def test_one_episode_is_an_error_where_one_is_held_out() -> None:
    data = load_episodes(play("LQR-v0", episodes=1))
    report = check_data(data)
    assert not report.errors and "one episode" in report.warnings[0].problem
    with pytest.raises(DataError, match=r"one episode.*set validation_fraction=0"):
        MPDiffuserAgent.fit(data, TINY, progress=False)


@pytest.mark.parametrize(
    "env_id", ["LQR-v0", PENDULUM, "CarUMaze-v0", "Walker2d-v5", "Hopper-v5", "HalfCheetah-v5"]
)
@pytest.mark.fault("Data", "random episodes of six environments", "no false alarm")
def test_random_episodes_are_clean(env_id: str) -> None:
    assert not found(check_data(source(env_id, episodes=20, steps=60), WindowConfig(8)))


@pytest.mark.fault("Data", "a heavy-tailed dimension", "no false alarm")
def test_heavy_tails_are_no_shift() -> None:
    policy, env, heavy = PendulumSwingUp(), gym.make("Pendulum-v1"), []
    for seed in range(10):
        rows, taken, ended = [env.reset(seed=seed)[0]], [], False
        while not ended:
            action = policy.predict(rows[-1])[0]
            observation, reward, _, ended, _ = env.step(action)
            rows.append(observation)
            taken.append((action, reward, False, ended))
        actions, rewards, *flags = map(np.array, zip(*taken, strict=True))
        x = np.array(rows)
        x[:, 2] = np.sign(x[:, 2]) * np.expm1(np.abs(x[:, 2]))
        heavy.append(Episode(x, actions, rewards, *flags))
    assert not found(check_data(load_episodes(heavy)))


@pytest.mark.fault(
    "Data", "data sets of this package and of a policy without noise", "no false alarm"
)
def test_recorded_and_collected_data_are_clean() -> None:
    collect("mpd_gym/lqr/noisy-p40-v0", fraction=0.02, processes=1, progress=False)
    record(PendulumSwingUp(), "Pendulum-v1", "me/swing-v0", episodes=8, seed=0, progress=False)
    for name in ("mpd_gym/lqr/noisy-p40-v0", "me/swing-v0"):
        assert not found(check_data(load_episodes(name), WindowConfig(32)))


@pytest.mark.fault(
    "Training", "data with a glitch", "fit warns of dimension, episode, step and value"
)
def test_fit_warns_of_what_check_finds() -> None:
    episodes = system(steps=20)
    episodes[5] = set_value("observations", 7, 2, 1e3)(episodes[5])
    training = TrainingConfig(steps=2, batch_size=8, validation_batches=1, ema_every=1)
    config = BehaviorCloningConfig(hidden=(8,), training=training, regressor_training=training)
    data = load_episodes(episodes, metadata=SPACES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        BehaviorCloningAgent.fit(data, config, progress=False)
    (warning,) = caught
    text = "episodes in memory, episode 5, step 7: observation 2 is 1000 here"
    assert str(warning.message).startswith(text)
    assert warning.filename == __file__  # the caller's line


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, " ".join(result.output.split())


def stored(name: str, episodes: list[Episode]) -> Path:
    return Path(write_dataset(name, episodes, **SPACES).storage.data_path)


@pytest.mark.fault(
    "Data", "mpd-gym check of sound, suspicious and damaged data", "exit code 0, 0, 1"
)
def test_the_command_shows_statistics_findings_and_a_plot(tmp_path: Path) -> None:
    import h5py

    plot = tmp_path / "dimensions.png"
    stored("me/sound-v0", system())
    code, text = run("me/sound-v0", "--horizon", "8", "--output", str(plot))
    assert code == 0 and "Nothing suspicious was found." in text
    assert "me/sound-v0: 12 episodes, 720 steps" in text and plot.stat().st_size > 5000
    assert "observation 2" in text and "action 1" in text and "reward 0" in text
    episodes = system()
    episodes[5] = set_value("observations", 17, 2, 1e3)(episodes[5])
    stored("me/glitch-v0", episodes)
    code, text = run("me/glitch-v0", "--horizon", "70")
    assert code == 0 and "warning: me/glitch-v0, episode 5, step 17: observation 2 is 1000" in text
    assert "of what plans of 70 steps learn is padding" in text
    with h5py.File(stored("me/damaged-v0", episodes) / "main_data.hdf5", "r+") as file:
        for number, step in ((2, 3), (7, 4)):
            file[f"episode_{number}/rewards"][step] = np.nan
    code, text = run("me/damaged-v0")
    assert code == 1  # every damaged episode is named, and the others are judged
    assert "error: me/damaged-v0, episode 2, step 3: 'rewards' is not finite" in text
    assert "error: me/damaged-v0, episode 7, step 4" in text
    assert "episode 5, step 17: observation 2 is 1000" in text
