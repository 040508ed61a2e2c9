"""Every example runs, with a tiny budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_agent

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "batched_control.py": ["--copies", "64", "--steps", "200"],
    "change_the_task.py": ["agent.safetensors", "--candidates", "3"],
    "compare_with_sb3.py": ["--agent", "agent.safetensors", "--steps", "120", "--episodes", "2"],
    "constrained_ranking.py": ["agent.safetensors", "--candidates", "2", "--episodes", "2"],
    "predict.py": ["agent.safetensors", "--env", "ConstrainedPendulum-v0"],
    "train_lqr.py": ["--episodes", "20", "--steps", "12", "--trials", "2"],
    "train_your_env.py": ["--episodes", "10", "--steps", "12", "--trials", "2"],
    "watch_the_plan.py": [
        *("ConstrainedPendulum-v0", "--agent", "agent.safetensors"),
        *("--steps", "5", "--film", "new/film.gif"),
    ],
}
LEAVES = {"predict.py": "plan.png", "watch_the_plan.py": "new/film.gif"}
SAYS = {
    "batched_control.py": "held up by 100.0%, limit broken by 0.0%",
    "change_the_task.py": "best candidate below 6 rad/s",
    "compare_with_sb3.py": "MPDiffuser, 2 at a time: return",
    "constrained_ranking.py": "true cost    2 candidates",
    "predict.py": "ms: plan.png",
    "train_lqr.py": "times the optimum",
    "train_your_env.py": "agent: return",
    "watch_the_plan.py": "5 pictures: new/film.gif",
}


def test_every_example_is_tested_and_short() -> None:
    files = {path.name: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == set(ARGUMENTS)
    assert all(len(path.read_text().splitlines()) < 80 for path in files.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_example(name: str, tmp_path: Path) -> None:
    if "agent.safetensors" in ARGUMENTS[name]:
        models = {"reward_model": True, "cost_model": True}
        agent = tiny_agent("ConstrainedPendulum-v0", **models)
        agent.with_options(num_steps=2, action_chunk=8).save(tmp_path / "agent.safetensors")
    output = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert output.returncode == 0, output.stderr[-2000:]
    assert SAYS[name] in output.stdout
    if name in LEAVES:
        assert (tmp_path / LEAVES[name]).stat().st_size > 1000
