"""Recording: the data set holds what happened, and bad policies are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import recorders
from minari.cli import app
from recorders import (
    ENV,
    ID,
    Fixed,
    Noisy,
    Sometimes,
    assert_same,
    quiet,
    short,
)
from typer.testing import CliRunner

from mpd_gym.collect.record import (
    DatasetInfo,
    Progress,
    Views,
)
from mpd_gym.datasets.episodes import load_episodes, recover_env
from mpd_gym.errors import ConfigError, DataError, InputError, SolverError
from mpd_gym.evaluation.figures import dataset_table


def test_episodes_are_what_the_environment_gives() -> None:
    quiet(Noisy(), ENV, ID, episodes=20, seed=1, env_kwargs={"gain": [1.5, 0.5]})
    source = load_episodes(ID)
    env = recover_env(source)
    assert len(source) == 20
    for episode in source:
        observation, _ = env.reset(seed=episode.seed)
        np.testing.assert_array_equal(observation, episode.observations[0])
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, info = env.step(action)
            np.testing.assert_array_equal(observation, episode.observations[t + 1])
            assert (reward, terminated, truncated) == (
                episode.rewards[t],
                episode.terminations[t],
                episode.truncations[t],
            )
            assert info["cost"] == episode.costs[t]
            assert info["is_success"] == episode.successes[t]
        assert terminated or truncated
    assert len({episode.seed for episode in source}) == 20
    assert 3 <= source.lengths.min() < source.lengths.max() == recorders.LIMIT


def test_plain_minari_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    info = DatasetInfo(
        author="A. Author",
        author_email="a@b.org",
        code_permalink="https://example.org/x",
        algorithm_name="noise",
        description="Marked steps.",
        ref_min_score=-10.0,
        ref_max_score=30.0,
    )
    made = quiet(Noisy(), ENV, ID, episodes=5, seed=0, info=info, metadata={"budget": 3})
    dataset = minari.load_dataset(ID)
    assert dataset.total_steps == sum(len(e) for e in made)
    assert_same(dataset, load_episodes(ID))
    first = dataset[0]
    assert first.infos["cost"].shape == first.infos["is_success"].shape == (len(first) + 1,)
    assert first.infos["cost"][0] == 0.0
    np.testing.assert_array_equal(first.infos["cost"][1:], (1 + np.arange(len(first))) % 2)
    assert minari.get_normalized_score(dataset, np.array(10.0)) == pytest.approx(0.5)
    known = dataset.storage.metadata
    assert known["author"] == {"A. Author"} and known["algorithm_name"] == "noise"
    assert known["budget"] == 3 and known["collection"]["arguments"]["seed"] == 0
    assert not known["jpeg_encoding"]
    assert dataset.env_spec.id == ENV and dataset.env_spec.max_episode_steps == recorders.LIMIT
    monkeypatch.setenv("COLUMNS", "200")
    for command in (["list", "local"], ["show", ID]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "marked-v0" in result.output and "A. Author" in result.output


def test_nested_observations() -> None:
    quiet(Noisy(), "MpdTests/Nested-v0", ID, episodes=3, seed=0)
    episode = load_episodes(ID)[0]
    assert set(episode.observations) == {"observation", "goals/near", "goals/far"}
    near = episode.observations["goals/near"]
    np.testing.assert_array_equal(near[:, 0], episode.observations["observation"][:, 0] + 1)
    raw = minari.load_dataset(ID)[0].observations
    np.testing.assert_array_equal(raw["goals"]["near"], near)


def test_environments_without_costs() -> None:
    quiet(Noisy(), "Pendulum-v1", ID, episodes=1, seed=0, env_kwargs={"max_episode_steps": 7})
    source = load_episodes(ID)
    assert source[0].costs is None and source[0].successes is None
    assert len(source[0]) == 7 and source[0].truncations[-1]
    assert recover_env(source).spec.max_episode_steps == 7
    assert repr(minari.load_dataset(ID)[0])  # needs infos to be a dict


@pytest.mark.fault(
    "Recording",
    "costs and success that infos hold only where they occur",
    "recorded, 0 at the other steps and in episodes without any; info shows success ever",
)
def test_what_occurs_in_some_episodes_is_recorded_in_all() -> None:
    kwargs = {"rare": True}
    quiet(Noisy(), ENV, ID, episodes=12, seed=0, env_kwargs=kwargs, processes=2)
    episodes = list(load_episodes(ID))
    late = [len(one) > 8 for one in episodes]
    assert any(late) and not all(late)
    for episode in episodes:
        t = 1 + np.arange(len(episode))
        np.testing.assert_array_equal(episode.successes, t == 8)
        np.testing.assert_array_equal(episode.costs, 3.0 * (t == 9))
    shown = {column.header: list(column.cells) for column in dataset_table([ID]).columns}
    for name, count in (("success", lambda flags: flags[-1]), ("success ever", np.any)):
        assert shown[name] == [f"{np.mean([count(one.successes) for one in episodes]):.1%}"]
    assert shown["success"] != shown["success ever"]


def test_frames_are_stored_once_and_stacked_when_read() -> None:
    env_id = "MpdTests/Frames-v0"
    quiet(Noisy(), env_id, ID, episodes=4, seed=0, views=Views(frame_stack=4))
    raw = minari.load_dataset(ID)
    assert raw[0].observations.shape == (len(raw[0]) + 1, 8, 8)
    source = load_episodes(ID)
    assert source.metadata["observation_space"] == gym.make(env_id).observation_space
    env = gym.make(env_id)
    for index, episode in enumerate(source):
        shown = [env.reset(seed=episode.seed)[0]]
        shown += [env.step(action)[0] for action in episode.actions]
        np.testing.assert_array_equal(episode.observations, np.stack(shown))
        for start in range(len(episode)):
            window = source.window(index, start, len(episode))
            np.testing.assert_array_equal(window.observations, np.stack(shown[start:]))
    single = load_episodes(ID, stack_frames=False)
    np.testing.assert_array_equal(single[0].observations, source[0].observations[:, -1])
    with pytest.raises(ConfigError, match="frame_stack: expected the length"):
        quiet(Noisy(), env_id, "tests/b-v0", episodes=1, seed=0, views=Views(frame_stack=3))


def test_views_decide_what_is_stored_and_shown(tmp_path: Path) -> None:
    views = Views(
        stored=recorders.state_of,
        shown=recorders.state_of,
        space=recorders.Marked.observation_space,
    )
    log = tmp_path / "log"
    quiet(recorders.Watch(log), "MpdTests/Frames-v0", ID, episodes=2, seed=0, views=views)
    quiet(Noisy(), ENV, "tests/b-v0", episodes=2, seed=0)
    assert set(log.read_text().split("\n")) == {"(2,)", ""}
    assert_same(load_episodes(ID), load_episodes("tests/b-v0"))
    with pytest.raises(ConfigError, match="space"):
        Views(stored=recorders.state_of)


def test_arguments_are_recorded_as_plain_values() -> None:
    quiet(Noisy(), ENV, ID, episodes=1, seed=0, env_kwargs={"gain": np.eye(2)})
    source = load_episodes(ID)
    assert source.metadata["env_kwargs"] == {"gain": [[1.0, 0.0], [0.0, 1.0]]}
    np.testing.assert_array_equal(recover_env(source).unwrapped.gain, np.eye(2))
    with pytest.raises(ConfigError, match="env_kwargs: expected numbers"):
        quiet(Noisy(), ENV, "tests/b-v0", episodes=1, seed=0, env_kwargs={"gain": object()})


def test_environments_that_cannot_be_named_are_refused() -> None:
    gym.register("MpdTests/Nameless-v0", recorders.Marked)
    with pytest.raises(ConfigError, match="string entry point"):
        quiet(Noisy(), "MpdTests/Nameless-v0", ID, episodes=1, seed=0)
    with pytest.raises(ConfigError, match="action space must be a Box"):
        quiet(Noisy(), "CartPole-v1", ID, episodes=1, seed=0)
    for malformed in ("no version", "noversion", "n/name-v0", "../name-v0"):
        with pytest.raises(ConfigError, match="expected 'name-v0'"):
            quiet(Noisy(), ENV, malformed, episodes=1, seed=0)
    with pytest.raises(ConfigError, match="episodes"):
        quiet(Noisy(), ENV, ID, episodes=0, seed=0)


@pytest.mark.fault(
    "Recording",
    "a policy whose actions are NaN, outside the box or of another shape",
    "refused before the environment sees them",
)
@pytest.mark.parametrize(
    "action", [[np.nan], [np.inf], [2.5], [0.0, 0.0], [[0.0]]], ids=str
)  # fmt: skip
def test_bad_actions_are_refused(action: Any) -> None:
    with pytest.raises(InputError, match="policy: expected a finite action"):
        quiet(Fixed(action), ENV, ID, episodes=1, seed=0)


def test_rounding_at_a_bound_is_clipped() -> None:
    quiet(Fixed([2.000001]), ENV, ID, episodes=1, seed=0)
    assert (load_episodes(ID)[0].actions == np.float32(2.0)).all()


@pytest.mark.fault(
    "Recording", "an environment that observes NaN", "refused; earlier episodes are kept"
)
def test_bad_observations_are_refused_and_earlier_episodes_kept() -> None:
    with pytest.raises(DataError, match=r"'observations' is not finite") as caught:
        quiet(Noisy(), ENV, ID, episodes=3, seed=0, env_kwargs={"nan_at": 12})
    assert caught.value.step == 12
    assert any("run the same again" in note for note in caught.value.__notes__)


@pytest.mark.fault(
    "Policies", "an object without predict", "refused; the message says what is expected"
)
@pytest.mark.parametrize("policy", [dict, None, "agent.safetensors"])
def test_policy_must_have_predict(policy: Any) -> None:
    with pytest.raises(ConfigError, match="policy: expected an object with predict"):
        quiet(policy, ENV, ID, episodes=1, seed=0)


@pytest.mark.parametrize("raises", [False, True])
def test_unsolved_episodes_are_replaced_and_counted(raises: bool) -> None:
    seen: list[Progress] = []
    policy = Sometimes(raises=raises)
    quiet(policy, ENV, ID, episodes=20, seed=0, on_stored=seen.append)
    known = load_episodes(ID).metadata["collection"]
    assert len(load_episodes(ID)) == seen[-1].stored == 20
    assert known["unsolved"] == seen[-1].unsolved > 0 == known["rejected"]
    assert seen[-1].steps == load_episodes(ID).lengths.sum()


@pytest.mark.fault("Recording", "a solver that fails in every episode", "SolverError after a limit")
def test_too_many_unsolved_episodes() -> None:
    with pytest.raises(SolverError, match=r"\d episodes were not solved.*max_discarded allows 3"):
        quiet(Sometimes(share=1.0), ENV, ID, episodes=20, seed=0, max_discarded=3)
    solved = partial(Sometimes, share=0.2)
    with pytest.raises(SolverError):
        quiet(solved, ENV, "tests/b-v0", episodes=20, seed=0, max_discarded=0)
    quiet(solved, ENV, "tests/b-v0", episodes=20, seed=0, max_discarded=20)  # goes on
    assert len(load_episodes("tests/b-v0")) == 20


def test_filter() -> None:
    quiet(Noisy(), ENV, ID, episodes=10, seed=0, accept=short, max_discarded=100)
    source = load_episodes(ID)
    assert source.lengths.max() < 9 and source.metadata["collection"]["rejected"] > 0
    with pytest.raises(InputError, match=r"accept: 0 episodes were not solved and \d were refused"):
        quiet(
            Noisy(), ENV, "tests/b-v0", episodes=9, seed=0, accept=lambda _: False, max_discarded=2
        )
