"""Studies that vary one thing about MPDiffuser: the same variants, tuned alike, on several tasks.

A testbed is an environment with its data, what is measured in it, and which number counts. A
variant says how its networks and sampling options differ from the usual ones. The temperature of
every variant is chosen on validation starts, beside what it has to choose of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np

from studies.estimates import Estimate, cost_ratio, ratio_of, share
from studies.figures import dots
from studies.lqr_noise import noisy_data
from studies.measures import Measure, arrived, episodes, free, open_loop, regulation
from studies.networks import Data, Network
from studies.peers import ALONE, OURS
from studies.report import UNPUBLISHED, Ordering, Table, in_words
from studies.runner import Choice, Contender, Measurement, Run, Scope, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    "TESTBEDS",
    "Comparison",
    "Testbed",
    "Variant",
    "compared",
    "drawn",
    "driving",
    "sampling",
    "side_by_side",
    "two_kinds",
    "usual_above",
]

TEMPERATURES = (0.1, 0.5, 1.0)
MATCHED = {"composition": "alternating_matched"}
PLANNER = {"composition": "planner_only"}


@final
@dataclass(frozen=True)
class Testbed:
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
        """A network of this testbed.

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

    def changed(self, **options: Any) -> Testbed:
        """The same testbed with other sampling options."""
        return replace(self, options={**self.options, **options})


NetworkOf = Callable[[Scope, Testbed, int], Network]


def _usual(scope: Scope, testbed: Testbed, seed: int) -> Network:
    return testbed.network(scope, seed)


@final
@dataclass(frozen=True)
class Variant:
    """What differs.

    Attributes:
        options: Sampling options.
        network: Network for a run, a testbed and a training seed.
        grid: More options to choose from, with every temperature.
    """

    options: Mapping[str, Any] = field(default_factory=lambda: MATCHED)
    network: NetworkOf = _usual
    grid: Sequence[Mapping[str, Any]] = ({},)


@final
@dataclass(frozen=True)
class Comparison:
    """What was measured on one testbed.

    Attributes:
        testbed: The testbed.
        estimates: By name of the variant.
        choices: What was chosen for each.
        cells: What was measured of each, one cell for each training seed.
    """

    testbed: Testbed
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
        return Table(self.testbed.title, ("variant", self.testbed.unit, "chosen"), rows)

    def ordering(
        self, winner: str, loser: str, published: str = UNPUBLISHED, table: str = ""
    ) -> Ordering:
        """Whether one variant is better than another here; arguments as `Ordering`."""
        return Ordering(
            f"{winner} better than {loser}",
            self.estimates[winner],
            self.estimates[loser],
            published,
            self.testbed.higher,
            self.testbed.title,
            table,
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
        for method, options in ((ALONE, PLANNER), (OURS, MATCHED))
        for kind, make in ((other, network), (usual, _usual))
    }


def usual_above(
    found: Sequence[Comparison], usual: str, other: str, published: str, method: str, table: str
) -> list[Ordering]:
    """Whether the usual kind of `two_kinds` is better, on each testbed with each method.

    Args:
        found: Of `compared`.
        usual: Name of the usual kind.
        other: Name of the other kind.
        published: Values of one method.
        method: The method.
        table: Of the paper.
    """
    return [
        one.ordering(
            f"{name}, {usual}",
            f"{name}, {other}",
            *((published, table) if name == method else ()),
        )
        for name in (ALONE, OURS)
        for one in found
    ]


def side_by_side(found: Sequence[Comparison], published: Mapping[str, Any], text: str) -> Table:
    """A row for each variant, a column for each testbed.

    Args:
        found: Of `compared`, all with the same variants.
        published: Values by variant, where there are any.
        text: Below the table.
    """
    rows = [
        [name, *(one.estimates[name].short for one in found), published.get(name, UNPUBLISHED)]
        for name in found[0].estimates
    ]
    places = (f"{one.testbed.title}, {one.testbed.unit}" for one in found)
    heads = ["variant", *places, "published"]
    return Table("", heads, rows, text)


def sampling(found: Sequence[Comparison]) -> str:
    """The sampling options that all variants share, as a page tells them, for each testbed."""
    titles: dict[str, list[str]] = {}
    for testbed in (one.testbed for one in found):
        whole = ", whole plans" if testbed.measure is open_loop else ""
        titles.setdefault(f"{in_words(testbed.options)}{whole}", []).append(testbed.title)
    return "; ".join(f"{' and '.join(names)}: {words}" for words, names in titles.items()) + "."


def drawn(found: Sequence[Comparison]) -> Figure:
    """All estimates with their intervals, a panel for each testbed."""
    panels = {one.testbed.title: one.estimates for one in found}
    return dots(panels, {one.testbed.title: one.testbed.unit for one in found})


def compared(
    run: Run,
    rivals: Sequence[tuple[Testbed, Mapping[str, Variant]]],
    temperatures: Sequence[float] = (),
) -> list[Comparison]:
    """Tune and measure variants on testbeds.

    Args:
        run: Of the study.
        rivals: Variants by name for each testbed.
        temperatures: To choose from; `TEMPERATURES` if empty. One alone is not searched.
    """
    tried = [{"temperature": one} for one in temperatures or TEMPERATURES]
    return [_comparison(run, testbed, variants, tried) for testbed, variants in rivals]


def _comparison(
    run: Run, testbed: Testbed, variants: Mapping[str, Variant], tried: Sequence[Mapping[str, Any]]
) -> Comparison:
    scope = run.scope
    contenders = {
        (testbed.title, name): Contender(
            variant.network(scope, testbed, scope.seeds[0]),
            testbed.measure,
            {**testbed.options, **variant.options},
            [{**own, **one} for own in variant.grid for one in tried],
        )
        for name, variant in variants.items()
    }
    choices = run.tune(contenders, testbed.score)
    cells = run.measure(
        {
            (testbed.title, name, seed): Measurement(
                variant.network(scope, testbed, seed),
                testbed.measure,
                scope.starts,
                choices[testbed.title, name].options,
            )
            for name, variant in variants.items()
            for seed in scope.seeds
        }
    )
    found = {name: of_seeds(cells, testbed.title, name, seeds=scope.seeds) for name in variants}
    estimates = {name: testbed.estimate(cells) for name, cells in found.items()}
    chosen = {name: choices[testbed.title, name] for name in variants}
    return Comparison(testbed, estimates, chosen, found)


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
LQR_CLEAN = Testbed("LQR-v0, p = 0.1", data=noisy_data(10), **LQR)
LQR_NOISY = Testbed("LQR-v0, p = 0.4", data=noisy_data(40), **LQR)
CAR = Testbed(
    "CarUMaze-v0, open loop",
    "CarUMaze-v0",
    open_loop,
    _arrived_share,
    _free_score,
    "success %",
    options={"num_steps": 10, "num_candidates": 1, "guidance_scale": 1.0},
)
PENDULUM = Testbed(
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


def driving(drives: int) -> Testbed:
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
TESTBEDS = (LQR_CLEAN, LQR_NOISY, CAR)
RETRAINED = (LQR_CLEAN, LQR_NOISY, FEW_DRIVES)  # where a variant trains all networks anew
