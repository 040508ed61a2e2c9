"""Studies: each trains what is missing, measures, and writes every seed and trial.

A study is one file with a function ``study(run)``, for one table or figure; ``python -m studies``
runs those of `STUDIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, final

from mpd_gym.errors import check_choice

if TYPE_CHECKING:
    from studies.report import Report
    from studies.results import Results
    from studies.runner import Run, Scope

__all__ = ["STUDIES", "Study", "read_study", "run_study"]


@final
@dataclass(frozen=True)
class Study:
    """A study that can be reproduced.

    Attributes:
        module: Where its function ``study`` is.
        description: What it shows.
        time: Expected on two cores, with laptop preset and three seeds, after what the studies
            before it in the list have trained.
        one_seed: The same with one seed, where it is known.
    """

    module: str
    description: str
    time: str
    one_seed: str = ""

    def takes(self, seeds: int) -> str:
        """Time with a number of seeds."""
        return self.one_seed if seeds == 1 and self.one_seed else self.time

    @property
    def times(self) -> str:
        """All times that are known."""
        return self.time + (f"; {self.one_seed} with one seed" if self.one_seed else "")

    def load(self) -> Callable[[Run], Report]:
        """The study's function."""
        study: Callable[[Run], Report] = import_module(f"studies.{self.module}").study
        return study


STUDIES = {
    "car-compositions": Study(
        "car_compositions",
        "Fig. 2: where the dynamics model helps the car, open and closed loop, in which form",
        "2 h",
    ),
    "car-umaze": Study(
        "car_umaze", "T. 8, Fig. 2: whole plans of the car executed open loop, all peers", "5 h"
    ),
    "car-actions": Study(
        "car_actions",
        "the car's planned actions, and those read off planned states: what alternation is worth",
        "3 h; 25 min after car-umaze",
    ),
    "car-off-data": Study(
        "car_off_data",
        "starts and cars that the data do not have: MPDiffuser beside its planner alone",
        "5 h after car-actions and car-umaze",
    ),
    "car-data": Study(
        "car_data",
        "few expert drives: the car's planner, MPDiffuser and D-MPC",
        "3 h",
    ),
    "pendulum-ranking": Study(
        "pendulum_ranking",
        "T. 5: ConstrainedPendulum-v0, N = 1 … 64 ranked candidates; planner and SafeDiffuser",
        "6 h",
    ),
    "pendulum-calibration": Study(
        "pendulum_calibration",
        "why T. 5 comes out so: what chosen plans promise, and what their actions lead to",
        "30 min",
    ),
    "lqr-noise": Study(
        "lqr_noise",
        "T. 10, Fig. 12: LQR-v0, noise in the data, temperatures 0.001 … 1, all peers",
        "2 h",
    ),
    "lqr-dynamics-noise": Study(
        "lqr_dynamics_noise",
        "T. 11: LQR-v0, p = 0.8, a dynamics model that learned from noisy states",
        "3 h",
    ),
    "pendulum-images": Study(
        "pendulum_images",
        "T. 6: LatentPendulum-v0, planning from pictures, all peers",
        "3 h",
        "1 h",
    ),
    "alternation": Study(
        "alternation",
        "T. 12: alternation against more denoising, K = 10 … 200, three environments",
        "6 h",
        "2 h",
    ),
    "combined-score": Study(
        "combined_score",
        "T. 13: alternation against combined scores, with a grid of weights",
        "15 min",
    ),
    "initial-state": Study(
        "initial_state", "T. 9: the initial state inpainted or through FiLM", "90 min"
    ),
    "dynamics-condition": Study(
        "dynamics_condition", "T. 14: whether the dynamics model knows the task", "3 h"
    ),
    "causality": Study("causality", "T. 15: causal and acausal denoisers", "2 h"),
    "mismatch": Study("mismatch", "T. 16: planner and dynamics model of different data", "90 min"),
    "dmpc": Study("dmpc", "D-MPC beside MPDiffuser on LQR-v0", "90 min"),
    "sensitivity": Study(
        "sensitivity", "T. 17, 18: guidance scale, and number of candidates", "30 min"
    ),
    "warm-start": Study(
        "warm_start",
        "Fig. 13: return against milliseconds per action with warm starts, car and LQR-v0",
        "30 min",
    ),
    "lqr-compositions": Study(
        "lqr_compositions",
        "LQR-v0: planner alone and each composition, at p = 0.1 and 0.4 and three temperatures",
        "1 h",
    ),
    "lqr-steps": Study(
        "lqr_steps",
        "LQR-v0: what skipped levels do to each composition, with DDPM and DDIM",
        "10 min",
    ),
    "real-time": Study(
        "real_time",
        "return against milliseconds per action of the shipped agents: steps, warm starts, chunks",
        "75 min",
    ),
}


def run_study(name: str, scope: Scope) -> str:
    """Run a study, or go on with it, and write results, page and figure.

    Args:
        name: A key of `STUDIES`.
        scope: What it covers, and where it goes.

    Returns:
        The page, as Markdown.

    Raises:
        ConfigError: If there is no such study.
        DataError: If the folder holds results of another setting.
    """
    from studies.report import write_page
    from studies.results import Results
    from studies.runner import Run

    check_choice("study", name, STUDIES)
    results = Results(scope.folder / f"{name}.json", scope.setting, free=("seeds",))
    report = STUDIES[name].load()(Run(scope, results))
    results.save()
    return write_page(scope.folder, name, STUDIES[name], report, results)


def read_study(name: str, folder: Path) -> tuple[Report, Results]:
    """A study's report from its stored results; nothing is trained or measured.

    Args:
        name: A key of `STUDIES`.
        folder: Where ``name.json`` is.

    Returns:
        The report, and the results.

    Raises:
        ConfigError: If there is no such study.
        DataError: If results are missing or damaged.
    """
    from studies.results import Results
    from studies.runner import Run, Scope

    check_choice("study", name, STUDIES)
    results = Results.read(folder / f"{name}.json")
    scope = Scope.of_setting(folder, results.setting)
    return STUDIES[name].load()(Run(scope, results, read_only=True)), results
