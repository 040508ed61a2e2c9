"""Recording in several processes gives the same data, and their errors arrive."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorders import (
    ENV,
    ID,
    Fixed,
    Noisy,
    Sometimes,
    assert_same,
    make_noisy,
    make_slow,
    quiet,
    short,
)

from mpd_gym import MPDiffuserAgent
from mpd_gym.collect.record import (
    Progress,
)
from mpd_gym.collect.storage import Decision, Place, Status
from mpd_gym.collect.workers import Schedule
from mpd_gym.datasets.episodes import load_episodes
from mpd_gym.errors import InputError, WorkerError


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_data() -> None:
    policy = partial(Sometimes, share=0.4)
    for processes in (1, 2, 3):
        quiet(
            policy,
            ENV,
            f"tests/by{processes}-v0",
            episodes=30,
            seed=5,
            processes=processes,
            accept=short,
            max_discarded=300,
        )
    first = load_episodes("tests/by1-v0")
    for processes in (2, 3):
        other = load_episodes(f"tests/by{processes}-v0")
        assert_same(first, other)
        for key in ("unsolved", "rejected"):
            assert first.metadata["collection"][key] == other.metadata["collection"][key] > 0


@pytest.mark.slow
def test_play_of_an_agent_is_the_same_by_any_number_of_processes(lqr: MPDiffuserAgent) -> None:
    lqr.reseed(99)  # what was drawn before does not matter
    for processes in (1, 2):
        place = f"tests/play{processes}-v0"
        quiet(lqr, "LQR-v0", place, episodes=3, seed=5, processes=processes)
    first, other = (load_episodes(f"tests/play{processes}-v0") for processes in (1, 2))
    assert_same(first, other)
    assert not np.array_equal(first[0].actions, first[1].actions)


@pytest.mark.fault(
    "Recording", "a killed worker", "WorkerError within 30 s; stored episodes are kept"
)
@pytest.mark.slow
def test_killed_worker_is_an_error_and_costs_nothing_stored() -> None:
    killed: list[float] = []
    counts: list[int] = []

    def kill_one(now: Progress) -> None:
        counts.append(now.stored)
        if now.stored >= 4 and not killed:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            killed.append(time.monotonic())

    run = partial(quiet, make_slow, ENV, ID, episodes=40, seed=3, processes=2)
    with pytest.raises(WorkerError, match=r"killed by signal 9; \d+ of 40 episodes .* are stored"):
        run(on_stored=kill_one)
    assert time.monotonic() - killed[0] < 30
    assert not multiprocessing.active_children()
    stored = [d for d, _ in Place(ID).decisions().values() if d.status is Status.STORED]
    assert len(stored) >= max(counts)
    run()
    quiet(make_noisy, ENV, "tests/whole-v0", episodes=40, seed=3)
    assert_same(load_episodes(ID), load_episodes("tests/whole-v0"))


@pytest.mark.fault("Recording", "an error in a worker", "arrives with the worker's note")
@pytest.mark.slow
def test_errors_of_workers_arrive() -> None:
    with pytest.raises(InputError, match="policy: expected a finite action") as caught:
        quiet(Fixed([9.0]), ENV, ID, episodes=4, seed=0, processes=2)
    assert any("in worker process" in note for note in caught.value.__notes__)


def test_arguments_that_cannot_be_pickled_are_refused() -> None:
    with pytest.raises(InputError, match="can be pickled"):
        quiet(Noisy(), ENV, ID, episodes=4, seed=0, processes=2, accept=lambda _: True)


@given(
    statuses=st.lists(st.sampled_from(Status), min_size=1, max_size=60),
    episodes=st.integers(1, 10),
    data=st.data(),
)
def test_schedule_runs_what_one_process_would(
    statuses: list[Status], episodes: int, data: st.DataObject
) -> None:
    statuses = statuses + [Status.STORED] * episodes
    ends = np.flatnonzero(np.cumsum([s is Status.STORED for s in statuses]) == episodes)
    needed = range(int(ends[0]) + 1)
    known = data.draw(st.sets(st.integers(0, len(statuses) - 1)))
    decided = {c: Decision(c, statuses[c], 1) for c in known}
    schedule, open_candidates, run = Schedule(decided, episodes), set(), []
    while True:
        taken = schedule.take(data.draw(st.integers(1, 5)))
        run += taken
        open_candidates.update(taken)
        if not open_candidates:
            break
        done = data.draw(st.sampled_from(sorted(open_candidates)))
        open_candidates.remove(done)
        schedule.settle(Decision(done, statuses[done], 1))
    assert sorted(run) == [c for c in needed if c not in known]
    assert [d.candidate for d in schedule.settled()] == list(needed)
    assert schedule.missing == 0
