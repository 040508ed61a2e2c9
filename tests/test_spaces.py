"""Where policies and environments meet: spaces, bounds and dtypes that do not fit are errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import RescaleAction

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents.fitting import as_data
from mpd_gym.agents.spaces import Spaces
from mpd_gym.boundary import check_spaces
from mpd_gym.collect.record import record
from mpd_gym.datasets import EpisodeSource
from mpd_gym.datasets.source import MemorySource
from mpd_gym.errors import ConfigError
from mpd_gym.evaluation.comparison import Entry, compare
from mpd_gym.evaluation.figures import rollout_frames
from mpd_gym.evaluation.open_loop import open_loop_error
from mpd_gym.evaluation.returns import evaluate
from mpd_gym.types import Episode


class Has:
    """A policy, or an environment, of two spaces; it counts its calls."""

    spec = None

    def __init__(self, observation: Any, action: Any) -> None:
        self.observation_space, self.action_space, self.calls = observation, action, 0

    def predict(self, *_: Any) -> Any:
        self.calls += 1
        return np.zeros(self.action_space.shape), None


def box(bound: float, *shape: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(-bound, bound, shape or (2,), dtype)


ONE, PIXELS = box(1.0), spaces.Box(0, 255, (64, 48, 3), np.uint8)
PART = spaces.Dict({"observation": ONE})
WHOLE = spaces.Dict({"observation": ONE, "desired_goal": ONE})


@pytest.mark.fault(
    "Spaces", "actions in ±1, environment of ±5", "refused; names both, RescaleAction"
)
@pytest.mark.fault(
    "Spaces", "another number of actions, a discrete environment", "refused; names both"
)
@pytest.mark.parametrize(
    ("own", "there", "message"),
    [
        (ONE, box(5.0), "RescaleAction"),
        (ONE, box(1.0, 3), r"shape (2,) against (3,)"),
        (ONE, spaces.Discrete(4), "other kinds"),
        (ONE, spaces.Box(np.float32([-1, -2]), np.float32([1, 1])), "bounds differ"),
        (spaces.Box(0, 9, (2,), np.uint8), spaces.Box(0, 9, (2,)), "uint8 against float32"),
        (spaces.Discrete(3), spaces.Discrete(4), "other kinds"),
        (spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2), "other kinds"),
    ],
)
def test_other_actions_are_refused(own: Any, there: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="mine: its action space is") as caught:
        check_spaces(Has(ONE, own), Has(ONE, there), "mine")
    for part in (str(own), str(there), message, "use it in the environment"):
        assert part in str(caught.value)


@pytest.mark.fault(
    "Spaces", "observations of another shape, or without a key", "refused; names both"
)
@pytest.mark.parametrize(
    ("own", "there", "message"),
    [
        (ONE, box(1.0, 4), "shape (2,) against (4,)"),
        (WHOLE, PART, "'desired_goal' is missing"),
        (ONE, PART, "other kinds"),
        (PART, ONE, "other kinds"),
        (PIXELS, spaces.Box(0, 255, (64, 48, 1), np.uint8), "against (64, 48, 1)"),
        (spaces.Dict({"observation": box(1.0, 3)}), PART, "'observation' shape (3,)"),
    ],
)
def test_other_observations_are_refused(own: Any, there: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="its observation space is") as caught:
        check_spaces(Has(own, ONE), Has(there, ONE))
    assert message in str(caught.value)


@pytest.mark.fault("Spaces", "observations that a wrapper rescales", "a warning; names both")
@pytest.mark.parametrize(
    ("own", "there", "message"),
    [
        (box(8.0), ONE, "bounds differ"),
        (box(np.inf), spaces.Box(0, 255, (2,), np.uint8), "float32 against uint8"),
        (spaces.Dict({"observation": box(2.0)}), WHOLE, "'observation' bounds differ"),
    ],
)
def test_another_scale_of_observations_gives_a_warning(own: Any, there: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        check_spaces(Has(own, ONE), Has(there, ONE))


@pytest.mark.fault("Spaces", "float64 for float32, no bounds, more keys, turned pictures", "plays")
@pytest.mark.parametrize(
    ("own", "there"),
    [
        (box(np.inf), ONE),
        (box(1.0, dtype=np.float64), ONE),
        (ONE, spaces.Box(np.float32([-1, -np.inf]), np.float32([1, np.inf]))),
        (PART, WHOLE),
        (spaces.Box(0, 255, (3, 64, 48), np.uint8), PIXELS),  # Stable-Baselines3 turns pictures
        (spaces.Discrete(3), spaces.Discrete(3)),
        (None, spaces.Text(4)),
    ],
)
def test_what_means_the_same_passes(own: Any, there: Any) -> None:
    check_spaces(Has(own, ONE), Has(there, ONE))
    check_spaces(Has(ONE, box(np.inf)), Has(ONE, box(5.0)))
    check_spaces(Has(ONE, None), Has(ONE, spaces.Discrete(2)))
    check_spaces(Has(ONE, ONE), gym.vector.SyncVectorEnv([Tiny] * 2))


class Tiny(gym.Env[Any, Any]):
    """Two numbers that follow the action."""

    observation_space, action_space = ONE, ONE
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, render_mode: str | None = None) -> None:
        pass

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.clip(np.float32(action), -1, 1), 0.0, False, False, {}

    def render(self) -> Any:
        return np.zeros((2, 2, 3), np.uint8)


def wider(render_mode: str | None = None) -> gym.Env[Any, Any]:
    bound = np.full(2, 5.0, np.float32)
    return RescaleAction(Tiny(), -bound, bound)


@pytest.fixture
def foreign() -> Iterator[str]:
    gym.register("test/Wider-v0", "test_spaces:wider", max_episode_steps=3)
    yield "test/Wider-v0"
    del gym.registry["test/Wider-v0"]


@pytest.mark.fault("Spaces", "a wrapper changes the bounds of actions", "an error before a step")
def test_every_meeting_is_checked_before_anything_is_played(foreign: str, tmp_path: Any) -> None:
    policy = Has(ONE, ONE)
    policy.planned = None  # type: ignore[attr-defined]
    meetings: dict[str, Any] = {
        "evaluate": lambda: evaluate(policy, foreign, seeds=1),
        "record": lambda: record(policy, foreign, "test/none-v0", episodes=1, seed=0),
        "made": lambda: record(lambda: policy, foreign, "test/made-v0", episodes=1, seed=0),
        "plans": lambda: open_loop_error({"mine": policy}, foreign, seeds=[0]),
        "compare": lambda: compare([Entry("one", policy)], foreign, folder=tmp_path),
        "film": lambda: next(rollout_frames(policy, foreign, seed=0)),
    }
    for name, meet in meetings.items():
        with pytest.raises(ConfigError, match=r"Box\(-1.0.*test/Wider-v0 has Box\(-5.0"):
            pytest.fail(f"{name}: {meet()}")
    assert policy.calls == 0


def test_agents_play_where_what_they_read_is_shown(lqr: MPDiffuserAgent) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_spaces(lqr, gym.make("LQR-v0"))
        check_spaces(lqr, gym.make_vec("LQR-v0", num_envs=2))
    with pytest.raises(ConfigError, match="Pendulum-v1"):
        check_spaces(lqr, gym.make("Pendulum-v1"))
    space = spaces.Dict({**WHOLE.spaces, "camera": PIXELS})
    agent = Has(space, ONE)
    agent.accepts = Spaces(space, ONE).accepts  # type: ignore[attr-defined]
    check_spaces(agent, Has(WHOLE, ONE))
    with pytest.raises(ConfigError, match="'desired_goal' is missing"):
        check_spaces(agent, Has(PART, ONE))


def episodes(name: str, observation: Any = ONE, action: Any = ONE) -> EpisodeSource:
    """Data of zeros in two spaces."""
    rows = np.zeros(8, bool)
    one = Episode(
        np.zeros((9, *observation.shape)), np.zeros((8, *action.shape)), np.zeros(8), rows, rows
    )
    spaces_of = {"observation_space": observation, "action_space": action}
    return MemorySource([one, one], spaces_of, name=name)


@pytest.mark.fault(
    "Data", "data sets of other actions or observations together", "refused; names both"
)
def test_data_of_other_spaces_do_not_train_together(lqr: MPDiffuserAgent) -> None:
    mine = episodes("own/a")
    for other in (episodes("own/b", action=box(5.0)), episodes("own/b", observation=box(1.0, 3))):
        for arguments in ({"dataset": [mine, other]}, {"dataset": mine, "dynamics_dataset": other}):
            with pytest.raises(
                ConfigError, match=r"^own/a: its .* space is .*, own/b has .* one env"
            ):
                MPDiffuserAgent.fit(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mpdiffuser: its action space is .* own/a has"):
        lqr.finetune_dynamics(mine, 1)
    assert as_data([mine, episodes("own/c", box(np.inf), box(1.0, dtype=np.float64))])
