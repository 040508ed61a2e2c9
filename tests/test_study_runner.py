"""What all studies share: networks by key, estimates, tuning, reports, and the page of results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpd_gym.errors import ConfigError, DataError
from studies import STUDIES, read_study
from studies.estimates import Estimate, average, cost_ratio, share
from studies.networks import Data, Network, Shipped
from studies.report import Curve, Ordering, Panel, Report, Table, curves, markdown_table
from studies.results import Results
from studies.runner import Book, Cell, Choice, Contender, Scope
from studies.summary import write_summary


def estimate(mean: float, half: float, *seeds: float) -> Estimate:
    return Estimate(mean, mean - half, mean + half, seeds or (mean,))


# --- estimates -------------------------------------------------------------------------------


def test_estimates_pool_the_trials_of_all_seeds() -> None:
    # Wilson interval of 5 in 10: centre 0.5, half width 0.2634
    cells = [{"ok": [True] * 4 + [False]}, {"ok": [True] + [False] * 4}]
    assert str(share(cells, lambda cell: cell["ok"])) == "**50.0** [23.7, 76.3] (80.0, 20.0)"
    # t interval of 1, 2, 3: 2 ± 4.303 / sqrt(3)
    assert str(average([{"r": [1.0, 2.0, 3.0]}], "r", 2)) == "**2.00** [-0.48, 4.48] (one seed)"
    pairs = [{"costs": [2.0, 4.0], "optimal_costs": [1.0, 2.0]}]
    found = cost_ratio(pairs)
    assert (found.mean, found.low, found.high, found.seeds) == (2.0, 2.0, 2.0, (2.0,))


@pytest.mark.parametrize(
    ("winner", "loser", "higher", "verdict", "seeds"),
    [
        (estimate(2, 0.1, 2, 2), estimate(1, 0.1, 1, 3), True, "holds", "1 of 2"),
        (estimate(2, 1), estimate(1, 1), True, "holds, intervals overlap", "1 of 1"),
        (estimate(1, 1), estimate(2, 1), True, "not seen, intervals overlap", "0 of 1"),
        (estimate(2, 0.1), estimate(1, 0.1), False, "**does not hold**", "0 of 1"),
    ],
)
def test_orderings(
    winner: Estimate, loser: Estimate, higher: bool, verdict: str, seeds: str
) -> None:
    ordering = Ordering("a above b", winner, loser, "2 : 1", higher)
    assert ordering.row() == ["a above b", "2 : 1", ordering.row()[2], verdict, seeds]


def test_what_is_not_published_is_told_apart() -> None:
    pair = estimate(2, 0.1), estimate(1, 0.1)
    both = [Ordering("a above b", *pair, "2 : 1"), Ordering("a above c", *pair, "–")]
    text = "\n".join(Report("Title", "Text.", (), both).lines(""))
    published, others = text.split("## Other comparisons")
    assert "## Published orderings" in published
    assert "| a above b | 2 : 1 | 2.000 : 1.000 | holds | 1 of 1 |" in published
    assert "| a above c | 2.000 : 1.000 | holds | 1 of 1 |" in others
    assert "Other" not in "\n".join(Report("Title", "Text.", (), both[:1]).lines(""))


# --- networks --------------------------------------------------------------------------------


def test_names_tell_networks_apart_and_know_the_same_ones() -> None:
    plain = Network("CarUMaze-v0", 1)
    assert plain.name == "car-seed1"  # what other runs put there is found
    assert Network("ConstrainedPendulum-v0", 3).name == "pendulum-seed3"
    same = Network("LQR-v0", 0, data=(Data("mpd_gym/lqr/noisy-p40-v0"),), changes={"horizon": 32})
    assert same.name == Network("LQR-v0", 0).name  # what is usual need not be said
    kinds = [
        Network("LQR-v0", 0, data=(Data("mpd_gym/lqr/noisy-p10-v0"),)),
        Network("LQR-v0", 0, data=(Data("mpd_gym/lqr/noisy-p80-v0"),)),
        Network("LQR-v0", 0, data=(Data("mpd_gym/lqr/noisy-p80-v0", state_noise=0.1),)),
        Network("LQR-v0", 0, "diffuser"),
        Network("LQR-v0", 0, preset="paper"),
        Network("LQR-v0", 0, changes={"diffusion_steps": 7}),
        Network("LQR-v0", 0, changes={"diffusion_steps": 7}, planner=Network("LQR-v0", 0)),
    ]
    assert len({kind.digest for kind in kinds}) == len({kind.name for kind in kinds}) == len(kinds)
    one, two = (Network("LQR-v0", seed, changes={"horizon": 16}) for seed in (1, 2))
    assert one.digest == two.digest and one.name != two.name
    assert one.config.training.seed == one.config.seed == 1


def test_a_peer_leaves_out_changes_of_fields_that_it_lacks() -> None:
    cloned = Network("LQR-v0", 0, "behavior_cloning", changes={"horizon": 16, "hidden": (8,)})
    assert cloned.config.hidden == (8,)  # type: ignore[attr-defined]
    assert not hasattr(cloned.config, "horizon")


FP32 = {"precision": "fp32"}

# --- book ------------------------------------------------------------------------------------


def counted(agent: Any, env_id: str, starts: list[int]) -> dict[str, Any]:
    """Score of tried options: the nearer to 0.3 the temperature, the better."""
    return {"score": -abs(agent.options.temperature - 0.3), "starts": len(starts)}


def book(folder: Path, trials: int = 2) -> Book:
    scope = Scope(folder, (0,), trials, processes=0)
    return Book(scope, Results(folder / "x.json", scope.setting, free=("seeds",)))


def shipped() -> Shipped:
    from mpd_gym.agents.serialization import agent_path

    return Shipped("LQR-v0", agent_path("LQR-v0"))


def test_tuning_takes_the_best_on_validation_starts_and_keeps_the_grid(tmp_path: Path) -> None:
    grid = [{"temperature": one, "guidance_scale": 1.0} for one in (0.1, 0.35, 1.0)]
    rivals = {("a", 1): Contender(shipped(), counted, {"num_steps": 2}, grid)}
    choice = book(tmp_path, trials=500).tune(rivals, lambda cell: cell["score"])["a", 1]
    assert choice.options == {"num_steps": 2, "temperature": 0.35, "guidance_scale": 1.0}
    assert choice.among(temperature=1.0)["temperature"] == 1.0
    cells = json.loads((tmp_path / "x.json").read_text())["cells"]
    assert len(cells) == 3
    for cell in cells.values():
        assert cell["of"]["starts"] == [100_000, 100_064] and cell["starts"] == 64
    single = {"b": Contender(shipped(), counted, {"num_steps": 3}, [{}])}
    assert book(tmp_path, 500).tune(single, lambda cell: 0.0) == {
        "b": Choice((({"num_steps": 3}, 0.0),))
    }


def test_a_book_of_another_setting_is_refused_and_more_seeds_are_not(tmp_path: Path) -> None:
    book(tmp_path).measure({"a": Cell(shipped(), counted, range(2))})
    more = Scope(tmp_path, (0, 1), 2, processes=0)
    Results(tmp_path / "x.json", more.setting, free=("seeds",))
    with pytest.raises(DataError, match="another folder"):
        book(tmp_path, trials=3)


def begun(place: str) -> dict[str, Any]:
    """A cell that takes longer than the test, and says which process measures it."""
    Path(place).write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def fill_for_long(folder: str) -> None:
    results = Results(Path(folder) / "x.json", {})
    results.fill({"a": (f"{folder}/worker",)}, begun, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_measures_ends_with_the_study(number: int, tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    call = f"from {__name__} import fill_for_long; fill_for_long({str(tmp_path)!r})"
    study = subprocess.Popen(
        [sys.executable, "-c", call], env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE
    )
    with study:
        try:
            assert until(lambda: (tmp_path / "worker").exists(), 120)
            assert until(lambda: (tmp_path / "worker").read_text() != "", 10)
            worker = int((tmp_path / "worker").read_text())
            os.kill(worker, 0)
        finally:
            study.send_signal(number)
    assert until(lambda: not alive(worker), 10)


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether something holds before the time is over."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")  # where there is /proc
        return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_precision_reaches_every_cell_that_asks_for_none(tmp_path: Path) -> None:
    scope = Scope(tmp_path, (0,), 2, processes=0, precision="bf16")
    cells = {"a": Cell(shipped(), counted, range(2)), "b": Cell(shipped(), counted, range(2), FP32)}
    found = Book(scope, Results(tmp_path / "x.json", scope.setting)).measure(cells)
    assert [cell["of"]["options"]["precision"] for cell in found.values()] == ["bf16", "fp32"]
    with pytest.raises(DataError, match="another folder"):
        book(tmp_path)
    with pytest.raises(ConfigError, match="precision"):
        Scope(tmp_path, (0,), 2, precision="fp16")


# --- reports ---------------------------------------------------------------------------------


def test_reports_and_figures(tmp_path: Path) -> None:
    assert markdown_table(["a", "b"], [["1", 2]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    line = Curve([1, 2], [estimate(1, 0.1), estimate(2, 0.1)], [1.0, 1.5])
    figure = curves([Panel("t", {"a": line}, "x", "y", log=True, ticks=True)] * 4)
    report = Report("Title", "Text.", [Table("Part", ["h"], [["v"]], "Words.")], (), figure)
    text = report.write(tmp_path, "name")
    assert text.startswith("# Title\n\nText.\n\n![Title](name.png)\n\n## Part\n\nWords.\n")
    assert (tmp_path / "name.png").stat().st_size > 1000


def test_a_name_has_one_colour_in_all_panels_and_stands_in_the_legend() -> None:
    line = Curve([1, 2], [estimate(1, 0.1), estimate(2, 0.1)])
    figure = curves(
        [Panel("t", {name: line for name in names}, "x", "y") for names in ("ab", "bc")]
    )
    left, right = ([one.get_color() for one in axes.get_lines()] for axes in figure.axes)
    assert left[1] == right[0] and len({*left, *right}) == 3
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]


def test_the_page_of_results_says_what_has_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "docs/results"
    with pytest.raises(DataError, match="no such folder"):
        write_summary(folder)
    folder.mkdir(parents=True)
    (folder / "lqr-steps.json").write_text(
        json.dumps(
            {
                "setting": {"preset": "laptop", "trials": 2, "seeds": [0]},
                "made_with": {},
                "cells": {},
            }
        )
    )
    page = write_summary(folder)
    assert page == tmp_path / "docs/results.md"
    text = page.read_text()
    assert text.count("not run yet") == len(STUDIES) - 1
    assert "incomplete: the study is not complete: 30 of 30 cells are missing" in text
    with pytest.raises(ConfigError, match="study"):
        read_study("lqr-step", folder)


def test_the_page_of_results_shows_orderings_and_their_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies import summary

    folder = tmp_path / "results"
    folder.mkdir()
    cause = "> Temperature\n> decides.\n\nIt is, see [steps](lqr-steps.md)."
    (folder / "lqr-noise.cause.md").write_text(f"{cause}\n")
    Results(folder / "lqr-noise.json", {}).save()
    ordering = Ordering("a above b", estimate(1, 0.1), estimate(2, 0.1), "2 : 1")
    report = Report("Noise", "Text.", [], [ordering])

    def read(name: str, place: Path) -> Report:
        if name != "lqr-noise":
            raise DataError("missing", source=name)
        return report

    monkeypatch.setattr(summary, "read_study", read)
    text = write_summary(folder).read_text()
    assert "| lqr-noise | a above b | 2 : 1 | 1.000 : 2.000 | **does not hold** | 0 of 1 |" in text
    assert "Of 1: 1 does not hold." in text
    assert "| [lqr-noise](results/lqr-noise.md) |  |  |  | 1 | Temperature decides. |" in text
    assert "## Noise\n\nText.\n\n> Temperature\n> decides.\n\nIt is" in text
    assert "[steps](results/lqr-steps.md)" in text
    assert cause in (folder / "lqr-noise.md").read_text()
