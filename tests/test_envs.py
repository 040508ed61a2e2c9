"""What every registered environment promises; a new id is covered with no new test."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

import mpd_gym  # registers the ids
from mpd_gym.errors import InputError, MissingExtraError

IDS = sorted(
    name for name, spec in gym.registry.items() if mpd_gym.__name__ in str(spec.entry_point)
)
BATCHED = [name for name in IDS if gym.spec(name).vector_entry_point is not None]
MODELS = ["Pendulum-v1", "Walker2d-v5"]  # whose warnings are allowed
HEADINGS = [
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Arguments",
    "Version History",
]


def make(name: str, **kwargs: Any) -> gym.Env:
    try:
        return gym.make(name, **kwargs)
    except MissingExtraError as error:
        pytest.skip(str(error))


def is_mujoco(env: gym.Env) -> bool:
    return "mujoco" in type(env.unwrapped).__module__


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def assert_same(first: Any, second: Any, *, tolerance: float = 0.0) -> None:
    """Equal structure, types, shapes and dtypes; numbers within the tolerance."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key], tolerance=tolerance)
    elif isinstance(first, np.ndarray) and first.dtype == object:
        for one, other in zip(first, second, strict=True):
            assert_same(one, other, tolerance=tolerance)
    elif first is not None:
        one, other = np.asarray(first), np.asarray(second)
        assert one.shape == other.shape and one.dtype == other.dtype
        if not np.array_equal(one, other):
            np.testing.assert_allclose(
                one.astype(float), other.astype(float), rtol=0, atol=tolerance, equal_nan=False
            )


def rollout(env: gym.Env, seed: int, steps: int) -> list[Any]:
    """Outcomes of random actions through all ends of episodes."""
    env.action_space.seed(seed)
    outcomes: list[Any] = [env.reset(seed=seed)]
    for _ in range(steps):
        outcome = env.step(env.action_space.sample())
        outcomes.append(outcome)
        if outcome[2] or outcome[3]:
            outcomes.append(env.reset())
    return outcomes


def assert_same_rollouts(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other)
        for part, counterpart in zip(one, other, strict=True):
            assert_same(part, counterpart)


def bare(name: str) -> gym.Env:
    """What the entry point gives, without the wrappers that `gymnasium.make` adds."""
    env = make(name)
    while isinstance(env, (TimeLimit, OrderEnforcing, PassiveEnvChecker)):
        env = env.env
    return env


def warnings_of(check: Callable[[gym.Env], None], env: gym.Env) -> set[str]:
    """Texts of the warnings, without colours and the environment's own name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(env)
    env.close()
    texts = [re.sub(r"\x1b\[\d+m", "", str(warning.message)) for warning in caught]
    texts = [text.replace(str(env), "ENV") for text in texts]
    return {text.replace(str(env.unwrapped), "UNWRAPPED") for text in texts}


def checker_warnings(name: str) -> set[str]:
    """Warnings of Gymnasium's checker, and of SB3's."""
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    # MuJoCo's window cannot open without a display
    check = partial(check_env, skip_render_check=is_mujoco(make(name)))
    found = warnings_of(check, make(name)) | warnings_of(check, bare(name))
    return found | warnings_of(sb3_check_env, bare(name))


@cache
def allowed_warnings() -> frozenset[str]:
    return frozenset().union(*(checker_warnings(name) for name in MODELS))


def test_the_ids_of_the_package() -> None:
    assert {
        "CarUMaze-v0",
        "ConstrainedPendulum-v0",
        "ImagePendulum-v0",
        "LQR-v0",
        "LatentPendulum-v0",
        "Walker2dTorqueDefect-v0",
    } <= set(IDS)


@pytest.mark.parametrize("name", IDS)
def test_checkers_give_no_warning_that_gymnasiums_environments_do_not(name: str) -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    assert checker_warnings(name) <= allowed_warnings()


@pytest.mark.parametrize("name", IDS)
def test_equal_seeds_give_equal_rollouts(name: str) -> None:
    first, second = make(name), make(name)
    for seed in range(3):
        assert_same_rollouts(rollout(first, seed, 80), rollout(second, seed, 80))
    starts = [leaves(first.reset(seed=seed)[0]) for seed in range(20)]
    assert len({b"".join(part.tobytes() for part in start) for start in starts}) == 20


@pytest.mark.parametrize("name", IDS)
def test_nothing_leaks_between_episodes(name: str) -> None:
    used = make(name)
    rollout(used, 1, 250)
    rollout(used, 2, 7)  # leaves an episode unfinished
    assert_same_rollouts(rollout(used, 3, 80), rollout(make(name), 3, 80))


@pytest.mark.parametrize("name", IDS)
def test_rollouts_stay_finite_and_in_their_spaces(name: str) -> None:
    env = make(name)
    for observation, *rest in rollout(env, 4, 300):
        assert observation in env.observation_space
        for leaf in [*leaves(rest[-1]), *(float(reward) for reward in rest[:1] if len(rest) > 1)]:
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", IDS)
def test_episodes_end_at_the_time_limit(name: str) -> None:
    env, limit = make(name), gym.spec(name).max_episode_steps
    assert limit is not None
    lengths, steps = [], 0
    for outcome in rollout(env, 5, limit + 50):
        steps = 0 if len(outcome) == 2 else steps + 1
        if len(outcome) == 5 and (outcome[2] or outcome[3]):
            assert outcome[3] == (steps == limit)
            lengths.append(steps)
    assert lengths and max(lengths) <= limit


@pytest.mark.fault("Observations and actions", "an action that the caller keeps", "never changed")
@pytest.mark.parametrize("name", IDS)
def test_actions_are_not_changed_in_place(name: str) -> None:
    env = make(name)
    env.reset(seed=0)
    for scale in (1.0, 3.0):  # beyond the bounds too, where environments clip
        action = (scale * env.action_space.high).astype(env.action_space.dtype)
        kept = action.copy()
        action.flags.writeable = False
        env.step(action)
        assert np.array_equal(action, kept)


@pytest.mark.fault(
    "Observations and actions",
    "actions that are NaN, of another shape or type",
    "refused; the environment's state is unchanged",
)
@pytest.mark.parametrize("name", IDS)
def test_bad_actions_are_refused_before_anything_changes(name: str) -> None:
    env, untouched = make(name), make(name)
    good = np.asarray(env.action_space.sample())
    env.reset(seed=6)
    untouched.reset(seed=6)
    for wrong in (
        np.where(np.arange(good.size) == good.size - 1, np.nan, good),
        np.full_like(good, np.inf),
        np.zeros(good.size + 1),
        np.float32(0.0),
        ["left"] * good.size,
    ):
        with pytest.raises(InputError, match="action"):
            env.step(wrong)
    assert_same_rollouts([env.step(good)], [untouched.step(good)])


@pytest.mark.parametrize("name", IDS)
def test_a_reset_is_needed_first(name: str) -> None:
    env = make(name, render_mode="rgb_array")
    for environment in (env, bare(name)):
        if is_mujoco(env) and environment is not env:
            continue  # Gymnasium's bare MuJoCo environments start by themselves
        with pytest.raises(ResetNeeded):
            environment.step(env.action_space.sample())
        with pytest.raises(ResetNeeded):
            environment.render()


@pytest.mark.parametrize("name", IDS)
def test_unknown_reset_options_are_refused(name: str) -> None:
    env = make(name)
    if is_mujoco(env):
        pytest.skip("Gymnasium's MuJoCo environments take any options")
    with pytest.raises(InputError, match="nonsense"):
        env.reset(options={"nonsense": 1})


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("name", BATCHED)
def test_batched_copies_agree_with_single_ones(name: str, mode: AutoresetMode) -> None:
    copies = 4
    batched = gym.make_vec(name, num_envs=copies, autoreset_mode=mode)
    single = gym.make_vec(
        name,
        num_envs=copies,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
    )
    assert batched.metadata["autoreset_mode"] is mode
    assert batched.observation_space == single.observation_space
    assert batched.action_space == single.action_space
    batched.action_space.seed(7)
    outcomes = [(batched.reset(seed=7), single.reset(seed=7))]
    ended = 0
    gentle = np.linspace(0.0, 1.0, copies, dtype=np.float32)[:, None]  # some reach the time limit
    for _ in range(int(2.2 * gym.spec(name).max_episode_steps)):
        actions = gentle * batched.action_space.sample()
        outcomes.append((batched.step(actions), single.step(actions)))
        ended += int(outcomes[-1][0][3].sum())
    assert ended > 0
    for ours, theirs in outcomes:
        for part, counterpart in zip(ours, theirs, strict=True):
            assert_same(part, counterpart, tolerance=1e-12)


@pytest.mark.parametrize("name", IDS)
def test_works_in_sync_and_async_vector_environments(name: str) -> None:
    make(name).close()
    sync = gym.make_vec(name, num_envs=2, vectorization_mode="sync")
    parallel = gym.make_vec(name, num_envs=2, vectorization_mode="async")
    try:
        sync.action_space.seed(8)
        actions = [sync.action_space.sample() for _ in range(30)]
        first = [sync.reset(seed=8), *map(sync.step, actions)]
        second = [parallel.reset(seed=8), *map(parallel.step, actions)]
        assert_same_rollouts(first, second)
    finally:
        parallel.close()
        sync.close()


@pytest.mark.parametrize("name", IDS)
def test_pickled_copies_go_on_alike(name: str) -> None:
    env = make(name)
    rollout(env, 9, 10)
    copy = pickle.loads(pickle.dumps(env))
    if not is_mujoco(env):  # those forget their state, by Gymnasium's EzPickle
        action = env.action_space.sample()
        assert_same_rollouts([env.step(action)], [copy.step(action)])
    assert_same_rollouts(rollout(env, 10, 30), rollout(copy, 10, 30))


@pytest.mark.parametrize("name", IDS)
def test_the_specification_survives_json(name: str) -> None:
    env = make(name)
    spec = env.spec
    assert spec is not None
    again = gym.make(EnvSpec.from_json(spec.to_json()))
    assert str(again) == str(env)
    assert_same_rollouts(rollout(env, 11, 20), rollout(again, 11, 20))


def render(env: gym.Env) -> Any:
    try:
        return env.render()
    except Exception as error:
        if is_mujoco(env):
            pytest.skip(f"MuJoCo cannot draw on this machine: {error}")
        raise


@pytest.mark.parametrize("name", IDS)
def test_pictures(name: str) -> None:
    env = make(name, render_mode="rgb_array")
    env.reset(seed=12)
    first = render(env)
    for _ in range(10):
        env.step(env.action_space.high)
    second = render(env)
    env.close()
    for picture in (first, second):
        assert picture.dtype == np.uint8
        assert picture.ndim == 3 and picture.shape[-1] == 3 and min(picture.shape[:2]) >= 200
        assert len(np.unique(picture.astype(int) @ (65536, 256, 1))) > 5  # colours: not blank
    assert first.shape == second.shape and (first != second).any()


@pytest.mark.parametrize("name", IDS)
def test_pictures_leave_the_rollout_as_it_is(name: str) -> None:
    env = make(name, render_mode="rgb_array")
    env.reset(seed=13)
    render(env)
    drawn = rollout(env, 13, 3)
    copy = pickle.loads(pickle.dumps(env))
    assert_same_rollouts(drawn, rollout(make(name), 13, 3))
    copy.reset(seed=13)
    assert copy.render().dtype == np.uint8
    copy.close()
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_human_mode_works_without_a_display(name: str) -> None:
    if is_mujoco(make(name)):
        pytest.skip("MuJoCo's window needs a display")
    env = make(name, render_mode="human")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.render() is None
    env.close()
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_collects_pictures(name: str) -> None:
    env = make(name, render_mode="rgb_array_list")
    if is_mujoco(env):
        render(gym.make(env.unwrapped.spec, render_mode="rgb_array"))
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert len(env.render()) == 2
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_unknown_render_modes_are_refused_or_warned_about(name: str) -> None:
    with pytest.raises((InputError, UserWarning), match="render_mode"):
        make(name, render_mode="crayon")


@pytest.mark.parametrize("name", IDS)
def test_documentation_has_the_standard_headings(name: str) -> None:
    text = load_env_creator(str(gym.spec(name).entry_point)).__doc__ or ""
    assert re.findall(r"^ *## (.+)$", text, flags=re.MULTILINE) == HEADINGS
    tables = re.findall(r"\| Num \|.*\|", text)
    assert len(tables) >= 2 and all("Unit" in table for table in tables)


@pytest.mark.parametrize("name", BATCHED)
def test_batched_copies_draw_nothing(name: str) -> None:
    with pytest.raises(InputError, match="render_mode"):
        gym.make_vec(name, num_envs=2, render_mode="rgb_array")
