"""Studies that vary one thing about MPDiffuser, in miniature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from miniature import run_mini, use_made_up_data

from studies import (
    alternation,
    car_data,
    car_off_data,
    causality,
    combined_score,
    dynamics_condition,
    initial_state,
    lqr_dynamics_noise,
    mismatch,
    sensitivity,
    variants,
    warm_start,
)

SHORT: dict[str, Any] = {"num_steps": 1, "action_chunk": 15}
LQR = replace(variants.LQR_NOISY, options={**SHORT, "guidance_scale": 1.0})
CAR = replace(variants.CAR, options={"num_steps": 1, "num_candidates": 1, "guidance_scale": 1.0})


@pytest.fixture(autouse=True)
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up data, one temperature, short plans, and the quickest of the tasks."""
    use_made_up_data(monkeypatch)
    monkeypatch.setattr(variants, "TEMPERATURES", (1.0,))
    for module in (dynamics_condition, combined_score):
        monkeypatch.setattr(module, "TASKS", (CAR,))
    for module in (initial_state, causality):
        monkeypatch.setattr(module, "RETRAINED", (CAR,))


def networks(cells: dict[str, dict[str, Any]]) -> set[str]:
    return {cell["of"]["network"] for cell in cells.values()}


@pytest.mark.slow
def test_combined_score_searches_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combined_score, "WEIGHTS", (0.25, 1.0))
    report, cells = run_mini("combined-score", tmp_path)
    assert sum(key.startswith("validation") for key in cells) == 2
    assert len(cells) == 2 + 3 and len(networks(cells)) == 1
    assert "dynamics_weight" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cells", "nets"),
    [("initial-state", 4, 2), ("dynamics-condition", 3, 2), ("causality", 4, 2)],
)
def test_two_kinds_of_networks_are_compared(
    name: str, cells: int, nets: int, tmp_path: Path
) -> None:
    report, found = run_mini(name, tmp_path)
    assert len(found) == cells and len(networks(found)) == nets
    assert "Published orderings" in report


@pytest.mark.slow
def test_actions_are_read_off_plans_of_the_same_networks(tmp_path: Path) -> None:
    from mpd_gym.agents import load_agent

    report, cells = run_mini("car-actions", tmp_path)
    (name,) = networks(cells)
    assert len(cells) == 6
    before, after = (
        load_agent(tmp_path / "agents" / f"{one}.safetensors", "cpu")
        for one in (
            next(p.stem for p in (tmp_path / "agents").glob("*.safetensors") if p.stem != name),
            name,
        )
    )
    assert set(after.models) - set(before.models) == {"inverse_dynamics"}
    for role, model in before.models.items():
        for ours, theirs in zip(model.parameters(), after.models[role].parameters(), strict=True):
            assert ours.equal(theirs)
    assert "MPDiffuser, read off ends nearer than planner alone, read off" in report


@pytest.mark.slow
def test_few_expert_drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpd_gym.agents import load_agent

    monkeypatch.setattr(variants, "CAR", CAR)
    monkeypatch.setattr(car_data, "DRIVES", (2, 3))
    report, cells = run_mini("car-data", tmp_path)
    used = {key.split(", starts")[0]: cell["of"]["network"] for key, cell in cells.items()}
    assert len(cells) == 2 * 10 and len(networks(cells)) == 2 * 5
    assert "MPDiffuser above planner alone, CarUMaze-v0, 2 expert drives" in report

    def planner(key: str) -> Any:
        path = tmp_path / "agents" / f"{used[key]}.safetensors"
        return next(load_agent(path, "cpu").models["planner"].parameters())

    alone, other = (
        planner(f"CarUMaze-v0, 2 expert drives, {name}, 4")
        for name in (car_data.ALONE, car_data.NEAR)
    )
    assert alone.equal(other)
    assert not alone.equal(planner(f"CarUMaze-v0, 3 expert drives, {car_data.ALONE}, 4"))


@pytest.mark.slow
def test_dmpc_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies import dmpc

    monkeypatch.setattr(dmpc, "LQR_NOISY", LQR)
    monkeypatch.setattr(dmpc, "CANDIDATES", (1, 2))
    report, cells = run_mini("dmpc", tmp_path)
    assert len(cells) == 5 and len(networks(cells)) == 2
    assert "MPDiffuser below D-MPC, N = 2" in report


@pytest.mark.slow
def test_mismatched_models_share_their_planners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpd_gym.agents import load_agent

    monkeypatch.setattr(mismatch, "LQR", replace(LQR, title="LQR-v0", data=()))
    few = replace(variants.FEW_DRIVES, options=CAR.options)
    monkeypatch.setattr(mismatch, "FEW_DRIVES", few)
    _, cells = run_mini("mismatch", tmp_path)
    used = {key.split(", starts")[0]: cell["of"]["network"] for key, cell in cells.items()}
    assert len(networks(cells)) == 4 + 3

    def weights(key: str, role: str) -> Any:
        path = tmp_path / "agents" / f"{used[key]}.safetensors"
        return next(load_agent(path, "cpu").models[role].parameters())

    good, mixed = "LQR-v0, both good, 4", "LQR-v0, planner good, dynamics poor, 4"
    assert weights(good, "planner").equal(weights(mixed, "planner"))
    assert not weights(good, "dynamics").equal(weights(mixed, "dynamics"))


@pytest.mark.slow
def test_dynamics_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lqr_dynamics_noise, "LQR_NOISY", LQR)
    monkeypatch.setattr(lqr_dynamics_noise, "SIGMAS", (0.0, 0.02))
    report, cells = run_mini("lqr-dynamics-noise", tmp_path)
    assert len(networks(cells)) == 2
    assert "σ = 0.02 below planner" in report


@pytest.mark.slow
def test_alternation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = ((CAR.changed(num_steps=None), (2, 4), ()),)
    monkeypatch.setattr(alternation, "PLANS", plans)
    report, cells = run_mini("alternation", tmp_path)
    assert len(networks(cells)) == 2 and len(cells) == 2 * 4 + 1
    assert "MPDiffuser, K = 2 above planner, 2 K levels, K = 2" in report


@pytest.mark.slow
def test_sensitivity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "TASKS", (CAR,))
    monkeypatch.setattr(sensitivity, "SAMPLES", {1: 60, 2: 62})
    report, cells = run_mini("sensitivity", tmp_path)
    assert len(cells) == len(sensitivity.GUIDANCES) + 2
    assert "N = 2 above N = 1" in report


@pytest.mark.slow
def test_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "TASKS", (CAR,))
    monkeypatch.setattr(warm_start, "STEPS", (1, 0))
    monkeypatch.setattr(warm_start, "TIMED_EPISODES", 1)
    monkeypatch.setattr(
        warm_start, "OPTIONS", {**warm_start.OPTIONS, "num_steps": 2, "action_chunk": 8}
    )
    report, cells = run_mini("warm-start", tmp_path)
    assert len(cells) == 4 and "all, from scratch" in report


@pytest.mark.slow
def test_pendulum_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the latents of the shipped encoder, in one short step of everything."""
    from studies import pendulum_images

    monkeypatch.setattr(pendulum_images, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(pendulum_images, "GUIDANCES", (1.0,))
    monkeypatch.setattr(pendulum_images, "VALUE_GUIDANCES", (0.1,))
    monkeypatch.setattr(pendulum_images, "OPTIONS", {**SHORT, "num_candidates": 1})
    monkeypatch.setattr(pendulum_images, "METHODS", ("Diffuser", "planner", "MPDiffuser"))
    report, cells = run_mini("pendulum-images", tmp_path, trials=1)
    assert len(cells) == 3 and len(networks(cells)) == 2
    assert "-155.4 : -196.2" in report


@pytest.mark.slow
def test_car_off_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells name the changed constant, and one dynamics model is of expert drives."""
    short = {"num_steps": 1, "action_chunk": 15, "warm_start_steps": 0}
    series = [
        one._replace(values=one.values[:2], options=short if one.options else {"num_steps": 1})
        for one in car_off_data.SERIES
    ]
    monkeypatch.setattr(car_off_data, "SERIES", tuple(series))
    report, cells = run_mini("car-off-data", tmp_path)
    assert len(networks(cells)) == 3 + 4  # MPDiffuser's, and those of peers; FiLM counts apart
    assert len(cells) == 2 * (3 * 2 * 7 + 1 + 1 + 3 + 2)
    name = "another car, closed loop, {}, MPDiffuser, planned, 4, starts 0–1"
    kwargs = [cells[name.format(value)]["of"]["env_kwargs"] for value in series[2].values]
    assert kwargs == [{"wheelbase": 0.85}, {"wheelbase": 0.9}]
    assert "MPDiffuser above planner alone, read off, starts aslant, open loop, 0.25" in report
