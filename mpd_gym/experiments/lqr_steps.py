"""What skipped levels do to each composition, on the networks of `lqr_compositions`.

Of the K = 50 levels 5, 10 or 25 are visited, with DDPM's and with DDIM's moves, at p = 0.1 and
temperature 1. Literal alternation moves the states twice over each gap; the other forms stay at the
level. `lqr_compositions` has all 50 levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpd_gym.evaluation import mean_interval
from mpd_gym.experiments.lqr_compositions import (
    COMPOSITIONS,
    PROCESSES,
    cost_ratio,
    measure,
    trained,
)
from mpd_gym.experiments.results import Results
from mpd_gym.files import atomic_path

__all__ = ["run"]

OPTIONS: dict[str, Any] = {"guidance_scale": 1.0, "action_chunk": 16, "temperature": 1.0}
NAMES = [name for name in COMPOSITIONS if name != "combined_score 0.5"]
PERCENT = 10  # of noisy steps in the training data
STEPS = (5, 10, 25)
SAMPLERS = ("ddpm", "ddim")


def run(folder: Path, seeds: tuple[int, ...], trials: int) -> str:
    """Train what is missing, evaluate every cell, and write results and table.

    Args:
        folder: Where they go; agents of `lqr_compositions` in it are used.
        seeds: Training seeds.
        trials: Starts of each cell; the same for all.

    Returns:
        The report, as Markdown.
    """
    for seed in seeds:
        trained(PERCENT, seed, folder / "agents")
    jobs = {
        (sampler, steps, name, seed): {
            **OPTIONS,
            **COMPOSITIONS[name],
            "sampler": sampler,
            "num_steps": steps,
        }
        for sampler in SAMPLERS
        for steps in STEPS
        for name in NAMES
        for seed in seeds
    }
    results = Results(folder / "lqr-steps.json", {"trials": trials, "options": OPTIONS})
    found = results.fill(
        {
            _key(*job): (PERCENT, job[-1], options, folder / "agents", trials)
            for job, options in jobs.items()
        },
        measure,
        PROCESSES,
    )
    report = _report({job: cost_ratio(found[_key(*job)]) for job in jobs}, seeds, trials)
    with atomic_path(folder / "lqr-steps.md") as temporary:
        temporary.write_text(report)
    return report


def _key(sampler: str, steps: int, name: str, seed: int) -> str:
    return f"{sampler} steps={steps} {name} seed={seed}"


def _report(
    ratios: dict[tuple[str, int, str, int], float], seeds: tuple[int, ...], trials: int
) -> str:
    lines = [
        "# LQR-v0, p = 0.1: skipped levels",
        "",
        f"Cost of 200 closed-loop steps ÷ least possible cost, by the number of reverse steps out "
        f"of K = 50; {trials} trials a cell, the same starts in all; options {OPTIONS}. Mean over "
        f"training seeds {', '.join(map(str, seeds))} with its 95 % t interval, and each seed.",
    ]
    for sampler in SAMPLERS:
        heads = [sampler, *(f"{steps} steps" for steps in STEPS)]
        lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name in NAMES:
            row = [name]
            for steps in STEPS:
                cell = np.array([ratios[sampler, steps, name, seed] for seed in seeds])
                mean = mean_interval(cell)
                each = ", ".join(f"{ratio:.3f}" for ratio in cell)
                row.append(f"**{mean.mean:.3f}** [{mean.low:.2f}, {mean.high:.2f}] ({each})")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])
