"""Whole plans executed open loop in the U-maze, and closed loop (paper, Table 8 and Fig. 2).

The planner learns from expert drives, the dynamics model from expert and random ones. An open-loop
trial executes all H actions of one plan without looking; it succeeds if the car ends within a metre
of the goal and never touched a wall. Planner alone and all compositions share networks and starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.evaluation import evaluate, execute_plans, state_error
from mpd_gym.experiments.results import Results
from mpd_gym.experiments.tables import markdown_table, pooled_share, seed_mean
from mpd_gym.experiments.training import trained
from mpd_gym.files import atomic_path
from mpd_gym.reports import save_figure, state_error_figure
from mpd_gym.types import Array

__all__ = ["COMPOSITIONS", "closed_loop", "open_loop", "run"]

ENV_ID = "CarUMaze-v0"
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "planner only": {"composition": "planner_only"},
    "Algorithm 1": {"composition": "alternating"},
    "level-matched": {"composition": "alternating_matched"},
    "resampled": {"composition": "alternating_resampled"},
    "combined 1/2": {"composition": "combined_score", "dynamics_weight": 0.5},
    "combined 1": {"composition": "combined_score", "dynamics_weight": 1.0},
}
TEMPERATURES = (0.01, 0.5, 1.0)
STEPS = (10, None)  # reverse steps; None for all K
CLOSED_LOOP = ("planner only", "level-matched")
FIRST_TRIAL = 0  # seed of the first start; the data's seeds are far from these
PROCESSES = 2
POSITION = (0, 1)  # columns of the car's position

Job = tuple[str, float, int | None, int]  # composition, temperature, steps, training seed


def run(folder: Path, seeds: tuple[int, ...], trials: int) -> str:
    """Train what is missing, evaluate every cell, and write results, table and figure.

    Args:
        folder: Where they go.
        seeds: Training seeds.
        trials: Start-goal pairs of each cell; the same for all.

    Returns:
        The report, as Markdown.
    """
    for seed in seeds:
        _agent(folder, seed)
    results = Results(folder / "car-umaze.json", {"trials": trials, "first_trial": FIRST_TRIAL})
    jobs = [
        (name, temperature, steps, seed)
        for name in COMPOSITIONS
        for temperature in TEMPERATURES
        for steps in STEPS
        for seed in seeds
    ]
    opened = results.fill(
        {_key(*job): (folder, job[-1], _options(*job[:3]), trials) for job in jobs},
        open_loop,
        PROCESSES,
    )
    closed = results.fill(
        {
            f"closed loop {name} seed={seed}": (folder, seed, COMPOSITIONS[name], trials)
            for name in CLOSED_LOOP
            for seed in seeds
        },
        closed_loop,
        PROCESSES,
    )
    cells = {job: opened[_key(*job)] for job in jobs}
    errors = {name: _errors(cells, name, seeds) for name in CLOSED_LOOP}
    save_figure(state_error_figure(errors), folder / "car-umaze.png")
    report = _report(cells, closed, seeds, trials)
    with atomic_path(folder / "car-umaze.md") as temporary:
        temporary.write_text(report)
    return report


def _agent(folder: Path, seed: int) -> MPDiffuserAgent:
    return trained(folder / "agents" / f"car-seed{seed}.safetensors", ENV_ID, seed)


def _options(name: str, temperature: float, steps: int | None) -> dict[str, Any]:
    return {**COMPOSITIONS[name], "temperature": temperature, "num_steps": steps}


def _key(name: str, temperature: float, steps: int | None, seed: int) -> str:
    return f"{name} temperature={temperature} steps={steps or 'all'} seed={seed}"


def open_loop(folder: Path, seed: int, options: dict[str, Any], trials: int) -> dict[str, Any]:
    """Execute one plan of H actions from each start.

    Args:
        folder: Of the study.
        seed: Training seed.
        options: Sampling options.
        trials: Starts.

    Returns:
        For each trial: distance to the goal at the end in m, whether a wall was touched, distance
        of the planned end to the goal, and per step the distance in m between planned and executed
        position (mean over trials that got so far).
    """
    agent = _agent(folder, seed).with_options(**options)
    starts = range(FIRST_TRIAL, FIRST_TRIAL + trials)
    env = gym.make(ENV_ID)
    observations = [env.reset(seed=start)[0] for start in starts]
    batch = {key: np.stack([row[key] for row in observations]) for key in observations[0]}
    _, state = agent.predict(batch)
    planned, actions = agent.planned(state)
    rollouts = execute_plans(list(actions), ENV_ID, seeds=starts)
    errors = [
        state_error(plan, rollout.observations[1:], POSITION)
        for plan, rollout in zip(planned, rollouts, strict=True)
    ]
    ends = np.stack([rollout.observations[-1, list(POSITION)] for rollout in rollouts])
    goals = batch["desired_goal"]
    return {
        "final_error": _rounded(np.linalg.norm(ends - goals, axis=-1)),
        "collision": [
            any(bool(info["collision"]) for info in rollout.infos) for rollout in rollouts
        ],
        "planned_error": _rounded(np.linalg.norm(planned[:, -1, list(POSITION)] - goals, axis=-1)),
        "state_error": _rounded(np.nanmean(np.stack(errors), axis=0)),
    }


def closed_loop(folder: Path, seed: int, options: dict[str, Any], trials: int) -> dict[str, Any]:
    """Drive whole episodes, planning again after each chunk.

    Args:
        folder: Of the study.
        seed: Training seed.
        options: Sampling options; the agent's own otherwise.
        trials: Starts.

    Returns:
        For each trial whether the car was at the goal at the end, and whether it touched a wall.
    """
    agent = _agent(folder, seed).with_options(**options)
    starts = range(FIRST_TRIAL, FIRST_TRIAL + trials)
    played = evaluate(agent, ENV_ID, seeds=starts, num_envs=trials)
    assert played.successes is not None
    assert played.collisions is not None
    return {
        "success": [bool(flag) for flag in played.successes & ~played.collisions],
        "collision": [bool(flag) for flag in played.collisions],
    }


def _rounded(values: Array) -> list[float]:
    return [round(float(value), 4) for value in values]


def _successes(cell: dict[str, Any]) -> Array:
    arrived: Array = (np.array(cell["final_error"]) < 1.0) & ~np.array(cell["collision"])
    return arrived


def _errors(cells: dict[Job, dict[str, Any]], name: str, seeds: Sequence[int]) -> Array:
    """Position error per step of each seed, ``[seeds, H]``, at temperature 1 with all steps."""
    return np.array([cells[name, 1.0, None, seed]["state_error"] for seed in seeds])


def _report(
    cells: dict[Job, dict[str, Any]],
    closed: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    trials: int,
) -> str:
    lines = [
        "# CarUMaze-v0: whole plans executed open loop",
        "",
        "Success: the car ends within 1 m of the goal and touched no wall, per cent of all trials "
        f"with the 95 % Wilson interval, and each training seed ({', '.join(map(str, seeds))}); "
        f"{trials} unseen start-goal pairs for each, the same in all cells. Beside it, without "
        "heed of walls (as published), the median final error and the mean distance between "
        "planned and executed position. Published (Table 8): Diffuser 68.8, Decision Diffuser "
        "42.2, MPDiffuser 95.3.",
    ]
    heads = ["composition", "temperature", "success %", "ignoring walls %", "median error m"]
    for steps in STEPS:
        lines += ["", f"## {'All reverse steps' if steps is None else f'{steps} reverse steps'}"]
        rows = []
        for temperature in TEMPERATURES:
            for name in COMPOSITIONS:
                found = [cells[name, temperature, steps, seed] for seed in seeds]
                near = [np.array(cell["final_error"]) < 1.0 for cell in found]
                rows.append(
                    [
                        name,
                        f"{temperature:g}",
                        pooled_share([_successes(cell) for cell in found]),
                        f"{100 * np.mean(near):.1f}",
                        seed_mean([float(np.median(cell["final_error"])) for cell in found], 2),
                        seed_mean([float(np.mean(cell["state_error"])) for cell in found]),
                    ]
                )
        lines += ["", *markdown_table([*heads, "state error m"], rows)]
    lines += ["", "## Closed loop", "", "At the goal at the end of 64 steps without a collision."]
    rows = [
        [
            name,
            pooled_share([closed[f"closed loop {name} seed={seed}"]["success"] for seed in seeds]),
        ]
        for name in CLOSED_LOOP
    ]
    lines += ["", *markdown_table(["composition", "success %"], rows)]
    return "\n".join([*lines, ""])
