"""What skipped levels do to each composition, on the networks of `lqr_compositions`.

Of the K = 50 levels 5, 10 or 25 are visited, with DDPM's and with DDIM's moves, at p = 0.1 and
temperature 1. Literal alternation moves the states twice over each gap; the other forms stay at the
level. `lqr_compositions` has all 50 levels.
"""

from __future__ import annotations

from typing import Any

from studies.estimates import cost_ratio
from studies.figures import Curve, Panel, curves
from studies.lqr_compositions import COMPOSITIONS, narrow
from studies.measures import regulation
from studies.report import Report, Table, in_words
from studies.runner import Measurement, Run, of_seeds

__all__ = ["study"]

OPTIONS: dict[str, Any] = {"guidance_scale": 1.0, "action_chunk": 16, "temperature": 1.0}
NAMES = tuple(name for name in COMPOSITIONS if not name.endswith("1/2"))
PERCENT = 10  # of noisy steps in the training data
STEPS = (5, 10, 25)
SAMPLERS = ("ddpm", "ddim")
VIEW = (1.1, 2.3)  # costs in the figure


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    cells = run.measure(
        {
            (sampler, f"{steps} steps", name, seed): Measurement(
                narrow(scope, PERCENT, seed),
                regulation,
                scope.starts,
                {**OPTIONS, **COMPOSITIONS[name], "sampler": sampler, "num_steps": steps},
            )
            for sampler in SAMPLERS
            for steps in STEPS
            for name in NAMES
            for seed in scope.seeds
        }
    )

    ratios = {
        (sampler, steps, name): cost_ratio(
            of_seeds(cells, sampler, f"{steps} steps", name, seeds=scope.seeds)
        )
        for sampler in SAMPLERS
        for steps in STEPS
        for name in NAMES
    }
    heads = ["composition", *(f"{steps} steps" for steps in STEPS)]
    rows = [[name, *(ratios[SAMPLERS[0], steps, name].short for steps in STEPS)] for name in NAMES]
    text = (
        f"Cost of 200 steps ÷ least possible cost with DDPM, of K = 50 levels; lower is better. "
        f"{scope.told}. Nothing is published."
    )
    panels = [
        Panel(
            sampler.upper(),
            {name: Curve(STEPS, [ratios[sampler, one, name] for one in STEPS]) for name in NAMES},
            "reverse steps of 50",
            "cost ÷ optimal cost",
            log=True,
            ticks=True,
            view=VIEW,
        )
        for sampler in SAMPLERS
    ]
    return Report(
        "LQR-v0, p = 0.1: skipped levels",
        "What do skipped levels do to each composition, with DDPM's and with DDIM's moves?",
        Table("", heads, rows, text),
        curves(panels),
        f"Cost with its 95 % interval; costs above {VIEW[1]:g} are cut. Few DDPM steps cost least "
        "in the level-matched form.",
        f"The same starts for all; {in_words(OPTIONS)}.",
        [
            Table(
                f"{sampler}, each training seed",
                heads,
                [[name, *(ratios[sampler, steps, name] for steps in STEPS)] for name in NAMES],
            )
            for sampler in SAMPLERS
        ],
    )
