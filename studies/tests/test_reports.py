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
from studies import STUDIES, Study, read_study
from studies.estimates import Estimate, average, cost_ratio, share
from studies.figures import Curve, Panel, curves, dots
from studies.networks import Data, Network, Shipped
from studies.report import (
    LITERAL,
    OURS,
    Finding,
    Ordering,
    Report,
    Table,
    in_words,
    write_page,
)
from studies.results import Results
from studies.runner import Choice, Contender, Measurement, Run, Scope
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
        (estimate(2, 1), estimate(1, 1), True, "not apart", "1 of 1"),
        (estimate(1, 1), estimate(2, 1), True, "not apart", "0 of 1"),
        (estimate(2, 0.1), estimate(1, 0.1), False, "does not hold", "0 of 1"),
    ],
)
def test_orderings(
    winner: Estimate, loser: Estimate, higher: bool, verdict: str, seeds: str
) -> None:
    ordering = Ordering("a above b", winner, loser, "2 : 1", higher)
    assert (ordering.verdict, ordering.seeds) == (verdict, seeds)


def test_differences_are_taken_trial_by_trial() -> None:
    one, two = (average([{"r": values}], "r", 1) for values in ([3.0, 5.0, 10.0], [1.0, 3.0, 8.0]))
    assert Ordering("a above b", one, two).difference == "+2.0 ± 0.0"
    longer = average([{"r": [1.0] * 4}], "r", 1)
    assert Ordering("a above b", one, longer).difference == "–"


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

# --- runs -------------------------------------------------------------------------------------


def counted(agent: Any, env_id: str, starts: list[int]) -> dict[str, Any]:
    """Score of tried options: the nearer to 0.3 the temperature, the better."""
    return {"score": -abs(agent.options.temperature - 0.3), "starts": len(starts)}


def run(folder: Path, trials: int = 2) -> Run:
    scope = Scope(folder, (0,), trials, processes=0)
    return Run(scope, Results(folder / "x.json", scope.setting, free=("seeds",)))


def shipped() -> Any:
    from mpd_gym.agents.serialization import agent_path

    return Shipped("LQR-v0", agent_path("LQR-v0"))


def test_tuning_takes_the_best_on_validation_starts_and_keeps_the_grid(tmp_path: Path) -> None:
    grid = [{"temperature": one, "guidance_scale": 1.0} for one in (0.1, 0.35, 1.0)]
    rivals = {("a", 1): Contender(shipped(), counted, {"num_steps": 2}, grid)}
    choice = run(tmp_path, trials=500).tune(rivals, lambda cell: cell["score"])["a", 1]
    assert choice.options == {"num_steps": 2, "temperature": 0.35, "guidance_scale": 1.0}
    assert choice.among(temperature=1.0)["temperature"] == 1.0
    cells = json.loads((tmp_path / "x.json").read_text())["cells"]
    assert len(cells) == 3
    for cell in cells.values():
        assert cell["of"]["starts"] == [100_000, 100_064] and cell["starts"] == 64
    single = {"b": Contender(shipped(), counted, {"num_steps": 3}, [{}])}
    assert run(tmp_path, 500).tune(single, lambda cell: 0.0) == {
        "b": Choice((({"num_steps": 3}, 0.0),))
    }


def test_a_run_of_another_setting_is_refused_and_more_seeds_are_not(tmp_path: Path) -> None:
    run(tmp_path).measure({"a": Measurement(shipped(), counted, range(2))})
    more = Scope(tmp_path, (0, 1), 2, processes=0)
    Results(tmp_path / "x.json", more.setting, free=("seeds",))
    with pytest.raises(DataError, match="another folder"):
        run(tmp_path, trials=3)


def begun(place: str) -> dict[str, Any]:
    """A cell that takes longer than the test, and says which process measures it."""
    Path(place).write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def fill_for_long(folder: str) -> None:
    results = Results(Path(folder) / "x.json", {})
    results.fill({"a": (f"{folder}/worker",)}, begun, processes=1)


def test_what_measures_ends_with_the_study(tmp_path: Path) -> None:
    paths = str(Path(__file__).parents[2])
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
            study.send_signal(signal.SIGKILL)
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
    cells = {
        "a": Measurement(shipped(), counted, range(2)),
        "b": Measurement(shipped(), counted, range(2), FP32),
    }
    found = Run(scope, Results(tmp_path / "x.json", scope.setting)).measure(cells)
    assert [cell["of"]["options"]["precision"] for cell in found.values()] == ["bf16", "fp32"]
    with pytest.raises(DataError, match="another folder"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="precision"):
        Scope(tmp_path, (0,), 2, precision="fp16")


# --- reports ---------------------------------------------------------------------------------

FINDING = "It is so. Or not.\n\n## Not shown\n\nThe rest.\n\n## Details\n\nMore.\n"


def report(**changes: Any) -> Report:
    line = Curve([1, 2], [estimate(1, 0.1), estimate(2, 0.1)], [1.0, 1.5])
    figure = curves([Panel("t", {"a": line}, "x", "y", log=True, ticks=True)] * 3)
    table = Table("", ["a", "b"], [["1", 2]], "250 trials.")
    return Report("Title", "Why?", table, figure, "See this.", "How.", **changes)


def test_a_page_is_a_screen_with_details_below(tmp_path: Path) -> None:
    (tmp_path / "x.finding.md").write_text(FINDING)
    setting = {"preset": "laptop", "trials": 250, "seeds": [0]}
    ordering = Ordering("a above b", estimate(1, 0.1), estimate(2, 0.1), "2 : 1", place="there")
    told = report(details=[Table("Part", ["h"], [["v"]])], orderings=[ordering])
    known = Study("", "", "3 h", "1 h")
    text = write_page(tmp_path, "x", known, told, Results(tmp_path / "x.json", setting))
    assert (tmp_path / "x.md").read_text() == text
    assert (tmp_path / "x.png").stat().st_size > 1000
    screen, details = text.split("\n---\n")
    assert screen == (
        "# Title\n\nWhy?\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n250 trials.\n\n![Title](x.png)\n\n"
        "*See this.*\n\n**Found.** It is so. Or not.\n\n**Not shown.** The rest.\n\n"
        "**Command.** `python -m studies x --seeds 0`, 1 h on two cores.\n"
    )
    assert "\nHow.\n" in details and "\nMore.\n" in details and "### Part" in details
    row = "| a above b, there | 2 : 1 | 1.000 : 2.000 | – | does not hold | 0 of 1 |"
    assert row in details


def test_published_values_stand_in_the_row_of_algorithm_1(tmp_path: Path) -> None:
    pair = estimate(1, 0.1), estimate(2, 0.1)
    orderings = [Ordering(f"{one} above b", *pair, "2 : 1") for one in (OURS, LITERAL)]
    orderings.append(Ordering(f"{OURS} above c", *pair, "3 : 1"))  # alone
    results = Results(tmp_path / "x.json", {"seeds": [0, 1]})
    study = Study("", "", "3 h", "1 h")
    text = write_page(tmp_path, "x", study, report(orderings=orderings), results)
    for row in (f"{OURS} above b | –", f"{LITERAL} above b | 2 : 1", f"{OURS} above c | 3 : 1"):
        assert f"| {row} |" in text
    assert f"Published values of MPDiffuser are those of {LITERAL}." in text
    assert "`python -m studies x --seeds 0,1`, 3 h on two cores." in text


def test_options_are_told_in_words() -> None:
    options = {"composition": "alternating", "num_steps": 5, "action_chunk": 8}
    assert in_words(options) == "5 reverse steps, chunks of 8"
    known = in_words({"num_steps": None, "action_chunk": 1, "num_candidates": 1})
    assert known == "all reverse steps, a plan for each action, one candidate"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Found.", "sections"),
        ("Found.\n## Not shown\nA\n## More\nB\n", "sections"),
        ("word " * 121 + "\n## Not shown\nA\n", "121 words"),
    ],
)
def test_a_finding_is_short_and_says_what_it_does_not_show(
    text: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "x.finding.md").write_text(text)
    with pytest.raises(DataError, match=problem):
        Finding.read(tmp_path / "x.finding.md")


def test_a_finding_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.finding.md").write_bytes(b"Caf\xe9.\n## Not shown\nA\n")
    with pytest.raises(DataError, match="UTF-8"):
        Finding.read(tmp_path / "x.finding.md")


def test_a_name_has_one_colour_in_all_figures_and_stands_in_the_legend() -> None:
    line = Curve([1, 2], [estimate(1, 0.1), estimate(2, 0.1)])
    known = "planner alone"
    groups = ([known, "b"], ["b", "c", f"{known}, c"])
    figure = curves([Panel("t", dict.fromkeys(names, line), "x", "y") for names in groups])
    left, right = (list(axes.get_lines()) for axes in figure.axes)
    colours = [one.get_color() for one in (*left, *right)]
    assert colours[1] == colours[2] and colours[0] == colours[4]
    assert right[2].get_linestyle() != left[0].get_linestyle()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [known, "b", "c", f"{known}, c"]
    alone = dots({"t": {known: estimate(1, 0.1)}}, "m").axes[0].get_lines()[0]
    assert alone.get_color() == colours[0]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dmpc.json", "[1]"),
        ("dmpc.json", '{"setting": 3, "made_with": {}, "cells": {}}'),
        ("dmpc.json", "{"),
        ("defect.md", ""),
        ("defect.md", "# Foot"),
    ],
)
def test_a_damaged_file_stops_the_page_of_results(file: str, content: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=file):
        write_summary(folder)
    assert not (tmp_path / "results.md").exists()


def test_the_page_of_results_has_a_row_for_each_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies import summary

    folder = tmp_path / "results"
    with pytest.raises(DataError, match="no such folder"):
        write_summary(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="no result of a study"):
        write_summary(folder)
    assert not (tmp_path / "results.md").exists()
    for name in ("lqr-noise", "dmpc", "lqr-steps"):
        Results(folder / f"{name}.json", {"preset": "laptop", "trials": 2, "seeds": [0]}).save()
    (folder / "dmpc.finding.md").write_text(FINDING)
    (folder / "defect.md").write_text("# Foot\n\n**What was found.** It\nlimps. Always.\n")
    values = (estimate(1, 0.1), estimate(3, 0.1))
    orderings = [
        Ordering("a above b", one, estimate(2, 0.1), "2 : 1", place=place, table="Table 10")
        for one, place in zip(values, ("low", "high"), strict=True)
    ]
    known = {"lqr-noise": report(orderings=orderings), "dmpc": report()}

    def read(name: str, place: Path) -> tuple[Report, Results]:
        if name not in known:
            return read_study(name, place)
        return known[name], Results.read(place / f"{name}.json")

    monkeypatch.setattr(summary, "read_study", read)
    text = write_summary(folder).read_text()
    assert (
        "| Table 10 | a above b | 2 : 1 | low: 1.000 [0.900, 1.100] : 2.000 [1.900, 2.100]; "
        "high: 3.000 [2.900, 3.100] : 2.000 [1.900, 2.100] | "
        "does not hold (1 of 2), holds (1 of 2) | [lqr-noise](results/lqr-noise.md) |"
    ) in text
    assert "| [dmpc](results/dmpc.md) | It is so. |" in text
    assert "| [defect](results/defect.md), by hand | Foot: It limps. |" in text
    assert text.count("(not run)") == len(STUDIES) - 3
    assert "lqr-steps (the study is not complete: 30 of 30" in text
    with pytest.raises(ConfigError, match="study"):
        read_study("lqr-step", folder)
