"""Planner alone against every composition on the linear system (paper, appendix E, Table 10).

Networks are trained on noisy LQR data and asked to end at the origin; what counts is the cost of
200 steps in closed loop, divided by the least possible cost from the same starts. Literal
alternation, its level-matched forms and the combined score share the networks, the starts and all
options but the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.agents.presets import preset
from mpd_gym.envs.lqr import transition
from mpd_gym.evaluation import evaluate, mean_interval
from mpd_gym.experiments import training
from mpd_gym.experiments.results import Results
from mpd_gym.files import atomic_path
from mpd_gym.models import UnetConfig
from mpd_gym.reports import save_figure
from mpd_gym.types import Array

__all__ = ["COMPOSITIONS", "cost_ratio", "measure", "run", "trained"]

ENV_ID = "LQR-v0"
PERCENTS = (10, 40)
TEMPERATURES = (0.001, 0.1, 1.0)
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "planner_only": {"composition": "planner_only"},
    "alternating": {"composition": "alternating"},
    "alternating_matched": {"composition": "alternating_matched"},
    "alternating_resampled": {"composition": "alternating_resampled"},
    "combined_score 0.5": {"composition": "combined_score", "dynamics_weight": 0.5},
    "combined_score 1": {"composition": "combined_score", "dynamics_weight": 1.0},
}
# All K levels, because skipping them is not the same for every composition; long chunks save time.
OPTIONS: dict[str, Any] = {
    "guidance_scale": 1.0,
    "action_chunk": 16,
    "sampler": "ddpm",
    "num_steps": None,
}
NETWORK = UnetConfig(width=16, multipliers=(1, 2, 4))  # half the preset's width, to save time
PROCESSES = 2
FIRST_TRIAL = 0  # seed of the first start; the training data's seeds are far from these


def run(folder: Path, seeds: tuple[int, ...], trials: int) -> str:
    """Train what is missing, evaluate every cell, and write results, table and figure.

    Args:
        folder: Where they go.
        seeds: Training seeds.
        trials: Starts of each cell; the same for all.

    Returns:
        The report, as Markdown.
    """
    results = Results(folder / "lqr-compositions.json", {"trials": trials, "options": OPTIONS})
    jobs = [
        (percent, seed, name, temperature)
        for percent in PERCENTS
        for seed in seeds
        for name in COMPOSITIONS
        for temperature in TEMPERATURES
    ]
    for percent, seed in dict.fromkeys((percent, seed) for percent, seed, *_ in jobs):
        trained(percent, seed, folder / "agents")
    found = results.fill(
        {
            _key(percent, seed, name, temperature): (
                percent,
                seed,
                {**OPTIONS, **COMPOSITIONS[name], "temperature": temperature},
                folder / "agents",
                trials,
            )
            for percent, seed, name, temperature in jobs
        },
        measure,
        PROCESSES,
    )
    cells = {job: found[_key(*job)] for job in jobs}
    save_figure(_figure(cells, seeds), folder / "lqr-compositions.png")
    report = _report(cells, seeds, trials)
    with atomic_path(folder / "lqr-compositions.md") as temporary:
        temporary.write_text(report)
    return report


def trained(percent: int, seed: int, folder: Path) -> MPDiffuserAgent:
    """Load an agent, or train it first; its data is made if missing.

    Args:
        percent: Share of noisy steps in the data.
        seed: Training seed.
        folder: Of agents.
    """
    return training.trained(
        folder / f"lqr-p{percent}-seed{seed}.safetensors",
        ENV_ID,
        seed,
        config=replace(preset("laptop", ENV_ID), unet=NETWORK),
        data=(f"mpd_gym/lqr/noisy-p{percent}-v0",),
    )


def _key(percent: int, seed: int, name: str, temperature: float) -> str:
    return f"p={percent / 100} seed={seed} {name} temperature={temperature}"


def measure(
    percent: int, seed: int, options: dict[str, Any], folder: Path, trials: int
) -> dict[str, Any]:
    """Closed-loop costs of every trial, and the mean state error of the first plans.

    Args:
        percent: Share of noisy steps in the training data.
        seed: Training seed.
        options: Sampling options.
        folder: Of agents.
        trials: Starts; the same for all.
    """
    agent = trained(percent, seed, folder).with_options(**options)
    seeds = range(FIRST_TRIAL, FIRST_TRIAL + trials)
    env: Any = gym.make(ENV_ID).unwrapped
    starts = np.stack([env.reset(seed=seed)[0] for seed in seeds])
    played = evaluate(agent, ENV_ID, seeds=seeds, num_envs=trials)
    _, state = agent.predict(starts)
    planned, actions = agent.planned(state)
    simulated = _simulate(starts, actions, env.problem)
    errors = np.linalg.norm(planned - simulated, axis=-1).mean(axis=0)
    return {
        "costs": [round(float(cost), 6) for cost in -played.returns],
        "optimal_costs": [round(float(cost), 6) for cost in env.optimal_cost(starts)],
        "state_error": [round(float(error), 6) for error in errors],
    }


def _simulate(starts: Array, actions: Array, problem: Any) -> Array:
    """States x_1 … x_H ``[E, H, nx]`` that actions ``[E, H, nu]`` really lead to."""
    states, rows = starts, []
    for step in range(actions.shape[1]):
        states = transition(states, actions[:, step], problem.A, problem.B)
        rows.append(states)
    return np.stack(rows, axis=1)


def cost_ratio(cell: dict[str, Any]) -> float:
    """Mean cost of a cell's trials ÷ mean least possible cost."""
    return float(np.mean(cell["costs"]) / np.mean(cell["optimal_costs"]))


def _ratio_interval(cell: dict[str, Any]) -> str:
    """Cost ratio with its 95 % bootstrap interval over paired trials."""
    pairs = (np.array(cell["costs"]), np.array(cell["optimal_costs"]))
    found = stats.bootstrap(
        pairs,
        lambda cost, best, axis=-1: cost.mean(axis) / best.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return f"{cost_ratio(cell):.3f} [{found.low:.3f}, {found.high:.3f}]"


def _report(
    cells: dict[tuple[int, int, str, float], dict[str, Any]], seeds: Sequence[int], trials: int
) -> str:
    lines = [
        "# LQR-v0: planner alone and compositions",
        "",
        f"Cost of 200 closed-loop steps ÷ least possible cost; {trials} trials a cell, the same "
        f"starts in all; options {OPTIONS}. Each seed with its 95 % bootstrap interval over "
        "trials; the mean over seeds with its 95 % t interval. State error: mean distance between "
        "planned and simulated states over the steps of the first plan. Published (Table 10, at a "
        "temperature that is not given): planner 1.36 and 5.00, MPDiffuser 1.27 and 3.99 at "
        "p = 0.1 and 0.4.",
    ]
    for percent in PERCENTS:
        lines += ["", f"## p = {percent / 100}", ""]
        heads = [
            "composition",
            "temperature",
            *(f"seed {seed}" for seed in seeds),
            "mean",
            "state error",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for temperature in TEMPERATURES:
            for name in COMPOSITIONS:
                found = [cells[percent, seed, name, temperature] for seed in seeds]
                ratios = np.array([cost_ratio(cell) for cell in found])
                mean = mean_interval(ratios)
                error = np.mean([np.mean(cell["state_error"]) for cell in found])
                row = [name, f"{temperature:g}", *map(_ratio_interval, found)]
                row += [f"**{mean.mean:.3f}** [{mean.low:.3f}, {mean.high:.3f}]", f"{error:.4f}"]
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


def _figure(
    cells: dict[tuple[int, int, str, float], dict[str, Any]], seeds: Sequence[int]
) -> Figure:
    """Cost ratio over temperature above, state error of the plans per step below."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, len(PERCENTS))
    for column, percent in enumerate(PERCENTS):
        for name in COMPOSITIONS:
            ratios = np.array(
                [
                    [cost_ratio(cells[percent, seed, name, temperature]) for seed in seeds]
                    for temperature in TEMPERATURES
                ]
            )
            (line,) = axes[0, column].plot(TEMPERATURES, ratios.mean(1), "o-", label=name)
            axes[0, column].plot(TEMPERATURES, ratios, ".", color=line.get_color(), alpha=0.4)
            errors = [cells[percent, seed, name, 1.0]["state_error"] for seed in seeds]
            mean = np.mean(errors, axis=0)
            axes[1, column].plot(np.arange(1, len(mean) + 1), mean, color=line.get_color())
        axes[0, column].set(
            xscale="log",
            xlabel="temperature",
            ylabel="cost ÷ optimal cost",
            title=f"p = {percent / 100}",
        )
        axes[1, column].set(
            xlabel="step of the plan", ylabel="state error, temperature 1", ylim=(0, None)
        )
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure
