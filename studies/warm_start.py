"""Return against milliseconds per action with warm-started plans (paper, appendix G, Fig. 13).

After the first plan of an episode, the last plan is shifted, noised to level m and denoised from
there, so that a plan takes m reverse steps instead of K. A new plan is made for every action.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from studies.estimates import Estimate, average
from studies.figures import Curve, Panel, curves
from studies.measures import clocked, episodes
from studies.peers import OURS
from studies.report import Ordering, Report, Table, in_words
from studies.runner import Measurement, Run, of_seeds
from studies.variants import CAR, LQR_NOISY, MATCHED, Testbed

__all__ = ["study"]

TESTBEDS = (CAR, LQR_NOISY)
STEPS = (1, 2, 5, 10, 0)  # of a warm-started plan; 0 plans from scratch with all K
OPTIONS: dict[str, Any] = {
    **MATCHED,
    "num_steps": None,
    "num_candidates": 1,
    "action_chunk": 1,
    "temperature": 0.1,
    "guidance_scale": 1.0,
}
TIMED_EPISODES = 3
PUBLISHED = "Algorithm 1, Hopper, 10 steps: 94.9 at 58 ms; all 100: 583 ms on an RTX 4090"


def study(run: Run) -> Report:
    """Measure everything and report; times come last, and nothing else should run then."""
    played = [_played(run, testbed) for testbed in TESTBEDS]
    times = [_timed(run, testbed) for testbed in TESTBEDS]
    found = [
        (testbed, {steps: (returns[steps], taken[steps]) for steps in STEPS})
        for testbed, returns, taken in zip(TESTBEDS, played, times, strict=True)
    ]
    rows = [
        [
            steps or "all, from scratch",
            *(text for _, cells in found for text in _texts(cells[steps])),
        ]
        for steps in STEPS
    ]
    heads = [
        text for testbed, _ in found for text in (f"{testbed.env_id}, return", "ms per action")
    ]
    ten = max(step for step in STEPS if step <= 10)
    return Report(
        "Return against time with warm starts (Fig. 13)",
        "Can a plan that starts from the last one take a few steps, not K?",
        Table("", ["reverse steps", *heads], rows, f"{run.scope.told}. Published: {PUBLISHED}."),
        curves([_panel(testbed, cells) for testbed, cells in found]),
        "Return with its 95 % interval over time per action: the rightmost point plans from "
        "scratch; fewer steps lose nothing.",
        f"{OURS}, the same starts for all; {in_words(OPTIONS)}. Milliseconds: one environment, one "
        f"thread, mean over the actions of an episode, median of {TIMED_EPISODES} episodes with "
        "the first seed; nothing else ran.",
        (),
        [
            Ordering(
                f"all steps better than {ten} warm-started ones",
                cells[0][0],
                cells[ten][0],
                "about equal",
                place=testbed.env_id,
                table="Fig. 13",
            )
            for testbed, cells in found
        ],
    )


def _texts(cell: tuple[Estimate, float]) -> tuple[str, str]:
    return cell[0].short, f"{cell[1]:.2f}"


def _options(steps: int) -> dict[str, Any]:
    return {**OPTIONS, "warm_start_steps": steps}


def _played(run: Run, testbed: Testbed) -> dict[int, Estimate]:
    """Return for each number of steps."""
    scope = run.scope
    cells = run.measure(
        {
            (testbed.title, steps, seed): Measurement(
                testbed.network(scope, seed), episodes, scope.starts, _options(steps)
            )
            for steps in STEPS
            for seed in scope.seeds
        }
    )
    return {
        steps: average(of_seeds(cells, testbed.title, steps, seeds=scope.seeds), "return")
        for steps in STEPS
    }


def _timed(run: Run, testbed: Testbed) -> dict[int, float]:
    """Milliseconds per action for each number of steps."""
    scope = run.scope
    network, first = testbed.network(scope, scope.seeds[0]), scope.starts.start
    starts = range(first, first + TIMED_EPISODES)
    cells = run.measure(
        {
            (testbed.title, "time", steps): Measurement(network, clocked, starts, _options(steps))
            for steps in STEPS
        },
        alone=True,
    )
    return {
        steps: float(np.median(cells[testbed.title, "time", steps]["milliseconds"]))
        for steps in STEPS
    }


def _panel(testbed: Testbed, cells: Mapping[int, tuple[Estimate, float]]) -> Panel:
    ordered = sorted(cells.values(), key=lambda pair: pair[1])
    line = Curve([time for _, time in ordered], [estimate for estimate, _ in ordered])
    return Panel(testbed.env_id, {OURS: line}, "milliseconds per action", "return", log=True)
