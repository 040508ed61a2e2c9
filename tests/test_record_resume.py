"""Recording goes on after an interruption, a kill or a crash, and ends with the same data."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from recorders import (
    ENV,
    ID,
    Interrupt,
    Noisy,
    Sometimes,
    an_episode,
    assert_same,
    make_noisy,
    quiet,
    stop_after,
)

from mpd_gym import MPDiffuserAgent
from mpd_gym.collect.noisy import NoisyPolicy
from mpd_gym.collect.record import (
    discard,
    record,
    write_dataset,
)
from mpd_gym.collect.storage import Place, Status
from mpd_gym.datasets.episodes import load_episodes
from mpd_gym.errors import ConfigError, DataError


def test_resumed_equals_uninterrupted() -> None:
    quiet(Sometimes(), ENV, "tests/whole-v0", episodes=60, seed=3)
    seen: list[int] = []
    for number in (1, 4, 30):
        with pytest.raises(Interrupt) as caught:
            quiet(Sometimes(), ENV, ID, episodes=60, seed=3, on_stored=stop_after(number))
        assert any("run the same again" in note for note in caught.value.__notes__)
        seen.append(len(Place(ID).decisions()))
        assert not Place(ID).final.exists()
    assert seen == sorted(seen) and seen[0] < seen[-1]
    quiet(Sometimes(), ENV, ID, episodes=60, seed=3)
    assert_same(load_episodes(ID), load_episodes("tests/whole-v0"))
    keys = ("unsolved", "rejected")
    left, right = (load_episodes(i).metadata["collection"] for i in (ID, "tests/whole-v0"))
    assert [left[key] for key in keys] == [right[key] for key in keys]
    assert not Place(ID).staging.exists()


def test_fewer_or_more_episodes_may_be_asked_for() -> None:
    quiet(Sometimes(), ENV, "tests/whole-v0", episodes=40, seed=3)
    whole = load_episodes("tests/whole-v0")
    for episodes in (5, 40):
        with pytest.raises(Interrupt):
            quiet(Sometimes(), ENV, ID, episodes=30, seed=3, on_stored=stop_after(10))
        quiet(Sometimes(), ENV, ID, episodes=episodes, seed=3)
        assert_same(load_episodes(ID), whole.select(range(episodes)))
        minari.delete_dataset(ID)


@pytest.mark.fault(
    "Recording",
    "other arguments than those of an unfinished recording",
    "refused, with what differs",
)
def test_other_arguments_are_refused_until_discarded() -> None:
    start = partial(quiet, Noisy(), ENV, ID, episodes=30)
    with pytest.raises(Interrupt):
        start(seed=3, fingerprint={"p": 0.1}, on_stored=stop_after(2))
    with pytest.raises(ConfigError, match=r"seed: 3, now 4.*discard"):
        start(seed=4, fingerprint={"p": 0.1})
    with pytest.raises(ConfigError, match="fingerprint"):
        start(seed=3, fingerprint={"p": 0.2})
    with pytest.raises(ConfigError, match=r"policy: .*Noisy.*make_noisy"):
        quiet(make_noisy, ENV, ID, episodes=30, seed=3, fingerprint={"p": 0.1})
    with pytest.raises(ConfigError, match="unfinished collection"):
        write_dataset(ID, [an_episode()], env_id=ENV)
    assert discard(ID) >= 2
    assert discard(ID) == 0
    start(seed=4)


@pytest.mark.parametrize("make", [Noisy, partial(partial, Noisy)], ids=["object", "factory"])
def test_policies_are_told_apart_by_their_parameters(make: Any) -> None:
    with pytest.raises(Interrupt):
        quiet(make(pause=0.0), ENV, ID, episodes=9, seed=0, on_stored=stop_after(1))
    with pytest.raises(ConfigError, match="policy"):
        quiet(make(pause=1e-9), ENV, ID, episodes=9, seed=0)
    quiet(make(pause=0.0), ENV, ID, episodes=9, seed=0)


@pytest.mark.parametrize("inside", [False, True])
def test_agents_are_told_apart_by_their_weights(lqr: MPDiffuserAgent, inside: bool) -> None:
    def policy(agent: MPDiffuserAgent) -> Any:
        return NoisyPolicy(agent, gym.make("LQR-v0"), noise=0.1) if inside else agent

    retrained = copy.deepcopy(lqr)
    with torch.no_grad():
        next(retrained.models["dynamics"].parameters()).add_(1e-6)
    short = {"max_episode_steps": 6}
    here = partial(quiet, env_id="LQR-v0", dataset_id=ID, episodes=2, seed=0, env_kwargs=short)
    with pytest.raises(Interrupt):
        here(policy(lqr), on_stored=stop_after(1))
    with pytest.raises(ConfigError, match="policy"):
        here(policy(retrained))
    here(policy(copy.deepcopy(lqr)))


def test_progress_bar_shows_rate_steps_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    record(Sometimes(), ENV, ID, episodes=20, seed=0)
    shown = capsys.readouterr().err
    assert "collecting: 100%" in shown and "20/20" in shown and "episode/s" in shown
    known = load_episodes(ID)
    unsolved = known.metadata["collection"]["unsolved"]
    assert f"{known.lengths.sum()} steps, {unsolved} unsolved, 0 rejected" in shown


def test_existing_data_sets_are_kept_unless_overwritten() -> None:
    quiet(Noisy(), ENV, ID, episodes=3, seed=0)
    with pytest.raises(ConfigError, match="overwrite=True"):
        quiet(Noisy(), ENV, ID, episodes=3, seed=1)
    with pytest.raises(Interrupt):
        quiet(Noisy(), ENV, ID, episodes=9, seed=1, overwrite=True, on_stored=stop_after(1))
    assert len(load_episodes(ID)) == 3  # still the old one
    quiet(Noisy(), ENV, ID, episodes=9, seed=1, overwrite=True)
    assert len(load_episodes(ID)) == 9


@pytest.mark.fault("Recording", "a crash between the last two renames", "repaired by the next call")
def test_crashes_around_the_final_rename() -> None:
    """A kill between the two renames, or after them, is repaired by the next call."""
    quiet(Noisy(), ENV, ID, episodes=3, seed=0)
    place = Place(ID)
    place.staging.mkdir()
    os.rename(place.final, place.staging / "replaced")
    with pytest.raises(ConfigError, match="exists"):
        quiet(Noisy(), ENV, ID, episodes=3, seed=1)
    assert len(load_episodes(ID)) == 3

    with pytest.raises(Interrupt):
        quiet(Noisy(), ENV, "tests/b-v0", episodes=9, seed=1, on_stored=stop_after(9))
    place = Place("tests/b-v0")
    kept = shutil.copytree(place.staging, place.staging.with_name("copy"))
    made = quiet(Noisy(), ENV, "tests/b-v0", episodes=9, seed=1)
    os.rename(kept, place.staging)  # published, but not cleaned up
    again = quiet(Noisy(), ENV, "tests/b-v0", episodes=9, seed=1)
    assert_same(made, again)
    assert not place.staging.exists()


@pytest.mark.fault("Recording", "two recordings of one data set at a time", "the second is refused")
def test_one_writer_at_a_time() -> None:
    with Place(ID).exclusive(), pytest.raises(ConfigError, match="another process is writing"):
        quiet(Noisy(), ENV, ID, episodes=1, seed=0)
    quiet(Noisy(), ENV, ID, episodes=1, seed=0)


@pytest.mark.fault(
    "Recording",
    "a damaged shard of an unfinished recording",
    "named; deleted, it is recorded again, bit-identical",
)
def test_damaged_shards_are_named() -> None:
    with pytest.raises(Interrupt):
        quiet(Noisy(), ENV, ID, episodes=30, seed=0, on_stored=stop_after(5))
    shard = max(Place(ID).shards.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="delete it") as caught:
        quiet(Noisy(), ENV, ID, episodes=30, seed=0)
    assert caught.value.source == str(shard)
    shard.unlink()
    quiet(Noisy(), ENV, ID, episodes=30, seed=0)
    quiet(Noisy(), ENV, "tests/b-v0", episodes=30, seed=0)
    assert_same(load_episodes(ID), load_episodes("tests/b-v0"))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import recorders
from mpd_gym.collect.record import record

if __name__ == "__main__":
    record(
        recorders.{policy}, "MpdTests/Marked-v0", {id!r}, episodes={episodes}, seed=3,
        processes={processes}, progress=False,
        on_stored=lambda now: print(now.stored, flush=True),
    )
    print("done", flush=True)
"""


def start(tmp_path: Path, **values: Any) -> subprocess.Popen[str]:
    path = tmp_path / "collect.py"
    here = Path(__file__).parent
    known = {"tests": str(here), "policy": "make_slow", "id": ID, "episodes": 40, "processes": 1}
    path.write_text(SCRIPT.format(**{**known, **values}))
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen[str], number: int) -> int:
    """Return the last count that was reported, waiting for `number`."""
    assert process.stdout is not None
    reported = 0
    for line in process.stdout:
        if line.strip() == "done":
            return -1
        reported = int(line)
        if reported >= number:
            break
    return reported


def kill_many_times(tmp_path: Path, episodes: int, kills: int, processes: int) -> None:
    """Kill the collection again and again; then let it finish."""
    rng, done = random.Random(processes), 0
    begin = partial(start, tmp_path, processes=processes, episodes=episodes, policy="Noisy(0.02)")
    for _ in range(kills):
        process = begin()
        reported = read_until(process, done + 1)
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        done = max([reported, *map(int, rest.split())])
        stored = [d for d, _ in Place(ID).decisions().values() if d.status is Status.STORED]
        assert len(stored) >= done > 0
        for episode in Place(ID).episodes(d.candidate for d in stored):
            assert np.isfinite(episode.observations).all() and len(episode) >= 3
    _, errors = begin().communicate()
    assert Place(ID).final.exists(), errors
    quiet(make_noisy, ENV, "tests/whole-v0", episodes=episodes, seed=3)
    assert_same(load_episodes(ID), load_episodes("tests/whole-v0"))


@pytest.mark.fault(
    "Recording",
    "kill -9 while episodes are recorded",
    "what was reported is stored; the rest follows, bit-identical",
)
def test_kill_9_keeps_what_is_reported(tmp_path: Path) -> None:
    kill_many_times(tmp_path, episodes=10, kills=2, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize(("episodes", "kills", "processes"), [(40, 6, 1), (30, 3, 2)])
def test_kill_9_many_times(tmp_path: Path, episodes: int, kills: int, processes: int) -> None:
    kill_many_times(tmp_path, episodes, kills, processes)


@pytest.mark.fault(
    "Recording", "kill -9 while the data set is assembled", "it is there as a whole or not yet"
)
@pytest.mark.slow
def test_kill_9_while_the_data_set_is_assembled(tmp_path: Path) -> None:
    """The data set is there as a whole, or not yet; nothing is collected twice."""
    with pytest.raises(Interrupt):
        quiet(make_noisy, ENV, ID, episodes=150, seed=3, on_stored=stop_after(150))
    begin = partial(start, tmp_path, episodes=150, policy="make_noisy")
    for attempt in range(12):
        process = begin()
        assert read_until(process, 150) == 150
        time.sleep(0.05 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if Place(ID).final.exists():
            break
        assert len(Place(ID).decisions()) == 150
    begin().communicate()
    assert len(load_episodes(ID)) == len(minari.load_dataset(ID)) == 150
    load_episodes(ID).validate_all()
    assert not Place(ID).staging.exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupt_stops_cleanly(tmp_path: Path, processes: int) -> None:
    process = start(tmp_path, processes=processes)
    reported = read_until(process, 2)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to every process of the group
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    last = errors.strip().splitlines()[-1]
    assert last.startswith("KeyboardInterrupt: ") and "run the same again to resume" in last
    assert int(last.split()[1]) >= reported
    process = start(tmp_path, processes=processes)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(load_episodes(ID)) == 40
