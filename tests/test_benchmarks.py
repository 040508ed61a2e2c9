"""The script for a GPU runs without one, as nobody is lent one to find out."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

from mpd_gym.models import UnetConfig


def test_each_task_of_the_gpu_script_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    gpu = importlib.import_module("gpu")
    rows = [
        gpu.Row("plan", 1, "graph", "bf16"),
        gpu.Row("D-MPC step", 2, "plain", "fp32"),
        gpu.Row("training step", 0, "plain", "fp32"),
    ]
    monkeypatch.setattr(gpu, "table", lambda: rows)
    unet = UnetConfig(width=8, multipliers=(1, 2), groups=4)
    gpu.measure(gpu.Machine("cpu", unet, 2, dry=True), math.inf)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(rows)
    targets = [line[len(str(row)) :].split()[1] for line, row in zip(lines, rows, strict=True)]
    assert targets == ["20", "10", "4"]
