"""Planning from pictures, in the latent space of an autoencoder (paper, section 4.3, Table 6).

All methods see the latents of the encoder that ships, learn from the same replay buffer, predict
x̂_0 and are tuned on the same grid. Diffuser climbs the value of its network, whose scale has a grid
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mpd_gym.agents.diffuser import VALUE_GUIDANCE_SCALE
from mpd_gym.agents.presets import preset
from studies.estimates import Estimate, average
from studies.figures import dots
from studies.measures import episodes
from studies.peers import ALONE, BC, LITERAL, OURS, PEERS, contender, grid, orderings
from studies.report import Report, Table
from studies.runner import Choice, Contender, Measurement, Run, Scope, of_seeds

__all__ = ["study"]

ENV_ID = "LatentPendulum-v0"
TEMPERATURES = (0.1, 0.5, 1.0)
GUIDANCES = (1.0, 1.5)
VALUE_GUIDANCES = tuple(VALUE_GUIDANCE_SCALE * factor for factor in (3.0, 10.0, 30.0))
OPTIONS: dict[str, Any] = {"num_candidates": 4}  # the others are the agent's own
METHODS = (BC, "Diffuser", "Decision Diffuser", ALONE, OURS)
PUBLISHED = {
    "Diffuser": -196.2,
    "Decision Diffuser": -242.9,
    ALONE: -181.5,
    LITERAL: -155.4,
}

Cells = Mapping[Any, dict[str, Any]]


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    chosen, cells = _measured(run)
    returns = {
        name: average(of_seeds(cells, name, seeds=scope.seeds), "return", 1) for name in METHODS
    }
    ahead = preset(scope.preset, ENV_ID).conditions[0].horizon
    scales = ", ".join(f"{scale:g}" for scale in VALUE_GUIDANCES)
    return Report(
        "LatentPendulum-v0: planning from pictures (Table 6)",
        "How well do the methods plan in the latent space of pictures?",
        _table(returns, chosen, f"{scope.told}. Published for {LITERAL}."),
        dots({"return of an episode": returns}, "return"),
        "Mean and 95 % interval over episodes: cloning, planner and MPDiffuser are level.",
        f"Episodes of 200 steps, the same starts for all. A plan is the best of "
        f"{OPTIONS['num_candidates']} candidates by a learned reward, asked for the highest return "
        f"of the next {ahead} steps. Temperature {TEMPERATURES} and guidance {GUIDANCES} "
        f"(Diffuser: {scales}) were chosen on validation starts with the first seed.",
        (),
        orderings(returns, PUBLISHED, table="Table 6"),
    )


def _measured(run: Run) -> tuple[Mapping[str, Choice], Cells]:
    """What was chosen for each method, and its cells by name and seed."""
    scope = run.scope
    rivals = {name: _contender(scope, name) for name in METHODS}
    chosen = run.tune(rivals, lambda cell: float(np.mean(cell["return"])))
    cells = {
        (name, seed): Measurement(
            replace(rivals[name].network, seed=seed), episodes, scope.starts, choice.options
        )
        for name, choice in chosen.items()
        for seed in scope.seeds
    }
    return chosen, run.measure(cells)


def _contender(scope: Scope, name: str) -> Contender:
    scales = VALUE_GUIDANCES if PEERS[name].method == "diffuser" else GUIDANCES
    return contender(scope, PEERS[name], ENV_ID, episodes, OPTIONS, grid(TEMPERATURES, scales))


def _table(returns: Mapping[str, Estimate], chosen: Mapping[str, Choice], text: str) -> Table:
    shown = "temperature", "guidance_scale"
    rows = []
    for name, estimate in returns.items():
        options = chosen[name].options
        told = [f"{options[key]:g}" if key in options else "–" for key in shown]
        published = PUBLISHED.get(LITERAL if name == OURS else name, "–")
        rows.append([name, estimate.short, published, *told])
    return Table("", ("method", "return", "published", "temperature", "guidance"), rows, text)
