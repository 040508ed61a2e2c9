"""What people reported of neighbouring projects, done here: each test names the report."""

from __future__ import annotations

import csv
import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from helpers import TINY, source, tiny_agent
from recorders import LIMIT, an_episode, make_noisy, quiet
from trainings import CONFIG, QUICK, assert_same, differs, network, noisy_loss
from trainings import sampler as toy_batches
from windows import marked_source, sampler

from mpd_gym import MPDiffuserAgent, compare, evaluate, load_agent
from mpd_gym.agents.spaces import Spaces
from mpd_gym.atomic import write_csv
from mpd_gym.datasets import WindowConfig, WindowSampler, fit_normalizers, load_episodes
from mpd_gym.diffusion.loss import Examples, LossConfig, denoising_loss
from mpd_gym.diffusion.samplers import ddim_move, normal_noise, sample
from mpd_gym.diffusion.schedule import make_schedule
from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.evaluation.figures import rollout_frames
from mpd_gym.training import fit
from mpd_gym.types import Episode

STATE = Box(-np.inf, np.inf, (2,), np.float32)
FORCE = Box(-1.0, 1.0, (1,), np.float32)


class Zero:
    """Does nothing, for one observation or many."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: Any = 0
    ) -> tuple[Any, Any]:
        rows = observation["observation"] if isinstance(observation, dict) else observation
        return np.zeros((*np.shape(rows)[:-1], 1), np.float32), state


class World(gym.Env):
    """One flat observation; subclasses change one habit of real environments."""

    observation_space: gym.Space[Any] = STATE
    action_space = FORCE
    length = 6

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def show(self) -> Any:
        return np.full(2, self.t, np.float32)

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.show(), 1.0, self.t >= self.length, False, {}


def registered(name: str, kind: Callable[[], Any], **options: Any) -> str:
    gym.register(f"Reported/{name}-v0", kind, **options)
    return f"Reported/{name}-v0"


def walks(count: int = 4, steps: int = 20, **changes: Any) -> list[Episode]:
    rng = np.random.default_rng(0)
    return [
        replace(
            an_episode(steps, costs=None, terminations=np.zeros(steps, bool)),
            observations=rng.normal(size=(steps + 1, 2)).cumsum(0).astype(np.float32),
            actions=rng.uniform(-1, 1, (steps, 1)).astype(np.float32),
            **changes,
        )
        for _ in range(count)
    ]


# --- data --------------------------------------------------------------------------------------


@pytest.mark.fault("Data", "windows of selected episodes", "those that the whole data have")
def test_windows_of_a_selection_are_those_of_the_whole() -> None:
    """huggingface/lerobot#2610: with an episode filter every frame counted as padding."""
    whole, config = marked_source(), WindowConfig(horizon=5)
    normalizers = fit_normalizers(whole, "minmax")
    third = range(7 + 1, 7 + 1 + 12)
    wanted = WindowSampler(whole, config, normalizers).windows(list(third))
    found = WindowSampler(whole.select([2]), config, normalizers)
    got = found.windows(list(range(len(found))))
    for name in ("initial", "observations", "actions", "rewards", "terminations", "mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


@pytest.mark.fault("Data", "statistics of several data sets, of a selection", "of just those steps")
def test_statistics_are_those_of_the_steps_that_are_learned_from() -> None:
    """huggingface/lerobot#4156: quantiles of merged data were means of quantiles.

    TensorAuto/OpenTau#363: statistics counted episodes that were left out.
    """
    usual = walks(9)
    other = [replace(e, observations=e.observations + 50) for e in walks(1)]
    x = np.linspace(-20, 70, 200)[:, None].repeat(2, 1)
    merged = fit_normalizers([load_episodes(usual), load_episodes(other)], "cdf").observation
    together = fit_normalizers(load_episodes(usual + other), "cdf").observation
    np.testing.assert_array_equal(merged.normalize(x), together.normalize(x))
    chosen = fit_normalizers(load_episodes(usual + other).select(range(9)), "minmax").observation
    alone = fit_normalizers(load_episodes(usual), "minmax").observation
    np.testing.assert_array_equal(chosen.normalize(x), alone.normalize(x))


@pytest.mark.fault("Data", "dimensions of 1e-3, 1 and 1e4", "each is scaled by its own range")
@pytest.mark.parametrize("kind", ["minmax", "cdf"])
def test_each_dimension_has_its_own_statistics(kind: str) -> None:
    """huggingface/diffusers#10636: one mean and deviation for all dimensions."""
    scales = np.array([1e-3, 1.0, 1e4])
    rows = np.random.default_rng(0).normal(5, 1, (21, 3)) * scales
    normalizer = fit_normalizers(load_episodes([an_episode(20, observations=rows)]), kind)
    found = normalizer.observation.normalize(rows)
    np.testing.assert_allclose((found.min(0), found.max(0)), ([-1] * 3, [1] * 3), atol=1e-12)


@pytest.mark.fault("Data", "a time stamp of 1.7e9 s among the observations", "steps of 10 ms stay")
def test_large_offsets_lose_no_precision() -> None:
    """huggingface/lerobot#2447: float time stamps chose frames of the next episode."""
    times = 1.7e9 + 0.01 * np.arange(21)
    spaces = {"observation_space": Box(-np.inf, np.inf, (1,), np.float64), "action_space": FORCE}
    source = load_episodes([an_episode(20, observations=times[:, None])], metadata=spaces)
    windows, normalizers = sampler(source, horizon=8)
    planned = normalizers.observation.unnormalize(windows.windows([3]).observations)[0, :, 0]
    np.testing.assert_allclose(np.diff(planned), 0.01, atol=1e-6)


@pytest.mark.fault(
    "Data", "arrays in Fortran order, strided, big-endian, float64", "read as they are"
)
@pytest.mark.parametrize(
    "change",
    [np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2], lambda a: a.astype(">f4"), np.float64],
)
def test_the_layout_of_arrays_does_not_matter(change: Callable[[Any], Any]) -> None:
    """takuseno/d3rlpy#264: observations changed where arrays were not contiguous."""
    usual = walks(2)
    changed = [
        replace(e, observations=change(e.observations), actions=change(e.actions)) for e in usual
    ]
    pairs = [sampler(load_episodes(e), horizon=8)[0].windows(range(20)) for e in (usual, changed)]
    for name in ("initial", "observations", "actions"):
        np.testing.assert_array_equal(*(getattr(batch, name) for batch in pairs))


@pytest.mark.fault("Data", "rewards of type int8", "sums do not overflow")
def test_sums_of_small_integers_do_not_overflow() -> None:
    """sotetsuk/pgx#1034: a reward of int8 came out as -92."""
    windows, _ = sampler(load_episodes(walks(2, rewards=np.full(20, 100, np.int8))), horizon=20)
    assert windows.windows([0]).rewards.sum() == 2000


@pytest.mark.fault("Data", "a flat file whose next observation is not the next row", "is kept")
def test_the_last_observation_is_the_files_own(tmp_path: Path) -> None:
    """Farama-Foundation/D4RL#145: the next episode's first observation took its place."""
    rows = np.arange(12.0)
    after = rows + 1
    after[[5, 11]] = 500, 1100
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        file.update(
            {
                "observations": rows[:, None],
                "next_observations": after[:, None],
                "actions": np.zeros((12, 1)),
                "rewards": rows,
                "terminals": np.zeros(12, bool),
                "timeouts": rows == 5,
            }
        )
    first, second = load_episodes(tmp_path / "flat.hdf5")
    assert first.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 500]
    assert second.observations[:, 0].tolist() == [6, 7, 8, 9, 10, 11, 1100]
    assert not first.terminations.any() and first.truncations[-1]


@pytest.mark.fault("Data", "a wrapper of the environment that nobody has", "read and learned from")
def test_the_datas_environment_is_not_made(minari_root: Path) -> None:
    """Farama-Foundation/Minari#302: Monitor wrapper … cannot be recreated."""
    dataset = quiet(make_noisy, "MpdTests/Marked-v0", "tests/wrapped-v0", episodes=2, seed=0)
    path = minari_root / "tests/wrapped-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"])
    wrapper = {"name": "Monitor", "entry_point": "nowhere.monitor:Monitor", "kwargs": None}
    metadata["env_spec"] = json.dumps({**spec, "additional_wrappers": [wrapper]})
    path.write_text(json.dumps(metadata))
    found, wanted = load_episodes("tests/wrapped-v0"), dataset.iterate_episodes()
    for episode, stored in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(episode.rewards, stored.rewards)


# --- observations and actions ------------------------------------------------------------------


@pytest.mark.fault("Observations and actions", "keys in another order, or more", "the same action")
def test_keys_are_read_by_name(car: MPDiffuserAgent) -> None:
    """openai/gym#1748: flattened in the order of the observation, not of the space.

    ARISE-Initiative/robomimic#81: an error where the environment shows more than is used.
    """
    observation, _ = gym.make("CarUMaze-v0").reset(seed=0)
    turned = dict(reversed(observation.items()))
    more = {**turned, "camera": np.zeros((8, 8, 3), np.uint8), "task": "park"}
    actions = [car.predict(o, deterministic=True)[0] for o in (observation, turned, more)]
    np.testing.assert_array_equal(actions, [actions[0]] * 3)


@pytest.mark.fault("Observations and actions", "an episode that is stopped early", "a new plan")
def test_no_action_of_the_last_episode_is_left(lqr: MPDiffuserAgent) -> None:
    """huggingface/lerobot#1116: the queue of actions was not emptied at a reset."""
    agent = lqr.with_options(action_chunk=4)
    before, after = np.array([1.0, 1.0]), np.array([-2.0, 0.5])
    wanted = agent.predict(after, deterministic=True)[0]
    _, state = agent.predict(before, deterministic=True)
    assert (agent.predict(after, state, deterministic=True)[0] != wanted).any()  # the old plan
    begun = agent.predict(after, state, np.array([True]), deterministic=True)[0]
    np.testing.assert_array_equal(begun, wanted)


@pytest.mark.fault("Observations and actions", "what reset returns, in a list", "refused")
def test_a_reset_in_a_list_is_refused(lqr: MPDiffuserAgent, car: MPDiffuserAgent) -> None:
    """takuseno/d3rlpy#307, Farama-Foundation/Gymnasium#1164: (obs, info), a tuple of Dicts."""
    for agent, env_id in ((lqr, "LQR-v0"), (car, "CarUMaze-v0")):
        observation, info = gym.make(env_id).reset(seed=0)
        for wrong in ([(observation, info)], (observation, observation)):
            with pytest.raises(InputError, match="observation"):
                agent.predict(wrong)


class Whole(World):
    action_space = Box(-10, 10, (1,), np.int64)


class Fraction(Zero):
    def predict(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        action, state = super().predict(*args, **kwargs)
        return action + 2.9, state


gym.register("Reported/Whole-v0", "test_reported:Whole")


@pytest.mark.fault("Observations and actions", "an integer action Box", "the nearest whole action")
def test_whole_actions_are_rounded(minari_root: Path) -> None:
    """ray-project/ray#8597, DLR-RM/stable-baselines3#898: floats for a Box of integers.

    A cast alone would cut them towards 0.
    """
    found = Spaces(STATE, Whole.action_space).write(np.array([[2.9], [-0.6], [99]]), single=False)
    assert found.dtype == np.int64 and found[:, 0].tolist() == [3, -1, 10]
    quiet(Fraction(), "Reported/Whole-v0", "tests/whole-v0", episodes=1, seed=0)
    assert load_episodes("tests/whole-v0")[0].actions[:, 0].tolist() == [3] * 6


@pytest.mark.fault(
    "Observations and actions", "actions in [100, 200], in float64", "kept in bounds"
)
@pytest.mark.parametrize(("low", "high"), [(100.0, 200.0), (-1 / 3, 1 / 3)])
def test_actions_are_in_the_spaces_units_bounds_and_type(low: float, high: float) -> None:
    """hill-a/stable-baselines#147: [-1, 1] for [0, 1]. DLR-RM/stable-baselines3#1145: float64."""
    box = Box(low, high, (1,), np.float64)
    episodes = [replace(e, actions=np.where(e.actions < 0, low, high)) for e in walks()]
    known = {"observation_space": STATE, "action_space": box}
    config = replace(TINY, training=TINY.training.with_steps(10))
    with pytest.warns(UserWarning, match="action 0 is at a bound of"):
        agent = MPDiffuserAgent.fit(load_episodes(episodes, metadata=known), config, progress=False)
    actions = agent.predict(np.random.default_rng(0).normal(size=(50, 2)))[0]
    assert actions.dtype == np.float64 and all(map(box.contains, actions))
    assert np.ptp(actions) > 0.1 * (high - low)


@pytest.mark.fault("Observations and actions", "the same data in other units", "the same plans")
@pytest.mark.parametrize("kind", ["cdf", "gaussian", "minmax"])
def test_units_do_not_matter(kind: str) -> None:
    """ARISE-Initiative/robomimic#81: normalised twice. google-deepmind/mujoco_playground#267: not.

    Powers of two scale without rounding, so that all networks are equal to the bit.
    """
    config = replace(TINY, normalizer=kind, training=TINY.training.with_steps(10))
    small, large = (
        MPDiffuserAgent.fit(load_episodes(episodes), config, progress=False)
        for episodes in (walks(), [_scaled(episode) for episode in walks()])
    )
    now = np.random.default_rng(1).normal(size=(5, 2))
    action = small.predict(now, deterministic=True)[0]
    np.testing.assert_array_equal(large.predict(1024 * now, deterministic=True)[0], 4 * action)


def _scaled(episode: Any) -> Episode:
    return replace(episode, observations=1024 * episode.observations, actions=4 * episode.actions)


# --- policies and evaluation -------------------------------------------------------------------


class Offline:
    """A policy as d3rlpy has them."""

    def predict(self, x: Any) -> Any:
        return np.zeros((len(x), 1))


@pytest.mark.fault("Policies", "a predict that takes observations only", "refused; says wrap it")
def test_another_projects_predict_is_named() -> None:
    """takuseno/d3rlpy#307 calls ``predict(observations)``, which returns actions alone."""
    with pytest.raises(ConfigError, match=r"deterministic.*too many positional.*wrap it"):
        evaluate(Offline(), "LQR-v0", seeds=1)


class Uneven(World):
    """Episodes of 1 and of 50 steps, and a list of the seeds of all resets."""

    seeds: ClassVar[list[int | None]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.seeds.append(seed)
        self.length = 50 if (seed or 0) % 2 == 0 else 1
        return super().reset(seed=seed)


@pytest.mark.fault("Evaluation", "short and long episodes side by side", "each counts once")
def test_each_seed_is_played_once_whatever_its_length() -> None:
    """DLR-RM/stable-baselines3#402: short episodes count more. #60: two resets for each episode.

    huggingface/lerobot#2850: as many starts as environments. #4691: more episodes than asked for.
    """
    Uneven.seeds.clear()
    found = evaluate(Zero(), registered("Uneven", Uneven), seeds=7, num_envs=3)
    assert Uneven.seeds == list(range(7))
    assert found.returns.tolist() == [50, 1, 50, 1, 50, 1, 50]


@pytest.mark.fault("Evaluation", "another time limit in env_kwargs", "shorter and longer, as asked")
@pytest.mark.parametrize("limit", [7, 300])
def test_a_time_limit_can_be_shorter_and_longer(limit: int) -> None:
    """Farama-Foundation/Gymnasium#291: a longer TimeLimit around the first changes nothing."""
    kwargs = {"max_episode_steps": limit}
    assert evaluate(Zero(), "Pendulum-v1", seeds=1, env_kwargs=kwargs).lengths == [limit]


@pytest.mark.fault(
    "Evaluation", "a film of one episode", "its pictures from reset to end, no others"
)
def test_a_film_shows_one_episode() -> None:
    """Farama-Foundation/Gymnasium#518: began with the last one's end. huggingface/lerobot#137."""
    limit = {"max_episode_steps": 5}
    env = gym.make("ConstrainedPendulum-v0", render_mode="rgb_array", **limit)
    env.reset(seed=5)
    wanted = [env.render()]
    for _ in range(5):
        env.step(np.zeros(1, np.float32))
        wanted.append(env.render())
    settings: dict[str, Any] = {"seed": 5, "env_kwargs": limit, "max_frames": 100}
    found = list(rollout_frames(Zero(), "ConstrainedPendulum-v0", **settings))
    np.testing.assert_array_equal(found, wanted)


class Blind(Uneven):
    """Promises pictures, and cannot draw them here."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def render(self) -> Any:
        raise RuntimeError("gladLoadGL error")


class Deep(Blind):
    def render(self) -> Any:
        return np.zeros((8, 8, 4), np.uint8)


gym.register("Reported/Blind-v0", "test_reported:Blind", disable_env_checker=True)
gym.register("Reported/Deep-v0", "test_reported:Deep", disable_env_checker=True)


@pytest.mark.fault("Evaluation", "a film where nothing can be drawn", "an error before any play")
@pytest.mark.parametrize(("name", "cause"), [("Blind", "gladLoadGL error"), ("Deep", "index 1")])
def test_what_cannot_be_drawn_is_known_before_anything_is_played(
    name: str, cause: str, tmp_path: Path
) -> None:
    """Farama-Foundation/Gymnasium#411: gladLoadGL error, here after all episodes."""
    Uneven.seeds.clear()
    with pytest.raises(ConfigError, match=f"{cause}.*no-gif.*MUJOCO_GL"):
        compare({"zero": Zero()}, f"Reported/{name}-v0", seeds=5, folder=tmp_path)
    assert len(Uneven.seeds) == 2  # the first observation, and its picture
    found = compare({"zero": Zero()}, f"Reported/{name}-v0", seeds=2, folder=tmp_path, film=False)
    assert found["zero"].returns.tolist() == [50, 1]


class Rewarding(World):
    """Rewards and costs are arrays of one element, or of two."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def step(self, action: Any) -> Any:
        observation, _, *ends, _ = super().step(action)
        return observation, np.ones(self.size), *ends, {"cost": np.full(self.size, 2.0)}


gym.register("Reported/Rewarding-v0", "test_reported:Rewarding", disable_env_checker=True)


@pytest.mark.fault(
    "Evaluation", "a reward that is an array", "of one element a number, else refused"
)
def test_rewards_are_numbers(minari_root: Path) -> None:
    """Farama-Foundation/Gymnasium#1450: rewards as arrays; NumPy 2.4 makes no number of them."""
    found = evaluate(Zero(), "Reported/Rewarding-v0", seeds=2)
    assert found.returns.tolist() == [6, 6]
    assert found.costs is not None and found.costs.tolist() == [12, 12]
    quiet(Zero(), "Reported/Rewarding-v0", "tests/rewarding-v0", episodes=1, seed=0)
    assert load_episodes("tests/rewarding-v0")[0].rewards.tolist() == [1] * 6
    two = {"env_kwargs": {"size": 2}}
    with pytest.raises(InputError, match="expected one number as reward, got array"):
        evaluate(Zero(), "Reported/Rewarding-v0", seeds=1, **two)
    with pytest.raises(InputError, match="expected one number as reward, got array"):
        quiet(Zero(), "Reported/Rewarding-v0", "tests/two-v0", episodes=1, seed=0, **two)


class Board(World):
    """A goal task on a board, in uint8."""

    part = Box(0, 9, (2,), np.uint8)
    observation_space = Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), part))

    def show(self) -> Any:
        place = np.array([1, 2], np.uint8)
        goal = np.array([4, 6], np.uint8)
        return {"observation": place, "achieved_goal": place, "desired_goal": goal}


@pytest.mark.fault("Evaluation", "goals in uint8", "their distance does not wrap around")
def test_distances_of_small_integers_do_not_wrap_around() -> None:
    """Kautenja/gym-super-mario-bros#94: the difference of two uint8."""
    errors = evaluate(Zero(), registered("Board", Board), seeds=1).final_errors
    assert errors is not None and errors.tolist() == [5.0]


# --- recording ---------------------------------------------------------------------------------


class Reusing(World):
    """Shows the same array and the same info at every step, with other values."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.rows, self.info = np.zeros(2, np.float32), {"cost": 0.0}
        return super().reset(seed=seed)[0], self.info

    def show(self) -> Any:
        self.rows[:] = self.t
        return self.rows

    def step(self, action: Any) -> Any:
        observation, reward, *ends, _ = super().step(action)
        self.info.update(cost=float(self.t), is_success=self.t >= self.length)
        return observation, reward, *ends, self.info


class Habits(World):
    """Infos whose keys differ from step to step; ended by itself and by the time limit at once."""

    def step(self, action: Any) -> Any:
        *rest, _ = super().step(action)
        info = {"x": 1.0} if self.t % 2 else {"y": np.ones(3), "episode": {"r": 1.0}}
        return *rest, info


gym.register("Reported/Reusing-v0", "test_reported:Reusing", disable_env_checker=True)
gym.register("Reported/Habits-v0", "test_reported:Habits", max_episode_steps=World.length)
gym.register("Reported/Once-v0", "test_reported:World", kwargs={}, max_episode_steps=1)


@pytest.mark.fault("Recording", "an environment that fills one array and one info", "copies")
def test_arrays_that_an_environment_reuses_are_copied(minari_root: Path) -> None:
    """Farama-Foundation/Gymnasium#1132, thu-ml/tianshou#1281: all steps held the last values."""
    quiet(Zero(), "Reported/Reusing-v0", "tests/reusing-v0", episodes=2, seed=0)
    episode = load_episodes("tests/reusing-v0")[1]
    assert episode.observations[:, 0].tolist() == list(range(7))
    assert episode.costs is not None and episode.costs.tolist() == list(range(1, 7))
    found = evaluate(Zero(), "Reported/Reusing-v0", seeds=3, num_envs=2)
    assert found.costs is not None and found.costs.tolist() == [21.0] * 3


@pytest.mark.fault("Recording", "infos with other keys at each step", "recorded")
@pytest.mark.fault("Recording", "an end and the time limit at the same step", "both are kept")
def test_infos_may_differ_and_both_ends_are_kept(minari_root: Path) -> None:
    """Farama-Foundation/Minari#246: other keys, an error. takuseno/d3rlpy#463, pytorch/rl#2329."""
    quiet(Zero(), "Reported/Habits-v0", "tests/habits-v0", episodes=1, seed=0)
    episode = load_episodes("tests/habits-v0")[0]
    for flags in (episode.terminations, episode.truncations):
        assert flags.tolist() == [False] * 5 + [True]


@pytest.mark.fault("Recording", "episodes of one step", "action, reward and both observations")
def test_episodes_of_one_step_are_whole(minari_root: Path) -> None:
    """Farama-Foundation/Minari#245: no action was recorded. takuseno/d3rlpy#127."""
    quiet(make_noisy, "Reported/Once-v0", "tests/once-v0", episodes=2, seed=0)
    for episode in load_episodes("tests/once-v0"):
        assert episode.observations.tolist() == [[0, 0], [1, 1]]
        assert episode.actions.shape == (1, 1) and episode.actions.all()
        assert (episode.rewards, episode.truncations, episode.terminations) == (1, True, False)


@pytest.mark.fault("Recording", "an agent that plans every 4 steps", "each step has its own state")
def test_steps_of_a_chunk_have_their_own_observations(
    lqr: MPDiffuserAgent, minari_root: Path
) -> None:
    """strands-labs/robots#798: the observation of the chunk's start at every step."""
    quiet(lqr.with_options(action_chunk=4), "LQR-v0", "tests/chunk-v0", episodes=1, seed=0)
    episode = load_episodes("tests/chunk-v0")[0]
    env = gym.make("LQR-v0")
    rows = [env.reset(seed=episode.seed)[0], *(env.step(a)[0] for a in episode.actions)]
    np.testing.assert_allclose(episode.observations, rows, rtol=1e-6)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.fault("Training", "fewer sampling steps than levels, not a divisor", "ends at level 0")
@pytest.mark.parametrize("levels", [7, 100])
def test_skipped_levels_match_the_moves_between_them(levels: int) -> None:
    """huggingface/diffusers#12633, #11347: a step assumed another next level than the list's.

    Of a certain clean trajectory DDIM must arrive there, in any number of steps.
    """
    schedule, clean = make_schedule("cosine", levels), torch.tensor([[[0.3, -0.7]]])
    generator = torch.Generator().manual_seed(0)

    def step(noisy: Any, k: int, k_next: int, noise: Any) -> Any:
        return ddim_move(noisy, clean, k, k_next, schedule)[0]

    for count in range(1, levels + 1):
        visited = schedule.levels(count)
        assert len(set(visited)) == count and visited[0] == levels
        start = torch.randn(1, 1, 2, generator=generator)
        end = sample(step, start, visited, normal_noise((1, 1, 2), generator))
        torch.testing.assert_close(end, clean)


@pytest.mark.fault(
    "Training", "windows with padding at their ends, weight 0", "no gradient from it"
)
def test_padding_of_weight_0_does_not_teach() -> None:
    """huggingface/lerobot#3442: padded actions in the loss."""
    recorded = torch.ones(4, 8, 3)
    recorded[:, 5:] = 0
    none, fixed = torch.zeros(4, 0), torch.zeros(8, 3, dtype=torch.bool)
    examples = Examples(torch.ones(4, 8, 3), none, none, none, recorded, fixed, fixed)
    output = torch.zeros(4, 8, 3, requires_grad=True)
    config = LossConfig(padding_weight=0.0)
    generator = torch.Generator().manual_seed(0)
    schedule = make_schedule("cosine", 10)
    denoising_loss(lambda *_: output, examples, schedule, config, generator).backward()
    assert output.grad is not None
    assert not output.grad[:, 5:].any() and output.grad[:, :5].all()


@pytest.mark.fault("Training", "batch after batch", "other windows each time, all of them seen")
def test_batches_differ_and_cover_the_data() -> None:
    """starVLA/starVLA#470: the same samples in every epoch."""
    windows, _ = sampler(horizon=5)
    rng = np.random.default_rng(0)
    batches = [windows.sample(8, rng).initial for _ in range(30)]
    assert len({batch.tobytes() for batch in batches}) == 30
    assert len({row.tobytes() for batch in batches for row in batch}) == len(windows)


@pytest.mark.fault("Training", "checkpoints often, or never", "the same weights")
def test_checkpoints_do_not_change_what_is_learned(tmp_path: Path) -> None:
    """harubaru/waifu-diffusion#31: training went on from the averaged weights that were saved."""
    toy, often = (network(), noisy_loss, toy_batches), differs(CONFIG, checkpoint_every=1)
    kept = fit(*toy, often, directory=tmp_path, **QUICK)
    never = fit(network(), noisy_loss, toy_batches, CONFIG, **QUICK)
    assert_same(kept.weights, never.weights)


@pytest.mark.fault(
    "Training", "the caller's seeds of NumPy and PyTorch", "neither used nor changed"
)
def test_global_random_generators_are_left_alone() -> None:
    """CMA-ES/pycma#54: a library seeds the generator of its caller."""
    actions = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
        agent = tiny_agent("LQR-v0", training=TINY.training.with_steps(10))
        actions.append(agent.predict(np.ones(2))[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(*actions)


@pytest.mark.fault("Training", "a seed of 2 ** 64", "refused, with the bounds")
def test_seeds_that_no_generator_takes_are_refused(lqr: MPDiffuserAgent) -> None:
    """HorizonRobotics/alf#1481: Overflow when unpacking long."""
    lqr.reseed(2**63 - 1)
    for take in (lqr.reseed, lambda seed: replace(TINY, seed=seed)):
        with pytest.raises(ConfigError, match=f"from 0 to {2**63 - 1}; got {2**64}"):
            take(2**64)


@pytest.mark.fault("Training", "fit in a thread, as notebooks and sweeps run it", "it learns")
def test_training_runs_in_a_thread(tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning#9590: signal only works in main thread."""
    found: list[MPDiffuserAgent] = []
    config = replace(TINY, training=TINY.training.with_steps(10))

    def run() -> None:
        data = source("LQR-v0")
        found.append(MPDiffuserAgent.fit(data, config, directory=tmp_path, progress=False))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0].history["planner"]["steps"] == 10


# --- files and the machine ---------------------------------------------------------------------


@pytest.mark.fault("Files", "a path that begins with ~", "lies in the home folder")
def test_a_tilde_is_the_home_folder(
    lqr: MPDiffuserAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ARISE-Initiative/robomimic#36: results lay in a folder ~; no shell expands ``a=~/b``."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    lqr.save("~/agents/mine.safetensors")
    config = replace(TINY, training=TINY.training.with_steps(10))
    MPDiffuserAgent.fit(source("LQR-v0"), config, directory="~/runs", progress=False)
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"agents", "runs"}
    assert not (tmp_path / "~").exists()
    wanted, found = (
        a.predict(np.ones(2), deterministic=True)[0]
        for a in (lqr, load_agent("~/agents/mine.safetensors"))
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.fault("Files", "names in any script, on a machine with another encoding", "UTF-8")
def test_tables_are_utf_8_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """minerllabs/minerl#780: text files in the machine's encoding, here on Windows."""
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    write_csv(tmp_path / "table.csv", [{"policy": "größe 王"}])
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"policy": "größe 王"}]


@pytest.mark.fault("Files", "weights that are not contiguous", "saved and loaded the same")
def test_transposed_weights_are_saved(tmp_path: Path) -> None:
    """safetensors/safetensors#469: non-contiguous tensors are refused."""
    agent = tiny_agent("LQR-v0", training=TINY.training.with_steps(10))
    for weight in agent.models["planner"].parameters():
        if weight.ndim > 1:
            weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    agent.save(tmp_path / "agent.safetensors")
    again = load_agent(tmp_path / "agent.safetensors")
    pairs = zip(*(a.models["planner"].parameters() for a in (agent, again)), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


@pytest.mark.fault("Files", "data that another process writes, or without locks", "named as that")
def test_a_locked_file_is_not_called_damaged(minari_root: Path) -> None:
    """h5py/h5py#1101: unable to lock file. Who is told to record it again deletes good data."""
    quiet(make_noisy, "MpdTests/Marked-v0", "tests/locked-v0", episodes=1, seed=0)
    data = load_episodes("tests/locked-v0")[0]
    path = minari_root / "tests/locked-v0/data/main_data.hdf5"
    code = f"import h5py; file = h5py.File({str(path)!r}, 'a'); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        with pytest.raises(DataError, match=r"is locked.*HDF5_USE_FILE_LOCKING"):
            load_episodes("tests/locked-v0")
        writer.communicate(b"\n")
    np.testing.assert_array_equal(load_episodes("tests/locked-v0")[0].rewards, data.rewards)


def forks(test: Any) -> Any:
    """Marks of a test that forks, as scripts on Linux do, whatever Python thinks of it."""
    test = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(test)
    return pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")(test)


def _read(data: Any, answers: Any) -> None:
    answers.put([float(episode.observations.sum()) for episode in data])


@forks
@pytest.mark.fault("Machine", "forked processes that read one open HDF5 data set", "right values")
def test_forked_processes_read_the_same_data(minari_root: Path) -> None:
    """pytorch/pytorch#11929: workers read wrong rows through a shared handle."""
    quiet(make_noisy, "MpdTests/Marked-v0", "tests/forked-v0", episodes=LIMIT, seed=0)
    data = load_episodes("tests/forked-v0")
    wanted = [float(episode.observations.sum()) for episode in data]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=_read, args=(data, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=60) for _ in workers] == [wanted] * 3
    for worker in workers:
        worker.join()


def _act(agent: Any, answers: Any) -> None:
    answers.put(agent.predict(np.ones(2), deterministic=True)[0])


@forks
@pytest.mark.fault("Machine", "a fork after the agent has acted", "it acts there, too")
def test_an_agent_acts_in_a_forked_process(lqr: MPDiffuserAgent) -> None:
    """hill-a/stable-baselines#217: a deadlock after a fork of a process with threads."""
    wanted = lqr.predict(np.ones(2), deterministic=True)[0]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    worker = context.Process(target=_act, args=(lqr, answers))
    worker.start()
    np.testing.assert_array_equal(answers.get(timeout=60), wanted)
    worker.join()
