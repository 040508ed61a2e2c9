"""The study of return against time per action."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpd_gym.agents.options import SamplingConfig
from studies import real_time, run_study
from studies.real_time import CANDIDATES, Setting, recommended, settings
from studies.runner import Scope
from tests.helpers import tiny_agent


def cell(
    returns: list[float],
    milliseconds: float,
    successes: list[bool] | None = None,
    violations: list[bool] | None = None,
) -> dict[str, Any]:
    return {
        "returns": returns,
        "milliseconds": milliseconds,
        "successes": successes,
        "violations": violations,
    }


def named(*cells: dict[str, Any]) -> dict[Setting, dict[str, Any]]:
    return {Setting("ddpm", 1 + i, 0, 1, 1, 1, 0.5): one for i, one in enumerate(cells)}


FULL = [1.0, 2.0, 3.0, 2.0]  # 95 % interval 0.7 to 3.3


def test_the_cheapest_setting_that_is_as_good_is_recommended() -> None:
    cells = named(cell(FULL, 9.0), cell([0.5] * 4, 1.0), cell([0.9] * 4, 3.0), cell([9.0] * 4, 4.0))
    assert recommended(cells).steps == 3


def test_the_reference_is_recommended_where_nothing_else_is_as_good() -> None:
    assert recommended(named(cell(FULL, 9.0), cell([-1.0] * 4, 1.0))).steps == 1


def test_successes_and_violations_count_too() -> None:
    fine, none = [True] * 100, [False] * 100
    cells = named(
        cell(FULL, 9.0, fine, none),
        cell(FULL, 1.0, none, none),
        cell(FULL, 2.0, fine, fine),
        cell(FULL, 3.0, [True] * 97 + [False] * 3, [False] * 100),
        cell(FULL, 4.0, [True] * 98 + [False] * 2, [True] * 2 + [False] * 98),
    )
    assert recommended(cells).steps == 5


@pytest.mark.parametrize("env_id", real_time.ENVIRONMENTS)
def test_settings_differ_and_the_reference_comes_first(env_id: str) -> None:
    own = SamplingConfig(num_candidates=8, action_chunk=4)
    found = settings(own, {}, CANDIDATES[env_id])
    assert found[0] == Setting("ddpm", None, 0, 4, 8, 1, own.temperature)
    assert len({str(one) for one in found}) == len(found) >= 10
    for one in found:
        assert own.updated(one.options).action_chunk == one.chunk
    assert {one.sampler for one in found} == {"ddpm", "ddim", "dpm++"}


def test_means_of_samples_stand_beside_single_ones() -> None:
    own = SamplingConfig(samples_per_candidate=8, temperature=0.5, num_steps=10, warm_start_steps=1)
    found = settings(own, {"samples_per_candidate": 1, "temperature": 0.1}, (1,))
    assert {one.temperature for one in found if one.samples == 1} == {0.1}
    means = [one for one in found if one.samples == 8]
    assert {one.warm for one in means} == set(real_time.WARM_STEPS)
    assert any(own.updated(one.options) == own for one in means)  # as it ships
    assert len({str(one) for one in found}) == len(found)


def test_the_study_plays_times_reports_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agents").mkdir()
    path = tmp_path / "agents/LQR-v0.safetensors"
    tiny_agent("LQR-v0").with_options(action_chunk=8).save(path)
    for name, value in {
        "ENVIRONMENTS": ("LQR-v0",),
        "SAMPLERS": ("dpm++",),
        "STEPS": (3,),
        "WARM_STEPS": (2,),
        "CHUNKS": (8,),
        "EVERY_ACTION": (4, 8),
        "FEW": 2,
        "GRID": 4,
        "TIMED_EPISODES": 1,
    }.items():
        monkeypatch.setattr(real_time, name, value)
    scope = Scope(tmp_path, (0,), 2, processes=0)
    report = run_study("real-time", scope)
    content = json.loads((tmp_path / "real-time.json").read_text())
    assert len(content["cells"]) == 2 * 8
    assert (
        len(content["cells"]["LQR-v0, dpm++, 2 steps, chunk 8, N = 1, starts 0–1"]["returns"]) == 2
    )
    assert all(row["milliseconds"] > 0 for key, row in content["cells"].items() if "time" in key)
    assert "| LQR-v0 | cheapest: " in report and "ddpm, all steps, chunk 8, N = 1" in report
    assert (tmp_path / "real-time.png").stat().st_size > 1000
    assert run_study("real-time", scope) == report  # nothing is done again
