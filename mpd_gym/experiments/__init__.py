"""Studies: each trains what is missing, evaluates, and writes every seed and trial.

A study is one file with a `run` function; `STUDIES` lists them for ``mpd-gym reproduce``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import final

from mpd_gym.errors import check_choice

__all__ = ["STUDIES", "Study", "run_study"]


@final
@dataclass(frozen=True)
class Study:
    """A study that can be reproduced.

    Attributes:
        module: Where its ``run(folder, seeds, trials)`` is.
        description: What it shows.
        time: Expected on two cores.
    """

    module: str
    description: str
    time: str

    def load(self) -> Callable[[Path, tuple[int, ...], int], str]:
        """The study's `run`, which returns its report as Markdown."""
        run: Callable[[Path, tuple[int, ...], int], str] = import_module(self.module).run
        return run


STUDIES = {
    "lqr-compositions": Study(
        "mpd_gym.experiments.lqr_compositions",
        "LQR-v0: planner alone and each composition, at p = 0.1 and 0.4 and three temperatures",
        "1 h",
    ),
    "lqr-steps": Study(
        "mpd_gym.experiments.lqr_steps",
        "LQR-v0: what skipped levels do to each composition, with DDPM and DDIM",
        "10 min more",
    ),
    "real-time": Study(
        "mpd_gym.experiments.real_time",
        "return against milliseconds per action of the shipped agents: steps, warm starts, chunks",
        "20 min",
    ),
    "car-umaze": Study(
        "mpd_gym.experiments.car_umaze",
        "CarUMaze-v0: whole plans executed open loop, every composition (T. 8, Fig. 2)",
        "2 h",
    ),
    "pendulum-ranking": Study(
        "mpd_gym.experiments.pendulum_ranking",
        "ConstrainedPendulum-v0: success with N = 1 … 64 ranked candidates (T. 5)",
        "3 h",
    ),
}


def run_study(name: str, folder: Path, seeds: tuple[int, ...], trials: int) -> str:
    """Run a study, or go on with it.

    Args:
        name: A key of `STUDIES`.
        folder: Where agents, results, table and figure go.
        seeds: Training seeds.
        trials: Start states for each cell.

    Returns:
        The report, as Markdown.

    Raises:
        ConfigError: If there is no such study.
    """
    check_choice("study", name, STUDIES)
    return STUDIES[name].load()(folder, seeds, trials)
