"""``python -m studies``: what it lists, refuses and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpd_gym import MPDiffuserAgent
from mpd_gym.errors import ConfigError
from studies import STUDIES, lqr_steps
from studies.__main__ import app
from studies.networks import Network
from studies.tests.miniature import use_made_up_data
from tests.helpers import tiny_agent


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_all_studies_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.__main__.console.width", 200)
    listed = run("--list")
    assert run() == listed
    assert all(name in listed for name in STUDIES)


@pytest.mark.parametrize("seeds", ["0;1", "", "-1", "0,0"])
def test_seeds_are_different_whole_numbers(seeds: str) -> None:
    with pytest.raises(ConfigError, match="different whole numbers"):
        run("lqr-steps", "--seeds", seeds)


def test_results_go_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["lqr-steps", "--folder", str(tmp_path / "file")])
    assert result.exit_code == 2


@pytest.mark.slow
def test_the_command_writes_a_study_and_the_page_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell through the whole command, with a network that is there already."""
    use_made_up_data(monkeypatch)
    folder = tmp_path / "r"
    agent = tiny_agent("LQR-v0", conditions=("final_state",))

    def load(self: Network, folder: Path) -> MPDiffuserAgent:
        return agent

    monkeypatch.setattr(Network, "train", lambda self, folder, parallel: None)
    monkeypatch.setattr(Network, "load", load)
    monkeypatch.setattr(lqr_steps, "STEPS", (2,))
    monkeypatch.setattr(lqr_steps, "SAMPLERS", ("ddpm",))
    monkeypatch.setattr(lqr_steps, "NAMES", lqr_steps.NAMES[:1])
    monkeypatch.setattr(lqr_steps, "OPTIONS", {"action_chunk": 8})
    run("lqr-steps", "--folder", str(folder), "--seeds", "4,5", "--trials", "3",
        "--processes", "0")  # fmt: skip
    content = json.loads((folder / "lqr-steps.json").read_text())
    assert content["setting"] == {"preset": "laptop", "trials": 3, "seeds": [4, 5]}
    assert all(len(cell["costs"]) == 3 for cell in content["cells"].values())
    assert "4, 5" in (folder / "lqr-steps.md").read_text()
    run("--report", "--folder", str(folder))
    assert (tmp_path / "r.md").read_text().startswith("# Results")
