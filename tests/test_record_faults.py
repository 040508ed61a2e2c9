"""Full disks, stopped workers, wrong arguments: recording says why, and loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box
from recorders import ENV, ID, Fixed, Noisy, an_episode, assert_same, make_noisy, make_slow, quiet

from mpd_gym import agents, cli
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.presets import preset
from mpd_gym.collect import workers
from mpd_gym.collect.record import Progress, Views, discard, write_dataset
from mpd_gym.collect.storage import Place
from mpd_gym.datasets.episodes import load_episodes
from mpd_gym.diffusion import SAMPLERS
from mpd_gym.envs.batched import BatchedEnv
from mpd_gym.errors import ConfigError, DataError, FileError, MpdError
from mpd_gym.evaluation.comparison import parse_options

SPACES: dict[str, Any] = {
    "observation_space": Box(-np.inf, np.inf, (2,), np.float32),
    "action_space": Box(-1.0, 1.0, (1,), np.float32),
}


@contextmanager
def largest_file(size: int, pid: int = 0) -> Iterator[None]:
    """Let the system refuse longer files, as a full disk or a quota does."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(
    "Recording",
    "a disk that is full while the data set is assembled",
    "FileError, no crash of HDF5; the episodes are kept, called again it is finished",
)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_full_disk_while_assembling_costs_no_episode(share: float) -> None:
    whole = quiet(Noisy(), ENV, "tests/whole-v0", episodes=12, seed=3)
    full = Path(whole.storage.data_path, "main_data.hdf5").stat().st_size
    calls: list[Progress] = []
    run = partial(quiet, Noisy(), ENV, ID, episodes=12, seed=3, on_stored=calls.append)
    with largest_file(int(share * full)), pytest.raises(FileError, match="free space") as caught:
        run()
    assert "12 of 12 episodes" in caught.value.__notes__[0]
    assert [path.name for path in Place(ID).staging.iterdir() if path.is_dir()] == ["shards"]
    calls.clear()
    run()
    assert [now.stored for now in calls] == [12], "nothing is recorded again"
    assert_same(load_episodes(ID), load_episodes("tests/whole-v0"))


@pytest.mark.fault(
    "Recording",
    "a disk that is full while large episodes are written",
    "FileError, no crash of HDF5; the old data set stays, nothing is left",
)
def test_a_full_disk_while_writing_keeps_the_old_data_set() -> None:
    write_dataset(ID, [an_episode()], **SPACES)
    with largest_file(2**20), pytest.raises(FileError, match=r"main_data\.hdf5.*File too large"):
        write_dataset(ID, [an_episode(200_000)] * 3, overwrite=True, **SPACES)
    assert [len(episode) for episode in load_episodes(ID)] == [5]
    assert not Place(ID).staging.exists()


@pytest.mark.fault(
    "Recording",
    "a disk that is full while episodes are stored",
    "FileError with what is stored; called again it goes on, bit-identical",
)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_while_storing_is_resumed(processes: int) -> None:
    run = partial(quiet, make_slow, ENV, ID, episodes=20, seed=3, processes=processes)

    def fill(now: Progress) -> None:
        if now.stored >= 4:
            for pid in [child.pid for child in multiprocessing.active_children()] or [0]:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, -1))

    with largest_file(2**40), pytest.raises(FileError, match="cannot be written") as caught:
        run(on_stored=fill)
    stored = int(caught.value.__notes__[-1].split()[0])
    assert 4 <= stored < 20
    assert len(Place(ID).decisions()) == stored
    run()
    quiet(make_noisy, ENV, "tests/whole-v0", episodes=20, seed=3)
    assert_same(load_episodes(ID), load_episodes("tests/whole-v0"))


@pytest.mark.fault(
    "Recording",
    "less space than the episodes need once more",
    "FileError with both sizes, before the data set is assembled",
)
def test_space_is_checked_before_a_data_set_is_assembled(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(FileError, match=r"needs \d\.\d MB, 0\.0 MB are free"):
            quiet(Noisy(), ENV, ID, episodes=3, seed=0)
    assert len(quiet(Noisy(), ENV, ID, episodes=3, seed=0)) == 3


@pytest.mark.fault(
    "Recording",
    "an error between the two renames that replace a data set",
    "FileError; the old data set has its place back",
)
def test_a_failed_rename_gives_the_old_data_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(ID, [an_episode()], **SPACES)
    rename, place = os.rename, Place(ID)

    def failing(source: Path, target: Path) -> None:
        if source == place.assembled:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(FileError, match="No space left"):
        write_dataset(ID, [an_episode(7)], overwrite=True, **SPACES)
    assert [len(episode) for episode in load_episodes(ID)] == [5]


@pytest.mark.fault(
    "Machine",
    "a folder of data sets that cannot be made",
    "FileError names MINARI_DATASETS_PATH, before anything is played",
)
def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file/below"))
    for call in (partial(quiet, Noisy(), ENV, ID, episodes=1, seed=0), partial(load_episodes, ID)):
        with pytest.raises(FileError, match="MINARI_DATASETS_PATH"):
            call()
    with pytest.raises(FileError, match="MINARI_DATASETS_PATH"):
        cli.info(None)


@pytest.mark.fault(
    "Recording",
    "a worker that is stopped (SIGSTOP)",
    "a warning, then it is replaced; the data are bit-identical",
)
@pytest.mark.slow
def test_a_stopped_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_STOPPED_SECONDS", 1.0)
    stopped: list[int] = []

    def stop_one(now: Progress) -> None:
        if now.stored >= 4 and not stopped:
            stopped.append(multiprocessing.active_children()[0].pid)
            os.kill(stopped[0], signal.SIGSTOP)

    run = partial(quiet, make_slow, ENV, ID, episodes=40, seed=3, processes=2)
    with pytest.warns(RuntimeWarning, match="has been stopped for 1 s and is replaced"):
        run(on_stored=stop_one)
    assert not multiprocessing.active_children()
    quiet(make_noisy, ENV, "tests/whole-v0", episodes=40, seed=3)
    assert_same(load_episodes(ID), load_episodes("tests/whole-v0"))


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.fault(
    "Recording",
    "arguments of a wrong kind: id, environment, functions, mappings, views, info",
    "ConfigError that names the argument, before anything is played or left",
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "Nope-v7"}, "env: Nope-v7 cannot be made"),
        ({"env_id": 3}, "env: 3 cannot be made"),
        ({"env_id": "no_such_module:Nope-v0"}, "cannot be made: ModuleNotFoundError"),
        ({"env_kwargs": {"gain": object()}}, "env_kwargs: expected numbers"),
        ({"env_kwargs": {"what": 1}}, "cannot be made: TypeError"),
        ({"env_kwargs": {"gain": DEEP}}, "env_kwargs: expected numbers"),
        *(({name: 3}, f"{name}: expected Mapping or None; got 3")
          for name in ("env_kwargs", "metadata", "fingerprint")),
        ({"views": 3}, "views: expected Views or None; got 3"),
        ({"info": 3}, "info: expected DatasetInfo or None; got 3"),
        ({"accept": 3}, "accept: expected a function or None; got 3"),
        ({"on_stored": 3}, "on_stored: expected a function or None; got 3"),
        ({"max_discarded": "x"}, "max_discarded: expected an integer"),
        ({"dataset_id": "../x-v0"}, "dataset_id: expected"),
        ({"dataset_id": "/tmp/x-v0"}, "dataset_id: expected"),
        ({"dataset_id": "a/b\nc-v0"}, "dataset_id: expected"),
        ({"dataset_id": f"a/{300 * 'b'}-v0"}, "dataset_id: expected .* at most 200 bytes"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_record_are_typed(
    changes: dict[str, Any], message: str, minari_root: Path
) -> None:
    arguments = {"env_id": ENV, "dataset_id": ID, "episodes": 1, "seed": 0, **changes}
    with pytest.raises(ConfigError, match=message):
        quiet(Noisy(), **arguments)
    assert not list(minari_root.glob("*/.*")) and not list(minari_root.glob("*/*"))


@pytest.mark.parametrize("name", ["stored", "shown"])
def test_views_that_are_no_functions_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a function"):
        Views(**{name: 3}, space=SPACES["observation_space"])


@pytest.mark.fault(
    "Recording",
    "a recording that fails before its first episode",
    "leaves nothing; the id is free for other arguments",
)
def test_a_recording_without_episodes_blocks_no_id(minari_root: Path) -> None:
    with pytest.raises(MpdError, match="finite action"):
        quiet(Fixed([np.nan]), ENV, ID, episodes=1, seed=0)
    assert not Place(ID).staging.exists()
    place = Place(ID)
    with place.exclusive():  # as kill -9 leaves it
        place.begin({"seed": 0})
        kept = place.staging.rename(minari_root / "kept")
    kept.rename(place.staging)
    quiet(Noisy(), ENV, ID, episodes=1, seed=1)
    assert len(load_episodes(ID)) == 1


@pytest.mark.fault("Recording", "a damaged manifest", "DataError that names it; discard works")
def test_a_damaged_manifest_is_named() -> None:
    def end(now: Progress) -> None:
        if now.stored:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run the same again"):
        quiet(Noisy(), ENV, ID, episodes=9, seed=0, on_stored=end)
    manifest = Place(ID).staging / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: .*discard"):
        quiet(Noisy(), ENV, ID, episodes=9, seed=0)
    assert discard(ID) >= 1


class Reusing(gym.Env):
    """Gives the same arrays at every step, and changes them, as it does the action, in place."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.rows, self.t = np.zeros(2, np.float32), 0
        self.info = {"cost": np.zeros(()), "is_success": np.zeros((), bool)}
        return self.rows, self.info

    def step(self, action: Any) -> Any:
        self.t += 1
        self.rows[:] = self.t, action[0]
        self.info["cost"][...] = self.t
        self.info["is_success"][...] = self.t == 2
        action[:] = np.nan
        return self.rows, float(self.t), False, self.t == 4, self.info


class Spoiling:
    """Gives the same array at every step, and changes it and what it was shown in place."""

    def __init__(self) -> None:
        self.action = np.zeros(1, np.float32)

    def predict(self, observation: Any, *_: Any, **__: Any) -> Any:
        self.action[:] = (observation[0] + 1) / 10
        observation[:] = np.nan
        return self.action, None


gym.register("MpdTests/Reusing-v0", "test_record_faults:Reusing")


@pytest.mark.fault(
    "Recording",
    "environment and policy that go on to change their arrays in place",
    "the data hold what was given at each step",
)
@pytest.mark.filterwarnings("ignore:.*share an object")
def test_arrays_that_are_changed_in_place_are_recorded_as_they_were() -> None:
    quiet(Spoiling(), "MpdTests/Reusing-v0", ID, episodes=2, seed=0)
    steps = np.arange(1, 5)
    for episode in load_episodes(ID):
        shares = (steps / 10).astype(np.float32)
        np.testing.assert_array_equal(episode.actions[:, 0], shares)
        np.testing.assert_array_equal(episode.observations[:, 0], np.arange(5))
        np.testing.assert_array_equal(episode.observations[1:, 1], shares)
        np.testing.assert_array_equal(episode.rewards, steps)
        np.testing.assert_array_equal(episode.costs, steps)
        np.testing.assert_array_equal(episode.successes, steps == 2)


@pytest.mark.parametrize("name", ["LQR-v0", "CarUMaze-v0", "ConstrainedPendulum-v0"])
def test_batched_environments_keep_no_array_of_the_caller(name: str) -> None:
    runs = []
    for spoil in (False, True):
        envs = gym.make_vec(name, 3, vectorization_mode="vector_entry_point",
                            autoreset_mode="SameStep")  # fmt: skip
        assert isinstance(envs.unwrapped, BatchedEnv)
        given: list[Any] = [*envs.reset(seed=1)]
        kept = []
        for step in range(80):
            actions = np.full(envs.action_space.shape, np.sin(step), envs.action_space.dtype)
            if spoil:
                spoiled(given)
            given = [*envs.step(actions)]
            actions[:] = np.nan
            kept.append(np.concatenate([np.ravel(part) for part in arrays(given[:4])]))
        runs.append(np.stack(kept))
    np.testing.assert_array_equal(*runs)


def arrays(tree: Any) -> Iterator[Any]:
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, np.ndarray) and part.dtype != object:
            yield part
        elif isinstance(part, (dict, list, tuple)):
            yield from arrays(part)


def spoiled(tree: Any) -> None:
    for part in arrays(tree):
        part[...] = 1 if part.dtype == bool else 77


@pytest.mark.fault(
    "Callers' functions", "rows of AGENTS and SAMPLERS that name none", "ConfigError"
)
@pytest.mark.parametrize("row", ["no_such_module:X", "json:Nothing", "json:loads", "", 3])
def test_wrong_rows_of_registries_are_named(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agents.AGENTS, "mine", row)
    with pytest.raises(ConfigError, match=r"AGENTS\['mine'\]: expected 'module:Class'"):
        agents.agent_class("mine")
    monkeypatch.setitem(SAMPLERS, "mine", row)
    with pytest.raises(ConfigError, match=r"SAMPLERS\['mine'\]: expected Sampler"):
        SamplingConfig(sampler="mine")


def test_a_preset_names_the_argument_that_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"^method: expected one of"):
        preset("laptop", None, "nope")


@pytest.mark.fault("Evaluation", "an option nested a hundred thousand deep", "ConfigError")
def test_options_that_are_nested_too_deep_are_refused() -> None:
    with pytest.raises(ConfigError, match="nested too deep"):
        parse_options(["x=" + "[" * 100_000 + "]" * 100_000])
