"""Studies that vary one thing about MPDiffuser: the same variants, tuned alike, on several tasks.

A task is an environment with its data, what is measured in it, and which number counts. A variant
says how its networks and sampling options differ from the usual ones. The temperature of every
variant is chosen on validation starts, beside what it has to choose of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np

from studies.estimates import Estimate, cost_ratio, ratio_of, share
from studies.lqr_noise import noisy_data
from studies.measures import Measure, arrived, episodes, free, open_loop, regulation
from studies.networks import Data, Network
from studies.report import Ordering, Table
from studies.runner import Book, Cell, Choice, Contender, Scope, of_seeds

__all__ = [
    "CAR",
    "EXPERT",
    "FEW_DRIVES",
    "LQR_CLEAN",
    "LQR_NOISY",
    "MATCHED",
    "NOISY",
    "PENDULUM",
    "PLANNER",
    "RETRAINED",
    "TASKS",
    "Outcome",
    "Task",
    "Variant",
    "compared",
    "driving",
    "two_kinds",
    "usual_above",
]

TEMPERATURES = (0.1, 0.5, 1.0)
MATCHED = {"composition": "alternating_matched"}
PLANNER = {"composition": "planner_only"}


@final
@dataclass(frozen=True)
class Task:
    """Where variants are compared.

    Attributes:
        title: Of its table.
        env_id: Environment.
        measure: What is measured.
        estimate: The number that counts, from the cells of all seeds.
        score: The same of one cell, higher is better; what options are tuned by.
        unit: What the number is.
        higher: Whether a higher number is better.
        options: Sampling options of all variants.
        data: Empty for the environment's usual data.
        dynamics_data: Of the dynamics model, where it has other data.
        steps: Of training; 0 for the preset's.
    """

    title: str
    env_id: str
    measure: Measure
    estimate: Callable[[Sequence[Mapping[str, Any]]], Estimate]
    score: Callable[[dict[str, Any]], float]
    unit: str
    higher: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[Data, ...] = ()
    dynamics_data: tuple[Data, ...] = ()
    steps: int = 0

    def network(self, scope: Scope, seed: int, **fields: Any) -> Network:
        """A network of this task.

        Args:
            scope: Of the run.
            seed: Training seed.
            fields: Of `Network`.
        """
        mine = {"data": self.data, "dynamics_data": self.dynamics_data}
        if self.steps and "training" not in scope.changes:
            usual = scope.network(self.env_id, seed).config.training
            changes = {"training": replace(usual, steps=self.steps), **fields.get("changes", {})}
            fields = {**fields, "changes": changes}
        return scope.network(self.env_id, seed, **{**mine, **fields})

    def changed(self, **options: Any) -> Task:
        """The same task with other sampling options."""
        return replace(self, options={**self.options, **options})


NetworkOf = Callable[[Scope, Task, int], Network]


def _usual(scope: Scope, task: Task, seed: int) -> Network:
    return task.network(scope, seed)


@final
@dataclass(frozen=True)
class Variant:
    """What differs.

    Attributes:
        options: Sampling options.
        network: Network for a run, a task and a training seed.
        grid: More options to choose from, with every temperature.
    """

    options: Mapping[str, Any] = field(default_factory=lambda: MATCHED)
    network: NetworkOf = _usual
    grid: Sequence[Mapping[str, Any]] = ({},)


@final
@dataclass(frozen=True)
class Outcome:
    """What was measured on one task.

    Attributes:
        task: The task.
        estimates: By name of the variant.
        choices: What was chosen for each.
        cells: What was measured of each, one cell for each training seed.
    """

    task: Task
    estimates: Mapping[str, Estimate]
    choices: Mapping[str, Choice]
    cells: Mapping[str, Sequence[Mapping[str, Any]]]

    def table(self) -> Table:
        """Every variant with what was chosen for it."""
        rows = []
        for name, estimate in self.estimates.items():
            chosen = self.choices[name]
            tried = len(chosen.tried) > 1
            names = ("temperature", "dynamics_weight") if tried else ()
            shown = {key: chosen.options[key] for key in names if key in chosen.options}
            told = ", ".join(f"{key} {value:g}" for key, value in shown.items())
            rows.append([name, estimate, told or "–"])
        return Table(self.task.title, ("variant", self.task.unit, "chosen"), rows)

    def ordering(self, winner: str, loser: str, published: str) -> Ordering:
        """Whether one variant is better than another here."""
        word = "above" if self.task.higher else "below"
        return Ordering(
            f"{winner} {word} {loser}, {self.task.title}",
            self.estimates[winner],
            self.estimates[loser],
            published,
            self.task.higher,
        )


def two_kinds(usual: str, other: str, network: NetworkOf) -> dict[str, Variant]:
    """Planner and MPDiffuser, each with the usual networks and with those of another kind.

    Args:
        usual: Name of the usual kind.
        other: Name of the other kind.
        network: The other kind.
    """
    return {
        f"{method}, {kind}": Variant(options, make)
        for method, options in (("planner", PLANNER), ("MPDiffuser", MATCHED))
        for kind, make in ((other, network), (usual, _usual))
    }


def usual_above(
    found: Sequence[Outcome], usual: str, other: str, published: Mapping[str, str]
) -> list[Ordering]:
    """Whether the usual kind of `two_kinds` is better, on each task with each method.

    Args:
        found: Of `compared`.
        usual: Name of the usual kind.
        other: Name of the other kind.
        published: Values by method, where there are any.
    """
    return [
        outcome.ordering(f"{method}, {usual}", f"{method}, {other}", published.get(method, "–"))
        for outcome in found
        for method in ("planner", "MPDiffuser")
    ]


def compared(
    book: Book,
    rivals: Sequence[tuple[Task, Mapping[str, Variant]]],
    temperatures: Sequence[float] = (),
) -> list[Outcome]:
    """Tune and measure variants on tasks.

    Args:
        book: Of the study.
        rivals: Variants by name for each task.
        temperatures: To choose from; `TEMPERATURES` if empty. One alone is not searched.
    """
    tried = [{"temperature": one} for one in temperatures or TEMPERATURES]
    return [_outcome(book, task, variants, tried) for task, variants in rivals]


def _outcome(
    book: Book, task: Task, variants: Mapping[str, Variant], tried: Sequence[Mapping[str, Any]]
) -> Outcome:
    scope = book.scope
    contenders = {
        (task.title, name): Contender(
            variant.network(scope, task, scope.seeds[0]),
            task.measure,
            {**task.options, **variant.options},
            [{**own, **one} for own in variant.grid for one in tried],
        )
        for name, variant in variants.items()
    }
    choices = book.tune(contenders, task.score)
    cells = book.measure(
        {
            (task.title, name, seed): Cell(
                variant.network(scope, task, seed),
                task.measure,
                scope.starts,
                choices[task.title, name].options,
            )
            for name, variant in variants.items()
            for seed in scope.seeds
        }
    )
    found = {name: of_seeds(cells, task.title, name, seeds=scope.seeds) for name in variants}
    estimates = {name: task.estimate(cells) for name, cells in found.items()}
    chosen = {name: choices[task.title, name] for name in variants}
    return Outcome(task, estimates, chosen, found)


def _arrived_share(cells: Sequence[Mapping[str, Any]]) -> Estimate:
    return share(cells, arrived)


def _success_share(cells: Sequence[Mapping[str, Any]]) -> Estimate:
    return share(cells, lambda cell: cell["success"])


def _free_score(cell: dict[str, Any]) -> float:
    return float(np.mean(free(cell)))


def _success_score(cell: dict[str, Any]) -> float:
    return float(np.mean(cell["success"]))


def _ratio_score(cell: dict[str, Any]) -> float:
    return -ratio_of(cell)


LQR: dict[str, Any] = {
    "env_id": "LQR-v0",
    "measure": regulation,
    "estimate": cost_ratio,
    "score": _ratio_score,
    "unit": "cost ÷ optimal cost",
    "higher": False,
    "options": {"num_steps": 10, "action_chunk": 8, "guidance_scale": 1.0},
}
LQR_CLEAN = Task("LQR-v0, p = 0.1", data=noisy_data(10), **LQR)
LQR_NOISY = Task("LQR-v0, p = 0.4", data=noisy_data(40), **LQR)
CAR = Task(
    "CarUMaze-v0, open loop",
    "CarUMaze-v0",
    open_loop,
    _arrived_share,
    _free_score,
    "success %",
    options={"num_steps": 10, "num_candidates": 1, "guidance_scale": 1.0},
)
PENDULUM = Task(
    "ConstrainedPendulum-v0",
    "ConstrainedPendulum-v0",
    episodes,
    _success_share,
    _success_score,
    "success %",
    options={"num_candidates": 4, "action_chunk": 8},
)
EXPERT, RANDOM = "mpd_gym/car-umaze/expert-v0", "mpd_gym/car-umaze/random-v0"
NOISY = "mpd_gym/car-umaze/noisy-v0"


def driving(drives: int) -> Task:
    """The maze, known from a number of expert drives and 1,000 random ones.

    The planner learns from the former, the dynamics model from both, for a quarter of the usual
    training.

    Args:
        drives: Number of expert drives.
    """
    expert = Data(EXPERT, first=drives)
    return replace(
        CAR,
        title=f"CarUMaze-v0, {drives} expert drives",
        data=(expert,),
        dynamics_data=(expert, Data(RANDOM)),
        steps=6_000,
    )


FEW_DRIVES = driving(200)
TASKS = (LQR_CLEAN, LQR_NOISY, CAR)
RETRAINED = (LQR_CLEAN, LQR_NOISY, FEW_DRIVES)  # where a variant trains all networks anew
