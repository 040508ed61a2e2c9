"""The demonstration plays what ships, against everything beside it, and says what is missing."""

from __future__ import annotations

import csv
from pathlib import Path

import imageio.v3 as iio
import pytest
from helpers import tiny_agent
from typer.testing import CliRunner

from mpd_gym import cli
from mpd_gym.errors import CheckpointError
from mpd_gym.evaluation import comparison, demo

PENDULUM = "ConstrainedPendulum-v0"
FAST = {"num_steps": 2, "action_chunk": 8}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny agents for two environments and an SB3 policy in place of the shipped ones."""
    from mpd_gym.collect.sb3 import train_sb3

    folder = tmp_path / "pretrained"
    for env_id in ("LQR-v0", PENDULUM):
        tiny_agent(env_id).with_options(**FAST).save(folder / f"{env_id}.safetensors")
    train_sb3("ppo", PENDULUM, steps=64, seed=0, save_path=folder / f"safe-ppo-{PENDULUM}.zip",
              progress=False,
              hyperparameters={"n_steps": 64, "batch_size": 32, "n_epochs": 1})  # fmt: skip
    files = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    monkeypatch.setattr(demo, "shipped_agents", lambda: files)
    monkeypatch.setattr(comparison, "MAX_FRAMES", 10)
    monkeypatch.chdir(tmp_path)
    return folder


def test_scenes_are_what_is_there(shipped: Path) -> None:
    scenes = demo.scenes()
    assert list(scenes) == [PENDULUM, "LQR-v0"]
    labels = [[text.partition("=")[0] for text in texts] for texts in scenes.values()]
    assert labels == [
        ["MPDiffuser (level-matched)", "planner alone", "SAFE PPO (SB3)"],
        ["MPDiffuser (level-matched)", "planner alone"],
    ]
    alone = comparison.load_entries(scenes["LQR-v0"], "LQR-v0")[1]
    assert alone.policy.options.composition == "planner_only"


@pytest.mark.slow
def test_the_demo_prints_a_table_and_leaves_files_for_every_scene(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.console, "width", 200)
    result = CliRunner().invoke(cli.app, ["demo", "--episodes", "2"])
    assert result.exit_code == 0, result.output
    policies = {
        PENDULUM: ["MPDiffuser (level-matched)", "planner alone", "SAFE PPO (SB3)"],
        "LQR-v0": ["MPDiffuser (level-matched)", "planner alone", demo.REFERENCES["LQR-v0"][0]],
    }
    for env_id, labels in policies.items():
        assert env_id in result.output and all(label in result.output for label in labels)
        folder = tmp_path / "outputs/demo" / env_id
        frames = iio.imread(folder / "side-by-side.gif")
        assert frames.shape == (10, 274, 250 * len(labels) + 8 * (len(labels) - 1), 3)
        with (folder / "episodes.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["policy"] for row in rows] == [label for label in labels for _ in range(2)]
        assert {int(row["seed"]) for row in rows} == {demo.FIRST_SEED, demo.FIRST_SEED + 1}
    optimal = [float(row["return"]) for row in rows[-2:]]
    others = [float(row["return"]) for row in rows[:-2]]
    assert min(optimal) > max(others), "nothing beats the optimal gain"


@pytest.mark.fault("Files", "a damaged shipped agent", "the demo stops before anything is played")
def test_a_damaged_file_stops_the_demo_before_anything_is_played(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("played")

    monkeypatch.setattr(demo, "compare", forbidden)
    path = shipped / "LQR-v0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="LQR-v0"):
        next(demo.run_demo(shipped / "out"))
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        next(demo.run_demo(shipped / "out"))


def test_nothing_shipped_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "shipped_agents", dict)
    with pytest.raises(CheckpointError, match="no trained agents"):
        demo.scenes()
