"""The command line, and every recipe in miniature through it."""

from __future__ import annotations

import csv
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from helpers import tiny_agent
from typer.testing import CliRunner

from mpd_gym import MPDiffuserAgent, cli, load_agent
from mpd_gym.agents import AGENTS
from mpd_gym.cli.learning import _config
from mpd_gym.collect.recipes import RECIPES
from mpd_gym.collect.record import record
from mpd_gym.collect.scripted import PendulumSwingUp
from mpd_gym.datasets import load_episodes
from mpd_gym.envs.image_pendulum import draw
from mpd_gym.errors import ConfigError, DataError, FileError
from mpd_gym.latent import ImageEncoder

runner = CliRunner()


def run(*arguments: str) -> str:
    result = runner.invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli.console, "width", 200)


def collected(name: str, fraction: str) -> minari.MinariDataset:
    run("collect", name, "--fraction", fraction, "--processes", "1", "--id", "me/try-v0")
    return minari.load_dataset("me/try-v0")


def test_collect_lists_what_there_is() -> None:
    listed = run("collect")
    assert all(name in listed for name in RECIPES)


@pytest.mark.parametrize("percent", [10, 20, 30, 40, 80])
def test_lqr_recipes(percent: int) -> None:
    data = collected(f"mpd_gym/lqr/noisy-p{percent}-v0", "0.02")
    assert (data.total_episodes, data.total_steps) == (20, 4000)
    gain = data.recover_environment().unwrapped.optimal_gain
    noisy = [
        np.abs(episode.actions - episode.observations[:-1] @ gain.T)[:, 0] > 1e-5
        for episode in data.iterate_episodes()
    ]
    assert np.mean(noisy) == pytest.approx(percent / 100, abs=0.03)


def test_random_driving_fills_its_episodes() -> None:
    data = collected("mpd_gym/car-umaze/random-v0", "0.01")
    lengths = [len(episode) for episode in data.iterate_episodes()]
    assert lengths == [64] * 10


@pytest.mark.slow
def test_car_expert_recipe() -> None:
    data = collected("mpd_gym/car-umaze/expert-v0", "0.002")
    for episode in data.iterate_episodes():
        assert episode.infos["is_success"][-1]
        assert not episode.terminations.any()
        assert np.abs(episode.observations["observation"][-1, 3]) < 0.05  # stands still


@pytest.mark.slow
def test_noisy_driving_arrives_all_the_same() -> None:
    data = collected("mpd_gym/car-umaze/noisy-v0", "0.003")
    for episode in data.iterate_episodes():
        assert len(episode) == 64 and not episode.terminations.any()
        assert (
            np.linalg.norm(
                episode.observations["achieved_goal"][-1] - episode.observations["desired_goal"][-1]
            )
            < 1
        )


@pytest.mark.slow
def test_constrained_pendulum_recipe(tmp_path: Path) -> None:
    data = collected("mpd_gym/constrained-pendulum/mixed-v0", "0.02")
    assert data.total_episodes == 10 + 6
    for episode in data.iterate_episodes():
        speed = np.abs(episode.observations[:, 2])
        np.testing.assert_array_equal(episode.infos["cost"][1:] > 0, speed[1:] > 6.5)
    zips = sorted(path.name for path in (tmp_path / "outputs/policies").glob("*sac*-v0.zip"))
    assert zips == ["sac-ConstrainedPendulum-v0.zip", "safe-sac-ConstrainedPendulum-v0.zip"]


@pytest.mark.slow
def test_image_pendulum_recipe_stores_each_frame_once() -> None:
    data = collected("mpd_gym/image-pendulum/replay-v0", "0.02")
    assert data.observation_space.shape == (64, 64)
    episode = load_episodes("me/try-v0").episode(0)
    assert isinstance(episode.observations, np.ndarray)
    assert episode.observations.shape == (201, 4, 64, 64)
    stored = next(iter(data.iterate_episodes([0]))).observations
    np.testing.assert_array_equal(episode.observations[5], stored[2:6])
    np.testing.assert_array_equal(episode.observations[0], np.repeat(stored[:1], 4, axis=0))
    assert stored[0].max() == draw(0.0).max()


@pytest.mark.slow
def test_latents_are_collected_and_agents_of_them_take_frames(tmp_path: Path) -> None:
    images = "mpd_gym/image-pendulum/replay-v0"
    run("collect", images, "--fraction", "0.02")
    small = ("--steps", "10", "--output", "e.safetensors")
    assert "held_out" in run("train-encoder", images, *small)
    run("train-encoder", images, *small)  # it is finished, and only shown again
    assert ImageEncoder.load("e.safetensors").history["steps"] == 10
    run("collect", "mpd_gym/latent-pendulum/replay-v0")
    run("train", "LatentPendulum-v0", "--steps", "12", "--no-parallel", "--output", "a.safetensors")
    agent = MPDiffuserAgent.load("a.safetensors", num_candidates=1, num_steps=2)
    frames = gym.make("ImagePendulum-v0").reset(seed=0)[0]
    assert agent.predict(frames)[0].shape == (1,)


def test_info_shows_returns_lengths_and_success() -> None:
    assert "No data set" in run("info")
    collected("mpd_gym/car-umaze/random-v0", "0.004")
    shown = run("info")
    assert "me/try-v0" in shown
    assert "64" in shown and "0.0%" in shown
    assert "me/try-v0" in run("info", "me/try-v0")


def test_train_evaluate_and_info_of_an_agent(tmp_path: Path) -> None:
    collected("mpd_gym/lqr/noisy-p10-v0", "0.02")
    options = ("--steps", "12", "--seed", "3", "--no-parallel", "--output", "a.safetensors")
    options = (*options, "--precision", "bf16")
    output = run("train", "me/try-v0", *options)
    assert "planner model" in output and "final_state" in output
    assert "Box(-10.0" in output and "steps 12" in output and "diffusion levels" in output
    agent = MPDiffuserAgent.load(tmp_path / "a.safetensors")
    assert (agent.config.seed, agent.history["planner"]["steps"]) == (3, 12)
    assert agent.config.training.precision == "bf16"
    assert "dynamics model" in run("info", "a.safetensors")
    assert "dynamics model" in run("info", "LQR-v0")
    fast = ("-o", "action_chunk=32", "-o", "num_steps=2", "-o", "composition=planner_only")
    shown = run("evaluate", "LQR-v0", "a.safetensors", "--episodes", "2", *fast)
    assert "return" in shown and "a" in shown.split()


def test_steps_and_seed_are_those_of_each_model() -> None:
    config = _config("mpdiffuser", "laptop", "ConstrainedPendulum-v0", 5, 120, "bf16")
    for training in (config.training, config.regressor_training):
        assert (training.steps, training.seed) == (120, 5)
        assert training.warmup_steps < 120
    assert (config.training.precision, config.regressor_training.precision) == ("bf16", "fp32")
    usual = _config("mpdiffuser", "laptop", "ConstrainedPendulum-v0", 5, None, "fp32")
    assert usual.training.steps > 1000


def test_every_method_can_be_chosen() -> None:
    shown = run("train", "--help")
    assert all(name in shown for name in AGENTS)
    with pytest.raises(ConfigError, match="Did you mean 'dmpc'"):
        run("train", "LQR-v0", "--method", "dmcp")


@pytest.mark.parametrize(
    "command",
    [("evaluate", "LQR-v0", "shipped"), ("train", "LQR-v0"), ("train-encoder",)],
    ids=lambda command: command[0],
)
def test_negative_seeds_are_refused(command: tuple[str, ...]) -> None:
    result = runner.invoke(cli.app, [*command, "--seed", "-1"])
    assert result.exit_code == 2 and "greater than or equal to 0" in result.output


def test_an_environment_stands_for_its_usual_data(tmp_path: Path) -> None:
    run("collect", "mpd_gym/lqr/noisy-p40-v0", "--fraction", "0.01", "--processes", "1")
    run("train", "LQR-v0", "--steps", "12", "--no-parallel")
    assert (tmp_path / "outputs/agents/LQR-v0-laptop-seed0.safetensors").exists()
    run("train", "LQR-v0", "--method", "behavior_cloning", "--steps", "12", "--no-parallel")
    peer = tmp_path / "outputs/agents/behavior_cloning-LQR-v0-laptop-seed0.safetensors"
    assert load_agent(peer).name == "behavior_cloning"
    with pytest.raises(DataError, match="car-umaze"):
        run("train", "CarUMaze-v0")


def test_evaluate_compares_with_a_stable_baselines_policy(tmp_path: Path) -> None:
    from mpd_gym.collect.sb3 import train_sb3

    train_sb3("ppo", "LQR-v0", steps=64, seed=0, save_path="ppo.zip", progress=False,
              hyperparameters={"n_steps": 64, "batch_size": 32, "n_epochs": 1})  # fmt: skip
    tiny_agent("LQR-v0").with_options(action_chunk=8).save("tiny.safetensors")
    shown = run("evaluate", "LQR-v0", "tiny.safetensors", "sb3:ppo.zip", "--episodes", "2")
    assert "tiny" in shown and "sb3:ppo" in shown
    assert not (tmp_path / "outputs").exists()
    few = ("--episodes", "2", "--seed", "7", "-o", "num_steps=2", "-e", "start_range=[0.1,0.2]")
    policies = ("mine=tiny.safetensors", "alone=tiny.safetensors,composition=planner_only")
    shown = run("compare", "LQR-v0", *policies, "sb3:ppo.zip", *few, "--no-gif")
    assert all(name in shown for name in ("mine", "alone", "sb3:ppo", "seeds 7 to 8"))
    folder = tmp_path / "outputs/compare/LQR-v0"
    with (folder / "episodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("mine", "alone", "sb3:ppo") for seed in ("7", "8")
    ]
    assert len({row["return"] for row in rows if row["seed"] == "7"}) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["episodes.csv", "summary.csv"]


def test_plans_are_compared_with_what_happens(tmp_path: Path) -> None:
    shown = run("plans", "LQR-v0", "shipped", "alone=shipped,composition=planner_only",
                "--episodes", "3")  # fmt: skip
    assert "good for" in shown and "of 32" in shown
    folder = tmp_path / "outputs/plans/LQR-v0"
    with (folder / "plan-errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 32 * 2 and {row["policy"] for row in rows} == {"shipped", "alone"}
    assert (folder / "plan-errors.png").stat().st_size > 10_000


@pytest.mark.fault(
    "Files", "a film of the command compare that cannot be written", "the table, then one line"
)
def test_the_table_is_shown_though_a_file_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise FileError("film: no space left")

    tiny_agent("LQR-v0").save("tiny.safetensors")
    monkeypatch.setattr("mpd_gym.evaluation.comparison.save_gif", full)
    command = "mpd-gym compare LQR-v0 tiny.safetensors --episodes 2 -o num_steps=1"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    printed = capsys.readouterr().out
    assert printed.index("tiny") < printed.index("error: film: no space") and "Files" not in printed


@pytest.mark.fault(
    "Evaluation", "bad arguments of commands", "one line and exit code 1, no traceback"
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path("file").touch()
    for arguments, message in (
        (["collect", "mpd_gym/lqr/noisy-p41-v0"], "Did you mean"),
        (["evaluate", "LQR-v0", "nothing.safetensors"], "no such file"),
        (["evaluate", "LQR-v0", "x", "-o", "temperature"], "name=value"),
        (["compare", "LQR-v0", "sb3:nothing.zip"], "no such file"),
        (["compare", "LQR-v7", "x"], "LQR-v7 cannot be made"),
        (["evaluate", "LQR-v0", 300 * "x"], "no such file"),
        (["info", f"{300 * 'x'}.safetensors"], "no such file"),
        (["evaluate", "LQR-v0", "shipped", "-e", f"x={5000 * '['}"], "nested too deep"),
        (["evaluate", "LQR-v0", "shipped", "-e", "start_range=x"], "start_range"),
        (
            ["collect", "mpd_gym/constrained-pendulum/mixed-v0", "--policies", "file"],
            "cannot be written",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["mpd-gym", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        printed = " ".join(capsys.readouterr().out.split())  # lines break anywhere
        assert message in printed and "Traceback" not in printed


def test_extras_in_errors_keep_their_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("minari.download_dataset", offline)
    monkeypatch.setattr("sys.argv", ["mpd-gym", "train", "D4RL/nothing/of-the-kind-v0"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'minari[hdf5,hf]'" in " ".join(capsys.readouterr().out.split())


def test_narrow_tables_of_data_sets_cut_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PendulumSwingUp()
    record(policy, "Pendulum-v1", "narrow/swing-v0", episodes=2, seed=0, progress=False)
    monkeypatch.setattr(cli.console, "width", 60)
    shown = run("info", "narrow/swing-v0")
    assert "…" not in shown and "e+" not in shown
    assert "cost" not in shown, "columns without content are left out"
    assert "200 ±" in shown and "400" in shown


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # given back
    monkeypatch.setattr(sys, "argv", ["mpd-gym", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = warnings.formatwarning(UserWarning("a glitch"), UserWarning, "file.py", 3)
    assert text == "warning: a glitch\n"
