"""Signals and kills that stop a training, and trainings side by side."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import CONFIG, QUICK, assert_same_result, differs, network, noisy_loss, sampler

from mpd_gym import types
from mpd_gym.checkpoint import load_file
from mpd_gym.errors import CheckpointError, ConfigError, InputError, TrainingError, WorkerError
from mpd_gym.training import Record, TrainingConfig, TrainingResult, fit, fit_parallel

# Signals


@pytest.mark.fault(
    "Training", "Ctrl-C or SIGTERM", "a checkpoint, and a message that says how to go on"
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    def send(record: Record) -> None:
        if record.step == 14:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[send], **QUICK)
    text = str(caught.value)
    assert f"stopped by {number.name} at step 14 of 40" in text
    assert "checkpoint.safetensors at step 14. The same call continues" in text
    assert signal.getsignal(number) == before
    whole = fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    resumed = fit(network(1), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    assert_same_result(whole, resumed)


def test_a_second_signal_of_the_same_kind_does_not_wait(tmp_path: Path) -> None:
    def send(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not interrupt")

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[send], **QUICK)
    assert str(caught.value) == ""


LONG = TrainingConfig(
    steps=2_500, batch_size=8, checkpoint_every=20, log_every=10, ema_every=5, threads=1
)


def slow_sampler(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
    time.sleep(0.0005)
    return sampler(batch_size, rng)


def session(directory: str) -> TrainingResult:
    """A training in a process that is killed."""
    return fit(network(), noisy_loss, slow_sampler, LONG, directory=directory, **QUICK)


def started(directory: str | Path, name: str) -> Path:
    return Path(directory) / f"{name}.started"


def saving_at_the_end_only(directory: str, name: str) -> TrainingResult:
    """A training that says when it runs, and has a checkpoint only if it is asked to end."""

    def tell(record: Record) -> None:
        started(directory, name).touch()

    config = differs(LONG, steps=10**6, checkpoint_every=None, checkpoint_seconds=1e6)
    options: dict[str, Any] = {"directory": directory, "name": name, "progress": False}
    return fit(network(), noisy_loss, slow_sampler, config, callbacks=[tell], **options)


def session_of_two(directory: str) -> None:
    fit_parallel({n: partial(saving_at_the_end_only, directory, n) for n in ("one", "two")})


@contextmanager
def process_of(call: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import {call}; {call}({str(path)!r})"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def steps_done(path: Path) -> int:
    """Of the newest checkpoint, also at the moment when another one takes its place."""
    for name in ("checkpoint", "previous", "checkpoint"):
        try:
            return int(load_file(path / f"{name}.safetensors", kind="training")[1]["step"])
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return 0


def wait_for(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.fault("Training", "kill -9 at any moment", "resumed, it ends bit-identical")
@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_training_that_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    chance = random.Random(0)
    reached = [0]
    for _ in range(5):
        with process_of("session", tmp_path) as process:
            wait_for(lambda: steps_done(tmp_path / "toy") > reached[-1])
            with pytest.raises(ConfigError, match="another training is in this folder"):
                session(str(tmp_path))
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
        reached.append(steps_done(tmp_path / "toy"))
    assert reached == sorted(reached)
    assert reached[-1] < LONG.steps, "the kills must have hit a running training"
    resumed = session(str(tmp_path))
    whole = fit(network(), noisy_loss, sampler, LONG, **QUICK)
    assert_same_result(whole, resumed)
    assert not list((tmp_path / "toy").glob(".*"))  # what the kills left behind


@pytest.mark.slow
def test_ctrl_c_ends_a_process_with_a_message(tmp_path: Path) -> None:
    with process_of("session", tmp_path) as process:
        wait_for(lambda: steps_done(tmp_path / "toy") > 0)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=100)[1]
    assert process.returncode != 0
    assert "KeyboardInterrupt: training 'toy' stopped by SIGINT at step" in errors
    done = steps_done(tmp_path / "toy")
    assert f"checkpoint.safetensors at step {done:,}" in errors


# Side by side


def job(seed: int, directory: str | None = None) -> TrainingResult:
    return fit(
        network(seed),
        noisy_loss,
        sampler,
        CONFIG,
        directory=directory,
        **QUICK | {"name": str(seed)},
    )


def broken_job(directory: str) -> TrainingResult:
    wait_for(started(directory, "good").exists)
    raise TrainingError("this job fails")


def dying_job(directory: str) -> TrainingResult:
    wait_for(started(directory, "good").exists)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def interrupted_job(directory: str) -> TrainingResult:
    wait_for(started(directory, "good").exists)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError


@pytest.mark.slow
def test_side_by_side_equals_one_after_the_other() -> None:
    results = fit_parallel({"one": partial(job, 1), "two": partial(job, 2)})
    assert list(results) == ["one", "two"]
    assert_same_result(results["one"], job(1))
    assert_same_result(results["two"], job(2))


@pytest.mark.fault(
    "Training",
    "one of several trainings fails, dies or is interrupted",
    "the others save and end, with a typed error",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "error", "match"),
    [
        (broken_job, TrainingError, "this job fails"),
        (dying_job, WorkerError, r"training 'bad' died \(killed by SIGKILL\)"),
        (interrupted_job, KeyboardInterrupt, "in interrupted_job"),
    ],
)
def test_a_failing_job_ends_the_others_with_a_checkpoint(
    tmp_path: Path,
    failing: Callable[[str], TrainingResult],
    error: type[BaseException],
    match: str,
) -> None:
    directory = str(tmp_path)
    good = partial(saving_at_the_end_only, directory, "good")
    with pytest.raises(error, match=match) as caught:
        fit_parallel({"good": good, "bad": partial(failing, directory)})
    assert steps_done(tmp_path / "good") > 0
    if error is TrainingError:
        assert "in broken_job" in "".join(caught.value.__notes__)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_parent_saves_every_training(
    tmp_path: Path, number: signal.Signals
) -> None:
    with process_of("session_of_two", tmp_path) as process:
        wait_for(lambda: all(started(tmp_path, name).exists() for name in ("one", "two")))
        process.send_signal(number)
        errors = process.communicate(timeout=100)[1]  # the pipe closes when the last process ends
    assert process.returncode != 0
    if number != signal.SIGKILL:  # then the others notice by themselves
        assert f"trainings ['one', 'two'] stopped by {number.name}" in errors
    assert all(steps_done(tmp_path / name) > 0 for name in ("one", "two"))


def test_a_job_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(InputError, match=r"job 'one' cannot be sent.*functools\.partial"):
        fit_parallel({"one": lambda: None})


@pytest.mark.fault(
    "Training", "a script without a __main__ guard", "ends with a message that shows it"
)
@pytest.mark.slow
def test_a_script_without_a_guard_ends_with_a_hint(tmp_path: Path) -> None:
    """The job is larger than a pipe, into which a write to a dead process would wait for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from mpd_gym.training import fit_parallel\n"
        "fit_parallel({'one': partial(len, bytes(2**20))})\n"
    )
    found = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 1
    assert "'one' died before it began (exit code 1)" in found.stderr
    assert "under if __name__ == '__main__':" in found.stderr.splitlines()[-1]
