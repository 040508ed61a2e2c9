"""Policies side by side: what is asked for is loaded, fits, plays the same, and is written down."""

from __future__ import annotations

import csv
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from helpers import tiny_agent

from mpd_gym.collect.scripted import PendulumSwingUp, SmoothRandom
from mpd_gym.errors import CheckpointError, ConfigError, FileError, InputError
from mpd_gym.evaluation import comparison
from mpd_gym.evaluation.comparison import (
    Entry,
    compare,
    load_entries,
    parse_entry,
    parse_options,
)
from mpd_gym.evaluation.returns import evaluate

PENDULUM = "ConstrainedPendulum-v0"
FAST = {"num_steps": 2, "action_chunk": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny agent for the LQR, one for the pendulum, and an SB3 zip for the pendulum."""
    from mpd_gym.collect.sb3 import train_sb3

    folder = tmp_path_factory.mktemp("agents")
    tiny_agent("LQR-v0").with_options(**FAST).save(folder / "lqr.safetensors")
    tiny_agent(PENDULUM).with_options(**FAST).save(folder / "pendulum.safetensors")
    train_sb3("ppo", PENDULUM, steps=64, seed=0, save_path=folder / "ppo.zip", progress=False,
              hyperparameters={"n_steps": 64, "batch_size": 32, "n_epochs": 1})  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("text", "label", "source", "options"),
    [
        ("a/b.safetensors", "b", "a/b.safetensors", {}),
        ("mine=a/b.safetensors", "mine", "a/b.safetensors", {}),
        ("LQR-v0", "LQR-v0", "LQR-v0", {}),
        ("sb3:a/b.zip", "sb3:b", "sb3:a/b.zip", {}),
        ("my sac=sb3:a/b.zip", "my sac", "sb3:a/b.zip", {}),
        ("runs/lr=0.1/b.safetensors", "b", "runs/lr=0.1/b.safetensors", {}),
        ("x=a,b.safetensors,num_steps=3", "x", "a,b.safetensors", {"num_steps": 3}),
        (
            "a/b.safetensors,composition=planner_only,deterministic=true",
            "b,composition=planner_only,deterministic=true",
            "a/b.safetensors",
            {"composition": "planner_only", "deterministic": True},
        ),
        (
            'x=b,condition_values={"final_state":[0,1]},dynamics_levels=[0,0.5]',
            "x",
            "b",
            {"condition_values": {"final_state": [0, 1]}, "dynamics_levels": [0, 0.5]},
        ),
    ],
)
def test_arguments_are_split(text: str, label: str, source: str, options: dict[str, Any]) -> None:
    assert parse_entry(text) == (label, source, options)


def test_a_file_whose_name_looks_like_a_label_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1.safetensors").touch()
    assert parse_entry("lr=0.1.safetensors")[:2] == ("lr=0.1", "lr=0.1.safetensors")


def test_options_need_a_name() -> None:
    with pytest.raises(ConfigError, match="name=value"):
        parse_options(["temperature"])


def test_options_are_json_or_python_literals_or_words() -> None:
    found = parse_options(["a=null", "b=None", "c=0.5", "d=true", "e=False", "f=ddim", "g=[1, 2]"])
    assert found == {
        "a": None,
        "b": None,
        "c": 0.5,
        "d": True,
        "e": False,
        "f": "ddim",
        "g": [1, 2],
    }


def test_one_file_with_other_options_is_another_policy(files: Path) -> None:
    path = files / "lqr.safetensors"
    entries = load_entries(
        [str(path), f"alone={path},composition=planner_only,temperature=0.1"],
        "LQR-v0",
        options={"temperature": 0.3},
    )
    whole, alone = (entry.policy.options for entry in entries)
    assert (whole.composition, whole.temperature) == ("alternating_matched", 0.3)
    assert (alone.composition, alone.temperature) == ("planner_only", 0.1)
    assert alone.action_chunk == 8, "what the file says stays"


def test_sb3_policies_are_deterministic_and_agents_are_not_unless_told(files: Path) -> None:
    agent, sac = str(files / "pendulum.safetensors"), f"sb3:{files / 'ppo.zip'}"
    for told, expected in ((None, [False, True]), (True, [True] * 2), (False, [False] * 2)):
        entries = load_entries([agent, sac], PENDULUM, deterministic=told)
        assert [entry.deterministic for entry in entries] == expected
    exact, noisy = load_entries(
        [f"a={agent},deterministic=true", f"b={sac},deterministic=false"], PENDULUM
    )
    assert (exact.deterministic, noisy.deterministic) == (True, False)


def test_the_agent_that_ships_for_an_environment(files: Path, monkeypatch: Any) -> None:
    shipped = {"LQR-v0": files / "lqr.safetensors"}
    monkeypatch.setattr("mpd_gym.agents.serialization.shipped_agents", lambda: shipped)
    for name in ("shipped", "LQR-v0"):
        assert load_entries([name], "LQR-v0")[0].label == name
    with pytest.raises(CheckpointError, match="shipped are"):
        load_entries(["shipped"], PENDULUM)


@pytest.mark.fault(
    "Evaluation",
    "compare with policies that do not exist or do not fit",
    "refused before anything is played",
)
@pytest.mark.parametrize(
    ("texts", "env_id", "message"),
    [
        (["{}/lqr.safetensors"], PENDULUM, r"observation space is Box\(.*2.*Constrained.* has Box"),
        (["{}/nothing.safetensors"], "LQR-v0", "no such file"),
        (["sb3:{}/nothing.zip"], "LQR-v0", "no such file"),
        (["sb3:{}/ppo.zip"], "LQR-v0", "trained on"),
        (["{}/ppo.zip"], PENDULUM, "zip write sb3:"),
        (["sb3:{}/ppo.zip,temperature=1"], PENDULUM, "only the options deterministic and"),
        (["{}/lqr.safetensors,temprature=1"], "LQR-v0", "Did you mean 'temperature'"),
        (["{}/lqr.safetensors,deterministic=2"], "LQR-v0", "true or false"),
        (["{}/lqr.safetensors", "{}/lqr.safetensors"], "LQR-v0", "appears twice"),
        (["{}/lqr.safetensors"], "LQR-v1", "LQR-v1 cannot be made"),
        (["{}/lqr.safetensors"], "nothing_of_the_kind:LQR-v0", "cannot be made"),
        (["{}/lqr.safetensors"], "CarUMaze-v0", "use it in the environment"),
    ],
)
def test_what_cannot_play_is_refused(files: Path, texts: Any, env_id: str, message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
        load_entries([text.format(files) for text in texts], env_id)
    assert "\n" not in str(caught.value)


def test_arguments_of_the_environment_count(files: Path) -> None:
    path = str(files / "lqr.safetensors")
    with pytest.raises(ConfigError, match="cannot be made"):
        load_entries([path], "LQR-v0", env_kwargs={"gravity": 3})
    system = {"A": np.eye(3).tolist(), "B": np.eye(3).tolist()}
    with pytest.raises(ConfigError, match="observation space"):
        load_entries([path], "LQR-v0", env_kwargs=system)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_play_the_same_seeds_and_every_episode_is_written(tmp_path: Path) -> None:
    swing = PendulumSwingUp(6.5)
    wild = PendulumSwingUp(7.5)
    entries = [Entry("tame", swing), Entry("twin", swing), Entry("wild", wild)]
    found = compare(entries, PENDULUM, seeds=range(3, 9), num_envs=4, folder=tmp_path, film=False)
    alone = evaluate(swing, PENDULUM, seeds=range(3, 9))
    np.testing.assert_array_equal(found["tame"].returns, found["twin"].returns)
    np.testing.assert_allclose(found["tame"].returns, alone.returns)
    assert found["wild"].costs.sum() > 0 == found["tame"].costs.sum()
    episodes = rows(tmp_path / "episodes.csv")
    assert [row["policy"] for row in episodes] == ["tame"] * 6 + ["twin"] * 6 + ["wild"] * 6
    last = episodes[12:]
    assert [int(row["seed"]) for row in last] == list(range(3, 9))
    for name, values in (("return", found["wild"].returns), ("cost", found["wild"].costs)):
        np.testing.assert_array_equal([float(row[name]) for row in last], values)
    assert [row["success"] for row in last] == [str(flag) for flag in found["wild"].successes]
    summary = rows(tmp_path / "summary.csv")
    assert [row["policy"] for row in summary] == ["tame", "twin", "wild"]
    interval = found["wild"].summary()["violation"]
    assert float(summary[2]["violation"]) == interval.mean == np.mean(found["wild"].costs > 0)
    assert float(summary[2]["violation_high"]) == interval.high
    assert float(summary[0]["ms_p99"]) >= float(summary[0]["ms_p50"]) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes.csv", "summary.csv"]


def test_times_are_those_of_one_environment_alone(tmp_path: Path) -> None:
    sizes = []

    class Counting:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            sizes.append(np.shape(observation)[:-1])
            return np.zeros((*np.shape(observation)[:-1], 1)), None

    found = compare([Entry("x", Counting())], PENDULUM, seeds=range(4), num_envs=4)["x"]
    assert sizes[:200] == [(4,)] * 200
    assert sizes[200] == () and len(found.seconds) == 200 == len(sizes) - 201
    assert all(np.prod(size, dtype=int) == 1 for size in sizes[200:])


def test_policies_by_name_are_deterministic_unless_they_plan() -> None:
    told: dict[str, set[bool]] = {"clone": set(), "planner": set()}

    class Noting:
        def __init__(self, name):
            self.name = name

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            told[self.name].add(deterministic)
            return np.zeros((*np.shape(observation)[:-1], 1)), None

    class Planning(Noting):
        def plan(self, observation):
            raise AssertionError

    found = compare({"clone": Noting("clone"), "planner": Planning("planner")}, PENDULUM, seeds=2)
    assert told == {"clone": {True}, "planner": {False}}
    np.testing.assert_array_equal(found["clone"].seeds, [0, 1])
    np.testing.assert_array_equal(found["clone"].returns, found["planner"].returns)


def test_the_film_shows_every_policy_with_its_name(
    tmp_path: Path, files: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(comparison, "MAX_FRAMES", 12)
    path = files / "pendulum.safetensors"
    entries = load_entries([f"a={path}", f"b={path},composition=planner_only"], PENDULUM)
    compare(entries, PENDULUM, seeds=[5], folder=tmp_path)
    frames = iio.imread(tmp_path / "side-by-side.gif")
    assert frames.shape[1:] == (250 + 24, 2 * 250 + 8, 3) and len(frames) == 12
    caption = frames[0, :24].min(axis=-1)
    assert caption[:, :250].min() < 150 and caption[:, 258:].min() < 150
    amber = (frames[2].astype(int)[..., 0] - frames[2][..., 2]) > 60
    rows, columns = np.indices(amber.shape)
    for middle in (125, 258 + 125):
        distance = np.hypot(rows - 24 - 125, columns - middle)
        assert amber[(distance > 45) & (distance < 90)].sum() > 30  # the planned rods


class Filling(PendulumSwingUp):
    """Leaves no room for files larger than 1 KiB once it plays."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        return super().predict(*args, **kwargs)


@pytest.fixture
def _room_again() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.fault(
    "Files",
    "a disk that is full after the episodes of compare",
    "a warning; the measures are returned, and the files that fit are there",
)
@pytest.mark.usefixtures("_room_again")
def test_a_full_disk_costs_no_measure(tmp_path: Path) -> None:
    def played(**kwargs: Any) -> Any:
        entries = [Entry("x", Filling(6.5))]
        return compare(entries, PENDULUM, seeds=40, num_envs=40, film=False, **kwargs)

    with pytest.warns(UserWarning, match=r"episodes.csv: cannot be written .*File too large"):
        assert len(played(folder=tmp_path)["x"].returns) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]
    with pytest.raises(FileError, match=r"probe: cannot be written"):
        played(folder=tmp_path)


def test_what_one_policy_shows_to_be_reported_is_nothing_for_another() -> None:
    class Goes:
        def __init__(self, action: float) -> None:
            self.action = action

        def predict(self, observation: Any, *_: Any, **__: Any) -> Any:
            return np.full((*np.shape(observation)[:-1], 1), self.action), None

    gym.register("test/Once-v0", lambda **_: Once(gym.make(PENDULUM)))
    try:
        found = compare({"still": Goes(0.0), "goes": Goes(1.0)}, "test/Once-v0", seeds=3)
    finally:
        del gym.registry["test/Once-v0"]
    assert found["goes"].successes_ever.all() and found["goes"].costs.sum() == 3
    np.testing.assert_array_equal(found["still"].successes_ever, [False] * 3)
    np.testing.assert_array_equal(found["still"].costs, [0.0] * 3)


class Once(gym.Wrapper[Any, Any, Any, Any]):
    """Reports success and cost once, if the action is positive."""

    def reset(self, **kwargs: Any) -> Any:
        self.told = False
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        *outcome, _ = super().step(action)
        tells = action[0] > 0 and not self.told
        self.told |= tells
        return *outcome, {"success": True, "cost": 1.0} if tells else {}


def test_the_same_call_gives_the_same_numbers(files: Path) -> None:
    def play() -> Any:
        entries = load_entries([str(files / "lqr.safetensors")], "LQR-v0")
        return compare(entries, "LQR-v0", seeds=range(3))["lqr"].returns

    np.testing.assert_array_equal(play(), play())


@pytest.mark.fault(
    "Evaluation", "a film that cannot be written", "refused before anything is played"
)
def test_what_cannot_be_filmed_is_refused_before_anything_is_played(
    tmp_path: Path, monkeypatch: Any
) -> None:
    class Blind(gym.Wrapper):
        metadata = {"render_modes": []}  # noqa: RUF012

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("played")

    gym.register("test/Blind-v0", lambda **_: Blind(gym.make("LQR-v0")))
    try:
        monkeypatch.setattr(comparison, "evaluate", forbidden)
        env = gym.make("LQR-v0")
        entries = [Entry("x", SmoothRandom(env.action_space, env.observation_space))]
        with pytest.raises(ConfigError, match="no pictures"):
            compare(entries, "test/Blind-v0", seeds=[0], folder=tmp_path)
        with pytest.raises(InputError, match="seeds"):
            compare(entries, "LQR-v0", seeds=[])
        with pytest.raises(ConfigError, match="Nope-v0 cannot be made"):
            compare(entries, "Nope-v0", seeds=[0], folder=tmp_path / "new")
        assert not (tmp_path / "new").exists()
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match=r"file/.*cannot be written \(.*choose another folder"):
            compare(entries, "LQR-v0", seeds=[0], folder=tmp_path / "file")
        for nobody in ({}, [], None, [entries[0].policy]):
            with pytest.raises(ConfigError, match="policies: expected at least one"):
                compare(nobody, "LQR-v0", seeds=[0])  # type: ignore[arg-type]
    finally:
        del gym.registry["test/Blind-v0"]
