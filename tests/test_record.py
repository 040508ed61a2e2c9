"""Recording: what is stored is what happened, whatever is killed and however it is shared out."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import recorders
import torch
from hypothesis import given
from hypothesis import strategies as st
from minari.cli import app
from recorders import Fixed, Marked, Noisy, Sometimes, make_noisy, make_slow, short
from typer.testing import CliRunner

from mpd_gym import MPDiffuserAgent
from mpd_gym.collect.noisy import NoisyPolicy
from mpd_gym.collect.record import (
    DatasetInfo,
    Progress,
    Views,
    discard,
    record,
    write_dataset,
)
from mpd_gym.collect.storage import Decision, Place, Status
from mpd_gym.collect.workers import Schedule
from mpd_gym.datasets.episodes import load_episodes, recover_env
from mpd_gym.errors import ConfigError, DataError, InputError, SolverError, WorkerError
from mpd_gym.types import Episode

ENV, ID = "MpdTests/Marked-v0", "tests/marked-v0"
quiet = partial(record, progress=False)


class Interrupt(Exception):
    pass


def stop_after(number: int) -> Any:
    def on_stored(now: Progress) -> None:
        if now.stored >= number:
            raise Interrupt

    return on_stored


def assert_same(left: Any, right: Any) -> None:
    assert [len(a) for a in left] == [len(b) for b in right]
    for a, b in zip(left, right, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# --- what is stored ------------------------------------------------------------------------------


def test_episodes_are_what_the_environment_gives() -> None:
    quiet(Noisy(), ENV, ID, episodes=20, seed=1, env_kwargs={"gain": [1.5, 0.5]})
    source = load_episodes(ID)
    env = recover_env(source)
    assert len(source) == 20
    for episode in source:
        observation, _ = env.reset(seed=episode.seed)
        np.testing.assert_array_equal(observation, episode.observations[0])
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, info = env.step(action)
            np.testing.assert_array_equal(observation, episode.observations[t + 1])
            assert (reward, terminated, truncated) == (
                episode.rewards[t],
                episode.terminations[t],
                episode.truncations[t],
            )
            assert info["cost"] == episode.costs[t]
            assert info["is_success"] == episode.successes[t]
        assert terminated or truncated
    assert len({episode.seed for episode in source}) == 20
    assert 3 <= source.lengths.min() < source.lengths.max() == recorders.LIMIT


def test_plain_minari_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    info = DatasetInfo(
        author="A. Author",
        author_email="a@b.org",
        code_permalink="https://example.org/x",
        algorithm_name="noise",
        description="Marked steps.",
        ref_min_score=-10.0,
        ref_max_score=30.0,
    )
    made = quiet(Noisy(), ENV, ID, episodes=5, seed=0, info=info, metadata={"budget": 3})
    dataset = minari.load_dataset(ID)
    assert dataset.total_steps == sum(len(e) for e in made)
    assert_same(dataset, load_episodes(ID))
    first = dataset[0]
    assert first.infos["cost"].shape == first.infos["is_success"].shape == (len(first) + 1,)
    assert first.infos["cost"][0] == 0.0
    np.testing.assert_array_equal(first.infos["cost"][1:], (1 + np.arange(len(first))) % 2)
    assert minari.get_normalized_score(dataset, np.array(10.0)) == pytest.approx(0.5)
    known = dataset.storage.metadata
    assert known["author"] == {"A. Author"} and known["algorithm_name"] == "noise"
    assert known["budget"] == 3 and known["collection"]["arguments"]["seed"] == 0
    assert not known["jpeg_encoding"]
    assert dataset.env_spec.id == ENV and dataset.env_spec.max_episode_steps == recorders.LIMIT
    monkeypatch.setenv("COLUMNS", "200")
    for command in (["list", "local"], ["show", ID]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "marked-v0" in result.output and "A. Author" in result.output


def test_nested_observations() -> None:
    quiet(Noisy(), "MpdTests/Nested-v0", ID, episodes=3, seed=0)
    episode = load_episodes(ID)[0]
    assert set(episode.observations) == {"observation", "goals/near", "goals/far"}
    near = episode.observations["goals/near"]
    np.testing.assert_array_equal(near[:, 0], episode.observations["observation"][:, 0] + 1)
    raw = minari.load_dataset(ID)[0].observations
    np.testing.assert_array_equal(raw["goals"]["near"], near)


def test_environments_without_costs() -> None:
    quiet(Noisy(), "Pendulum-v1", ID, episodes=1, seed=0, env_kwargs={"max_episode_steps": 7})
    source = load_episodes(ID)
    assert source[0].costs is None and source[0].successes is None
    assert len(source[0]) == 7 and source[0].truncations[-1]
    assert recover_env(source).spec.max_episode_steps == 7
    assert repr(minari.load_dataset(ID)[0])  # needs infos to be a dict


def test_frames_are_stored_once_and_stacked_when_read() -> None:
    env_id = "MpdTests/Frames-v0"
    quiet(Noisy(), env_id, ID, episodes=4, seed=0, views=Views(frame_stack=4))
    raw = minari.load_dataset(ID)
    assert raw[0].observations.shape == (len(raw[0]) + 1, 8, 8)
    source = load_episodes(ID)
    assert source.metadata["observation_space"] == gym.make(env_id).observation_space
    env = gym.make(env_id)
    for index, episode in enumerate(source):
        shown = [env.reset(seed=episode.seed)[0]]
        shown += [env.step(action)[0] for action in episode.actions]
        np.testing.assert_array_equal(episode.observations, np.stack(shown))
        for start in range(len(episode)):
            window = source.window(index, start, len(episode))
            np.testing.assert_array_equal(window.observations, np.stack(shown[start:]))
    single = load_episodes(ID, stack_frames=False)
    np.testing.assert_array_equal(single[0].observations, source[0].observations[:, -1])
    with pytest.raises(ConfigError, match="frame_stack: expected the number of frames"):
        quiet(Noisy(), env_id, "tests/b-v0", episodes=1, seed=0, views=Views(frame_stack=3))


def test_views_decide_what_is_stored_and_shown(tmp_path: Path) -> None:
    views = Views(
        stored=recorders.state_of,
        shown=recorders.state_of,
        space=recorders.Marked.observation_space,
    )
    log = tmp_path / "log"
    quiet(recorders.Watch(log), "MpdTests/Frames-v0", ID, episodes=2, seed=0, views=views)
    quiet(Noisy(), ENV, "tests/b-v0", episodes=2, seed=0)
    assert set(log.read_text().split("\n")) == {"(2,)", ""}
    assert_same(load_episodes(ID), load_episodes("tests/b-v0"))
    with pytest.raises(ConfigError, match="space"):
        Views(stored=recorders.state_of)


def test_arguments_are_recorded_as_plain_values() -> None:
    quiet(Noisy(), ENV, ID, episodes=1, seed=0, env_kwargs={"gain": np.eye(2)})
    source = load_episodes(ID)
    assert source.metadata["env_kwargs"] == {"gain": [[1.0, 0.0], [0.0, 1.0]]}
    np.testing.assert_array_equal(recover_env(source).unwrapped.gain, np.eye(2))
    with pytest.raises(ConfigError, match="env_kwargs: expected numbers"):
        quiet(Noisy(), ENV, "tests/b-v0", episodes=1, seed=0, env_kwargs={"gain": object()})


def test_environments_that_cannot_be_named_are_refused() -> None:
    gym.register("MpdTests/Nameless-v0", recorders.Marked)
    with pytest.raises(ConfigError, match="string entry point"):
        quiet(Noisy(), "MpdTests/Nameless-v0", ID, episodes=1, seed=0)
    with pytest.raises(ConfigError, match="action space must be a Box"):
        quiet(Noisy(), "CartPole-v1", ID, episodes=1, seed=0)
    for malformed in ("no version", "noversion", "n/name-v0", "../name-v0"):
        with pytest.raises(ConfigError, match="expected 'name-v0'"):
            quiet(Noisy(), ENV, malformed, episodes=1, seed=0)
    with pytest.raises(ConfigError, match="episodes"):
        quiet(Noisy(), ENV, ID, episodes=0, seed=0)


# --- bad policies and environments ---------------------------------------------------------------


@pytest.mark.parametrize(
    "action", [[np.nan], [np.inf], [2.5], [0.0, 0.0], [[0.0]]], ids=str
)  # fmt: skip
def test_bad_actions_are_refused(action: Any) -> None:
    with pytest.raises(InputError, match="policy: expected a finite action"):
        quiet(Fixed(action), ENV, ID, episodes=1, seed=0)


def test_rounding_at_a_bound_is_clipped() -> None:
    quiet(Fixed([2.000001]), ENV, ID, episodes=1, seed=0)
    assert (load_episodes(ID)[0].actions == np.float32(2.0)).all()


def test_bad_observations_are_refused_and_earlier_episodes_kept() -> None:
    with pytest.raises(DataError, match=r"'observations' is not finite") as caught:
        quiet(Noisy(), ENV, ID, episodes=3, seed=0, env_kwargs={"nan_at": 12})
    assert caught.value.step == 12
    assert any("run the same again" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("policy", [dict, None, "agent.safetensors"])
def test_policy_must_have_predict(policy: Any) -> None:
    with pytest.raises(ConfigError, match="policy: expected an object with predict"):
        quiet(policy, ENV, ID, episodes=1, seed=0)


@pytest.mark.parametrize("raises", [False, True])
def test_unsolved_episodes_are_replaced_and_counted(raises: bool) -> None:
    seen: list[Progress] = []
    policy = Sometimes(raises=raises)
    quiet(policy, ENV, ID, episodes=20, seed=0, on_stored=seen.append)
    known = load_episodes(ID).metadata["collection"]
    assert len(load_episodes(ID)) == seen[-1].stored == 20
    assert known["unsolved"] == seen[-1].unsolved > 0 == known["rejected"]
    assert seen[-1].steps == load_episodes(ID).lengths.sum()


def test_too_many_unsolved_episodes() -> None:
    with pytest.raises(SolverError, match=r"\d episodes were not solved.*max_discarded allows 3"):
        quiet(Sometimes(share=1.0), ENV, ID, episodes=20, seed=0, max_discarded=3)
    solved = partial(Sometimes, share=0.2)
    with pytest.raises(SolverError):
        quiet(solved, ENV, "tests/b-v0", episodes=20, seed=0, max_discarded=0)
    quiet(solved, ENV, "tests/b-v0", episodes=20, seed=0, max_discarded=20)  # goes on
    assert len(load_episodes("tests/b-v0")) == 20


def test_filter() -> None:
    quiet(Noisy(), ENV, ID, episodes=10, seed=0, accept=short, max_discarded=100)
    source = load_episodes(ID)
    assert source.lengths.max() < 9 and source.metadata["collection"]["rejected"] > 0
    with pytest.raises(InputError, match=r"accept: 0 episodes were not solved and \d were refused"):
        quiet(
            Noisy(), ENV, "tests/b-v0", episodes=9, seed=0, accept=lambda _: False, max_discarded=2
        )


# --- resuming ------------------------------------------------------------------------------------


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
    here = partial(quiet, env_id="LQR-v0", dataset_id=ID, episodes=2, seed=0)
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


def test_one_writer_at_a_time() -> None:
    with Place(ID).exclusive(), pytest.raises(ConfigError, match="another process is writing"):
        quiet(Noisy(), ENV, ID, episodes=1, seed=0)
    quiet(Noisy(), ENV, ID, episodes=1, seed=0)


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


# --- kill -9 and signals -------------------------------------------------------------------------

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


def test_kill_9_keeps_what_is_reported(tmp_path: Path) -> None:
    kill_many_times(tmp_path, episodes=10, kills=2, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize(("episodes", "kills", "processes"), [(60, 15, 1), (40, 5, 2)])
def test_kill_9_many_times(tmp_path: Path, episodes: int, kills: int, processes: int) -> None:
    kill_many_times(tmp_path, episodes, kills, processes)


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


# --- several processes ---------------------------------------------------------------------------


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


# --- episodes that exist already -----------------------------------------------------------------


def an_episode(length: int = 5, **changes: Any) -> Episode:
    rows = np.arange(length + 1, dtype=np.float32)
    ends = np.arange(length) == length - 1
    episode = Episode(
        observations=np.stack((rows, rows + 1), axis=1),
        actions=np.zeros((length, 1), np.float32),
        rewards=np.arange(length, dtype=np.float64),
        terminations=ends,
        truncations=np.zeros(length, bool),
        costs=np.ones(length),
    )
    return replace(episode, **changes)


def test_write_dataset() -> None:
    episodes = [an_episode(3), an_episode(7, seed=11)]
    write_dataset(ID, iter(episodes), env_id=ENV, info=DatasetInfo(author="me"))
    source = load_episodes(ID)
    assert_same(source, episodes)
    assert [e.seed for e in source] == [None, 11]
    assert source.metadata["env_id"] == ENV and source.metadata["author"] == ["me"]
    with pytest.raises(ConfigError, match="exists"):
        write_dataset(ID, episodes, env_id=ENV)
    spaces = {"observation_space": Marked.observation_space, "action_space": Marked.action_space}
    write_dataset(ID, episodes[:1], **spaces, overwrite=True)
    assert len(load_episodes(ID)) == 1 and "env_id" not in load_episodes(ID).metadata
    with pytest.raises(ConfigError, match="env_id: give it"):
        write_dataset("tests/b-v0", episodes)


def test_write_dataset_writes_whole_or_nothing() -> None:
    def broken() -> Any:
        yield an_episode()
        raise Interrupt

    for episodes, error in (
        (broken(), Interrupt),
        ([an_episode(), an_episode(costs=None)], InputError),
        ([an_episode(rewards=np.full(5, np.nan))], DataError),
        ([an_episode(actions=np.full((5, 1), 3.0))], DataError),
        ([], InputError),
    ):
        with pytest.raises(error):
            write_dataset(ID, episodes, env_id=ENV)
        assert not Place(ID).final.exists() and not Place(ID).staging.exists()
    assert not minari.list_local_datasets()


def test_reference_scores_come_in_pairs() -> None:
    for low, high in ((1.0, None), (None, 1.0), (2.0, 1.0), (0.0, np.inf)):
        with pytest.raises(ConfigError, match="ref_min_score"):
            DatasetInfo(ref_min_score=low, ref_max_score=high)


def test_sources_can_be_sent_to_other_processes() -> None:
    quiet(Noisy(), ENV, ID, episodes=3, seed=0)
    source = load_episodes(ID)
    assert_same(pickle.loads(pickle.dumps(source)), source)
