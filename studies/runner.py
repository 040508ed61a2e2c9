"""What all studies share: measurements that are made once, options that are tuned, and a report.

A study is a function ``study(run) -> Report``. It asks its `Run` for measurements: an agent, how it
samples, and what is measured from which starts. A run trains missing networks, measures what is
missing, and stores each measurement when it is done; a run that only reads gives what is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, final

from mpd_gym.agents import agent_class
from mpd_gym.agents.base import Agent
from mpd_gym.agents.safediffuser import LIMITS
from mpd_gym.errors import DataError, check_choice
from mpd_gym.models.backends.choice import PRECISIONS
from studies.measures import Measure
from studies.networks import Network, Shipped
from studies.results import Results

__all__ = ["VALIDATION_START", "Choice", "Contender", "Measurement", "Run", "Scope", "of_seeds"]

# Options of a measurement that names no others, whatever the agent's own are.
PLAIN: Mapping[str, Any] = {"samples_per_candidate": 1, "warm_start_steps": 0}
FIRST_TRIAL = 0  # seed of the first start; the data's seeds are far from these
VALIDATION_START = 100_000  # seed of the first start that options are tuned on
VALIDATION_TRIALS = 64

Key = TypeVar("Key", bound=Hashable)
Found = dict[str, Any]


@final
@dataclass(frozen=True)
class Scope:
    """What a run of a study covers, and where it goes.

    Attributes:
        folder: Of results and figures; agents are in the folder ``agents`` in it, which studies
            share.
        seeds: Training seeds.
        trials: Starts of each measurement; the same for all methods.
        preset: ``"laptop"`` or ``"paper"``.
        processes: That measure; 0 measures in this one.
        precision: Arithmetic of the denoisers where a study asks for none, see `SamplingConfig`.
        changes: Fields of every agent's configuration that differ, for a try with small networks.

    Raises:
        ConfigError: If there is no such precision.
    """

    folder: Path
    seeds: tuple[int, ...]
    trials: int
    preset: str = "laptop"
    processes: int = 2
    precision: str = "fp32"
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)

    @classmethod
    def of_setting(cls, folder: Path, setting: Mapping[str, Any]) -> Scope:
        """Scope of stored results, to read them.

        Raises:
            DataError: If the setting is not one of a study.
        """
        try:
            seeds, trials, preset = (setting[name] for name in ("seeds", "trials", "preset"))
        except KeyError as error:
            raise DataError(f"the setting lacks {error}", source=str(folder)) from error
        return cls(folder, tuple(seeds), trials, preset)

    @property
    def starts(self) -> range:
        """Seeds of the starts."""
        return range(FIRST_TRIAL, FIRST_TRIAL + self.trials)

    @property
    def told(self) -> str:
        """Trials and training seeds, as pages tell them."""
        seeds = ", ".join(map(str, self.seeds))
        which = f"training seeds {seeds}" if len(self.seeds) > 1 else f"training seed {seeds}"
        return f"Mean [95 % interval over trials]; {self.trials} trials, {which}"

    def network(self, env_id: str, seed: int, method: str = "mpdiffuser", **fields: Any) -> Network:
        """A network of this run's preset.

        Args:
            env_id: Environment.
            seed: Training seed.
            method: A key of `mpd_gym.agents.AGENTS`.
            fields: Of `Network`.
        """
        changes = {**self.changes, **fields.pop("changes", {})}
        return Network(env_id, seed, method, self.preset, changes=changes, **fields)

    @property
    def setting(self) -> dict[str, Any]:
        """What a file of results says of the run; only `seeds` may change for it to grow."""
        tried = {name: str(value) for name, value in self.changes.items()}
        return {
            "preset": self.preset,
            "trials": self.trials,
            "seeds": list(self.seeds),
            **({} if self.precision == "fp32" else {"precision": self.precision}),
            **({"changes": tried} if tried else {}),
        }


@final
@dataclass(frozen=True)
class Measurement:
    """What is measured of an agent, and how.

    Attributes:
        network: The agent.
        measure: What is measured, see `studies.measures`.
        starts: Seeds of the starts.
        options: Sampling options. Otherwise a candidate is one sample and every plan starts from
            noise, and the others are the agent's own.
        method: ``"safediffuser"`` or ``"planner"`` to put the network's planner to that use; empty
            for the network's own method.
        env_kwargs: Constants of the environment that differ from the usual ones.
    """

    network: Network | Shipped
    measure: Measure
    starts: range
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def agent(self, folder: Path) -> Agent[Any]:
        """Load the agent from a folder of agents."""
        agent = self.network.load(folder)
        kind: Any = agent_class(self.method or self.network.method)
        if self.method == "safediffuser":
            agent = kind.of(agent, limits=LIMITS[self.network.env_id])
        elif self.method:
            agent = kind.of(agent)
        return agent.with_options(**{**PLAIN, **self.options})

    @property
    def identity(self) -> dict[str, Any]:
        """What stored values must be of, JSON values."""
        return {
            "network": self.network.name,
            "measure": self.measure.__name__,
            "starts": [self.starts.start, self.starts.stop],
            "options": _plain(self.options),
            **({"method": self.method} if self.method else {}),
            **({"env_kwargs": dict(self.env_kwargs)} if self.env_kwargs else {}),
        }


@final
@dataclass(frozen=True)
class Contender:
    """A method whose options are tuned.

    Attributes:
        network: The agent that is tuned.
        measure: What is measured.
        options: Options that it keeps.
        grid: Options to choose from, the same for all that are compared.
        method: As for `Measurement`.
    """

    network: Network
    measure: Measure
    options: Mapping[str, Any]
    grid: Sequence[Mapping[str, Any]]
    method: str = ""


@final
@dataclass(frozen=True)
class Choice:
    """What tuning found.

    Attributes:
        tried: Options, those that the method keeps included, and the score of each.
    """

    tried: tuple[tuple[dict[str, Any], float], ...]

    @property
    def options(self) -> dict[str, Any]:
        """The best ones."""
        return self.among()

    def among(self, **fixed: Any) -> dict[str, Any]:
        """The best ones among those with certain values."""
        kept = [
            pair
            for pair in self.tried
            if all(pair[0].get(name) == value for name, value in fixed.items())
        ]
        return dict(max(kept, key=lambda pair: pair[1])[0])


@final
class Run:
    """One study, run or read.

    Args:
        scope: What the run covers.
        results: Where values are stored.
        read_only: Give what is stored; neither train nor measure.
    """

    def __init__(self, scope: Scope, results: Results, *, read_only: bool = False) -> None:
        self.scope = scope
        self._results = results
        self.read_only = read_only

    def measure(
        self, measurements: Mapping[Key, Measurement], *, alone: bool = False
    ) -> dict[Key, Found]:
        """Stored values, and the others after training what they need.

        Args:
            measurements: By key, a tuple of names and numbers, or a name.
            alone: Measure one at a time, for times.

        Raises:
            DataError: If one is missing and this run only reads.
        """
        cells = {key: self._in_precision(cell) for key, cell in measurements.items()}
        names = {key: _name(key, cell) for key, cell in cells.items()}
        stored = self._results.cells
        if self.read_only:
            missing = [name for name in names.values() if name not in stored]
            if missing:
                raise DataError(
                    f"the study is not complete: {len(missing)} of {len(cells)} measurements are "
                    f"missing, the first is {missing[0]!r}; run it again to go on",
                    source=str(self._results.path),
                )
            return {key: stored[name] for key, name in names.items()}
        self._train(cell for key, cell in cells.items() if self._is_due(names[key], cell))
        jobs = {names[key]: (self._agents, cell) for key, cell in cells.items()}
        due = {names[key]: cell for key, cell in cells.items()}
        found = self._results.fill(
            jobs,
            _measured,
            min(self.scope.processes, 1) if alone else self.scope.processes,
            again=lambda name, values: values.get("of") != due[name].identity,
        )
        return {key: found[name] for key, name in names.items()}

    def tune(
        self, contenders: Mapping[Key, Contender], score: Callable[[Found], float]
    ) -> dict[Key, Choice]:
        """Choose options on validation starts, which nothing else is measured from.

        Args:
            contenders: By key. One with a single choice is not measured.
            score: Of measured values; the highest wins, and the first of several.
        """
        starts = _validation(self.scope.trials)
        cells = {
            ("validation", *_parts(key), _shown(tried)): Measurement(
                one.network, one.measure, starts, {**one.options, **tried}, one.method
            )
            for key, one in contenders.items()
            if len(one.grid) > 1
            for tried in one.grid
        }
        scores = {key: score(cell) for key, cell in self.measure(cells).items()}
        return {
            key: Choice(
                tuple(
                    (
                        {**one.options, **tried},
                        scores.get(("validation", *_parts(key), _shown(tried)), 0.0),
                    )
                    for tried in one.grid
                )
            )
            for key, one in contenders.items()
        }

    @property
    def _agents(self) -> Path:
        return self.scope.folder / "agents"

    def _in_precision(self, cell: Measurement) -> Measurement:
        if self.scope.precision == "fp32":
            return cell
        return replace(cell, options={"precision": self.scope.precision, **cell.options})

    def _is_due(self, name: str, cell: Measurement) -> bool:
        return self._results.cells.get(name, {}).get("of") != cell.identity

    def _train(self, cells: Any) -> None:
        networks = {cell.network.name: cell.network for cell in cells}
        for name, network in networks.items():
            network.train(self._agents, parallel=self.scope.processes > 1)
            history = network.load(self._agents).history
            seconds = [entry["seconds"] for entry in history.values() if "seconds" in entry]
            self._results.add_network(name, sum(seconds))


def of_seeds(cells: Mapping[Any, Found], *key: Hashable, seeds: Sequence[int]) -> list[Found]:
    """Values ``(*key, seed)`` of all seeds."""
    return [cells[(*key, seed)] for seed in seeds]


def _measured(folder: Path, cell: Measurement) -> Found:
    """Measured values, and what they are of."""
    began = time.perf_counter()
    elsewhere = {"env_kwargs": cell.env_kwargs} if cell.env_kwargs else {}
    agent, env_id = cell.agent(folder), cell.network.env_id
    values = cell.measure(agent, env_id, list(cell.starts), **elsewhere)
    seconds = round(time.perf_counter() - began, 2)
    return {"of": cell.identity, "seconds": seconds, **values}


def _validation(trials: int) -> range:
    return range(VALIDATION_START, VALIDATION_START + min(trials, VALIDATION_TRIALS))


def _name(key: Hashable, cell: Measurement) -> str:
    """Key of stored values."""
    return ", ".join([*map(str, _parts(key)), f"starts {cell.starts.start}–{cell.starts.stop - 1}"])


def _parts(key: Hashable) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _shown(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
    }
