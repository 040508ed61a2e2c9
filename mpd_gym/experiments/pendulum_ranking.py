"""Ranking many candidates under a hard limit (paper, section 4.2, Table 5).

The pendulum has to be swung up and held without ever turning faster than 6.5 rad/s. Candidates are
conditioned on return and ranked by learned reward and cost models within a budget of zero
(Algorithm 2). A planner alone proposes trajectories that cannot happen; the more it is asked for,
the likelier that one which looks both safe and good is one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.evaluation import evaluate, proportion_interval
from mpd_gym.experiments.results import Results
from mpd_gym.experiments.tables import markdown_table, pooled_share, seed_mean
from mpd_gym.experiments.training import trained
from mpd_gym.files import atomic_path
from mpd_gym.reports import save_figure

__all__ = ["CANDIDATES", "METHODS", "measure", "run"]

ENV_ID = "ConstrainedPendulum-v0"
METHODS: dict[str, dict[str, Any]] = {
    "planner only": {"composition": "planner_only"},
    "MPDiffuser": {"composition": "alternating_matched"},
}
CANDIDATES = (1, 4, 8, 16, 32, 64)
PUBLISHED = {  # per cent
    "planner only": {1: 62, 4: 89, 8: 91, 16: 88, 32: 74, 64: 66},
    "MPDiffuser": {1: 69, 4: 84, 8: 93, 16: 93, 32: 92, 64: 91},
}
FIRST_TRIAL = 0  # seed of the first start; the data's seeds are far from these
AT_ONCE = 50  # episodes that share a network call
PROCESSES = 2

Job = tuple[str, int, int]  # method, candidates, training seed


def run(folder: Path, seeds: tuple[int, ...], trials: int) -> str:
    """Train what is missing, evaluate every cell, and write results, table and figure.

    Args:
        folder: Where they go.
        seeds: Training seeds.
        trials: Episodes of each method and number of candidates, spread over the seeds: other
            starts for each seed, the same ones for all methods.

    Returns:
        The report, as Markdown.
    """
    for seed in seeds:
        _agent(folder, seed)
    jobs = [(name, count, seed) for count in CANDIDATES for name in METHODS for seed in seeds]
    results = Results(folder / "pendulum-ranking.json", {"trials": trials, "seeds": list(seeds)})
    starts = np.array_split(np.arange(FIRST_TRIAL, FIRST_TRIAL + trials), len(seeds))
    found = results.fill(
        {
            _key(*job): (
                folder,
                job[-1],
                {**METHODS[job[0]], "num_candidates": job[1]},
                starts[seeds.index(job[-1])].tolist(),
            )
            for job in jobs
        },
        measure,
        PROCESSES,
    )
    cells = {job: found[_key(*job)] for job in jobs}
    save_figure(_figure(cells, seeds), folder / "pendulum-ranking.png")
    report = _report(cells, seeds, trials)
    with atomic_path(folder / "pendulum-ranking.md") as temporary:
        temporary.write_text(report)
    return report


def _agent(folder: Path, seed: int) -> MPDiffuserAgent:
    return trained(folder / "agents" / f"pendulum-seed{seed}.safetensors", ENV_ID, seed)


def _key(name: str, count: int, seed: int) -> str:
    return f"{name} N={count} seed={seed}"


def measure(
    folder: Path, seed: int, options: dict[str, Any], starts: Sequence[int]
) -> dict[str, Any]:
    """Play episodes.

    Args:
        folder: Of the study.
        seed: Training seed.
        options: Sampling options; the agent's own otherwise.
        starts: Seeds of the episodes.

    Returns:
        For each episode whether it was a success, the number of steps beyond the limit, and the
        return.
    """
    agent = _agent(folder, seed).with_options(**options)
    played = evaluate(agent, ENV_ID, seeds=starts, num_envs=AT_ONCE)
    assert played.successes is not None
    assert played.costs is not None
    return {
        "success": [bool(flag) for flag in played.successes],
        "cost": [float(cost) for cost in played.costs],
        "return": [round(float(total), 2) for total in played.returns],
    }


def _report(cells: dict[Job, dict[str, Any]], seeds: Sequence[int], trials: int) -> str:
    lines = [
        "# ConstrainedPendulum-v0: ranking N candidates within a budget of zero",
        "",
        "Success: upright at the end and never beyond the limit, per cent of all episodes with "
        "the 95 % Wilson interval, and each training seed "
        f"({', '.join(map(str, seeds))}); {trials} episodes in each row, spread over the seeds.",
    ]
    heads = ["N", "method", "success %", "published", "episodes beyond the limit %", "return"]
    rows = []
    for count in CANDIDATES:
        for name in METHODS:
            found = [cells[name, count, seed] for seed in seeds]
            beyond = [np.array(cell["cost"]) > 0 for cell in found]
            rows.append(
                [
                    str(count),
                    name,
                    pooled_share([cell["success"] for cell in found]),
                    str(PUBLISHED[name][count]),
                    pooled_share(beyond),
                    seed_mean([float(np.mean(cell["return"])) for cell in found], 1),
                ]
            )
    return "\n".join([*lines, "", *markdown_table(heads, rows), ""])


def _figure(cells: dict[Job, dict[str, Any]], seeds: Sequence[int]) -> Figure:
    """Success over the number of candidates, ours solid and published dashed."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in METHODS:
        shares = [
            proportion_interval(
                np.concatenate([cells[name, count, seed]["success"] for seed in seeds])
            )
            for count in CANDIDATES
        ]
        middle = np.array([share.mean for share in shares])
        below = middle - [share.low for share in shares]
        above = np.array([share.high for share in shares]) - middle
        drawn = axes.errorbar(
            CANDIDATES, 100 * middle, 100 * np.stack([below, above]), marker="o", label=name
        )
        colour = drawn.lines[0].get_color()
        published = [PUBLISHED[name][count] for count in CANDIDATES]
        axes.plot(CANDIDATES, published, "--", color=colour, alpha=0.6)
    axes.set(
        xscale="log", xlabel="candidates N", ylabel="success % (dashed: published)", ylim=(0, 101)
    )
    axes.set_xticks(CANDIDATES, [str(count) for count in CANDIDATES])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
