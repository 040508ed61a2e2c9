"""Reading: the right rows, aligned, whatever the format, and no others."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import FrameStackObservation
from minari.data_collector import EpisodeBuffer

import mpd_gym.datasets.episodes as episodes_module
from mpd_gym.collect.record import DatasetInfo, write_dataset
from mpd_gym.datasets.episodes import EpisodeSource, FlatFormat, load_episodes
from mpd_gym.datasets.hdf5_files import Hdf5File
from mpd_gym.datasets.source import stack_frames
from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.types import Episode

ID = "tests/read-v0"
LENGTHS = (5, 1, 9, 4)
SPACES = {
    "observation_space": Box(-1e6, 1e6, (2,), np.float32),
    "action_space": Box(-1, 1, (1,), np.float32),
}


def marked(index: int, length: int, costs: bool = True) -> Episode:
    """An episode whose every number tells its episode and step; odd ones terminate."""
    t = np.arange(length + 1)
    last = t[:-1] == length - 1
    return Episode(
        observations=np.stack((np.full_like(t, 100 * index), t), axis=1).astype(np.float32),
        actions=((index + t[:-1] / 100) / 10)[:, None].astype(np.float32),
        rewards=100.0 * index + t[:-1],
        terminations=last & bool(index % 2),
        truncations=last & (not index % 2),
        costs=1000.0 * index + t[:-1] if costs else None,
        successes=last if costs else None,
    )


EPISODES = [marked(index, length) for index, length in enumerate(LENGTHS)]


def flat_file(path: Path, **changes: Any) -> Path:
    """Write the episodes as D4RL and DSRL do; None leaves an array out."""
    arrays: dict[str, Any] = {
        "observations": np.concatenate([e.observations[:-1] for e in EPISODES]),
        "next_observations": np.concatenate([e.observations[1:] for e in EPISODES]),
        "terminals": np.concatenate([e.terminations for e in EPISODES]),
        "timeouts": np.concatenate([e.truncations for e in EPISODES]),
        "infos/qpos": np.zeros((sum(LENGTHS), 3)),
    }
    for name in ("actions", "rewards", "costs"):
        arrays[name] = np.concatenate([getattr(e, name) for e in EPISODES])
    with h5py.File(path, "w") as file:
        for name, array in {**arrays, **changes}.items():
            if array is not None:
                file[name] = array
    return path


def make_source(kind: str, tmp_path: Path) -> EpisodeSource:
    if kind == "flat":
        return load_episodes(flat_file(tmp_path / "flat.hdf5"), metadata=SPACES)
    if kind == "memory":
        return load_episodes(EPISODES, metadata=SPACES)
    write_dataset(ID, EPISODES, **SPACES)
    if kind == "selection":
        shuffled = load_episodes([EPISODES[i] for i in (3, 0, 2, 1)], metadata=SPACES)
        return shuffled.select([1, 3, 2, 0])
    return load_episodes(ID)


def part(episode: Episode, start: int, stop: int) -> dict[str, Any]:
    """Return the arrays of some steps of an episode."""
    arrays = {f.name: getattr(episode, f.name) for f in fields(episode) if f.name != "seed"}
    found = {k: v[start:stop] for k, v in arrays.items() if v is not None}
    return {**found, "observations": arrays["observations"][start : stop + 1]}


def assert_equal(left: Episode, right: dict[str, Any]) -> None:
    found = part(left, 0, len(left))
    found.pop("successes", None)  # flat files have none
    for name, array in found.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)
        assert array.dtype == right[name].dtype


KINDS = ("minari", "flat", "memory", "selection")


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_holds_its_rows_and_crosses_no_episode(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    assert source.lengths.tolist() == list(LENGTHS) and len(source) == len(LENGTHS)
    source.validate_all()
    for index, episode in enumerate(EPISODES):
        assert_equal(source[index], part(episode, 0, len(episode)))
        assert_equal(source.episode(index - len(EPISODES)), part(episode, 0, len(episode)))
        for start in range(len(episode)):
            for stop in range(start + 1, len(episode) + 1):
                window = source.window(index, start, stop)
                assert_equal(window, part(episode, start, stop))
                assert len(window) == stop - start == len(window.observations) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_windows_outside_are_refused(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    for start, stop in ((-1, 2), (0, 6), (3, 3), (4, 2)):
        with pytest.raises(InputError, match="0 <= start < stop <= 5"):
            source.window(0, start, stop)
    for index in (4, -5):
        with pytest.raises(InputError, match="has 4 episodes"):
            source.episode(index)
        with pytest.raises(InputError, match="has 4 episodes"):
            source.select([index])


@pytest.mark.parametrize("kind", KINDS)
def test_sources_can_be_pickled(kind: str, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert_equal(copy[2], part(EPISODES[2], 0, 9))
    assert copy.metadata["action_space"] == SPACES["action_space"]


@pytest.mark.parametrize("kind", ["minari", "flat"])
def test_each_process_opens_the_file_for_itself(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(kind, tmp_path)
    opened: list[Any] = []
    file = h5py.File

    def spy(*args: Any) -> Any:
        opened.append(args)
        return file(*args)

    monkeypatch.setattr(h5py, "File", spy)
    assert_equal(source[0], part(EPISODES[0], 0, 5))
    assert not opened
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    assert_equal(source[0], part(EPISODES[0], 0, 5))
    assert len(opened) == 1


@pytest.mark.parametrize("kind", ["minari", "flat"])
def test_windows_read_only_their_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(kind, tmp_path)
    read: list[int] = []
    rows = Hdf5File.rows

    def spy(self: Hdf5File, path: str, start: int, stop: int, episode: int | None = None) -> Any:
        read.append(stop - start)
        return rows(self, path, start, stop, episode)

    source.window(2, 0, 1)
    monkeypatch.setattr(Hdf5File, "rows", spy)
    source.window(2, 3, 6)
    assert read and max(read) <= 4


def test_files_larger_than_memory_are_not_loaded(tmp_path: Path) -> None:
    path, rows, width = tmp_path / "large.hdf5", 200_000, 50
    with h5py.File(path, "w") as file:
        for name in ("observations", "next_observations"):
            zeros = np.zeros((rows, width), np.float32)  # 40 MB
            file.create_dataset(name, data=zeros, chunks=(1000, width), compression=1)
        file["actions"] = np.zeros((rows, 1), np.float32)
        for name in ("rewards", "terminals"):
            file[name] = np.zeros(rows, np.float32)
        file["timeouts"] = np.arange(rows) % 1000 == 999
    tracemalloc.start()
    source = load_episodes(path)
    for index in range(0, 200, 10):
        source.window(index, 100, 132)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 200
    assert peak < 8e6


# --- Minari --------------------------------------------------------------------------------------


def test_metadata_of_minari_data_sets() -> None:
    info = DatasetInfo(author="me", ref_min_score=-3.0, ref_max_score=9.0)
    kwargs = {"g": 3.0, "max_episode_steps": 77}
    write_dataset(ID, EPISODES, env_id="Pendulum-v1", env_kwargs=kwargs, info=info, **SPACES)
    known = load_episodes(ID, metadata={"extra": 1}).metadata
    assert (known["env_id"], known["env_kwargs"]) == ("Pendulum-v1", {"g": 3.0})
    assert (known["ref_min_score"], known["ref_max_score"]) == (-3.0, 9.0)
    assert known["max_episode_steps"] == 77 and known["frame_stack"] == 1 and known["extra"] == 1
    for name, space in SPACES.items():
        assert known[name] == space


def test_minari_objects_paths_and_subsets() -> None:
    dataset = write_dataset(ID, EPISODES, **SPACES)
    folder = Path(dataset.storage.data_path)
    for source in (dataset, folder, folder.parent):
        assert load_episodes(source).lengths.tolist() == list(LENGTHS)
    long = dataset.filter_episodes(lambda episode: len(episode) > 4)
    source = load_episodes(long)
    assert source.lengths.tolist() == [5, 9]
    assert_equal(source[1], part(EPISODES[2], 0, 9))
    assert source.name == ID


def test_messages_name_the_episode_of_the_file() -> None:
    dataset = write_dataset(ID, EPISODES, **SPACES)
    with h5py.File(Path(dataset.storage.data_path) / "main_data.hdf5", "r+") as file:
        file["episode_2/rewards"][4] = np.nan
    long = load_episodes(dataset.filter_episodes(lambda episode: len(episode) > 4))
    for source in (long, long.select([1])):
        with pytest.raises(DataError) as caught:
            source[len(source) - 1]
        assert (caught.value.episode, caught.value.step) == (2, 4)


def test_data_sets_written_by_minari_itself() -> None:
    """No infos; costs of T values; Adroit's name for success; seeds as NumPy numbers."""
    for index, infos in enumerate(
        (None, {}, {"cost": EPISODES[2].costs, "success": np.arange(10) == 9})
    ):
        episode = EPISODES[2]
        buffer = EpisodeBuffer(
            seed=7,
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=episode.terminations,
            truncations=episode.truncations,
            infos=infos,
        )
        with pytest.warns(UserWarning):  # of the metadata that is left out
            minari.create_dataset_from_buffers(f"tests/b-v{index}", [buffer], **SPACES)
        found = load_episodes(f"tests/b-v{index}")[0]
        assert found.seed == 7
        if infos:
            np.testing.assert_array_equal(found.costs, episode.costs)
            np.testing.assert_array_equal(found.successes, np.arange(9) == 8)
        else:
            assert found.costs is None and found.successes is None


@pytest.mark.parametrize("shape", [(40, 48), (40, 48, 3)])
def test_jpeg_pictures_of_minari(shape: tuple[int, ...]) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (6, *shape), dtype=np.uint8)
    buffer = EpisodeBuffer(
        observations={"camera": pictures},
        actions=np.zeros((5, 1), np.float32),
        rewards=np.zeros(5),
        terminations=np.zeros(5, bool),
        truncations=np.arange(5) == 4,
    )
    space = Dict({"camera": Box(0, 255, shape, np.uint8)})
    with pytest.warns(UserWarning):
        dataset = minari.create_dataset_from_buffers(
            ID, [buffer], observation_space=space, action_space=SPACES["action_space"]
        )
    decoded = dataset[0].observations["camera"]
    source = load_episodes(ID)
    np.testing.assert_array_equal(source[0].observations["camera"], decoded)
    np.testing.assert_array_equal(source.window(0, 1, 3).observations["camera"], decoded[1:4])
    del source  # closes the file
    with h5py.File(Path(dataset.storage.data_path) / "main_data.hdf5", "r+") as file:
        stored = file["episode_0/observations/camera"]
        stored[3] = np.zeros_like(stored[3])
    with pytest.raises(DataError, match="damaged"):
        load_episodes(ID)[0]


def test_missing_data_sets_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(dataset_id: str) -> None:
        raise ConnectionError("unreachable")

    monkeypatch.setattr(episodes_module.minari, "download_dataset", no_network)
    remote = "mujoco/hopper/medium-v0"
    with pytest.raises(DataError, match=rf"unreachable.*'minari download {remote}'"):
        load_episodes(remote)
    with pytest.raises(DataError, match=f": minari download {remote}"):
        load_episodes(remote, download=False)
    with pytest.raises(DataError, match="mpd-gym collect mpd_gym/lqr/noisy-p10-v0"):
        load_episodes("mpd_gym/lqr/noisy-p10-v0")
    with pytest.raises(DataError, match="Pendulum-v1: this is an environment"):
        load_episodes("Pendulum-v1")


def test_missing_data_sets_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(dataset_id: str) -> None:
        write_dataset(dataset_id, EPISODES, **SPACES)

    monkeypatch.setattr(episodes_module.minari, "download_dataset", download)
    assert len(load_episodes("mujoco/hopper/medium-v0")) == len(EPISODES)


@pytest.mark.parametrize("source", ["no id", "name", 3, None])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(ConfigError, match="source: expected"):
        load_episodes(source)


# --- flat files ----------------------------------------------------------------------------------


def test_terminals_and_timeouts(tmp_path: Path) -> None:
    source = make_source("flat", tmp_path)
    for index, episode in enumerate(source):
        assert episode.terminations[-1] == bool(index % 2)
        assert episode.truncations[-1] == (not index % 2)
        assert not (episode.terminations | episode.truncations)[:-1].any()


def test_an_episode_cut_by_the_end_of_the_file_is_truncated(tmp_path: Path) -> None:
    terminals = np.concatenate([e.terminations for e in EPISODES])
    terminals[-1] = False
    source = load_episodes(flat_file(tmp_path / "f.hdf5", terminals=terminals))
    assert source.lengths.tolist() == list(LENGTHS)
    assert source[3].truncations[-1] and not source[3].terminations[-1]


def test_flags_of_other_types(tmp_path: Path) -> None:
    flags = {
        "terminals": np.concatenate([e.terminations for e in EPISODES]).astype(np.float32),
        "timeouts": np.concatenate([e.truncations for e in EPISODES]).astype(np.uint8),
    }
    source = load_episodes(flat_file(tmp_path / "f.hdf5", **flags))
    assert source[1].terminations.dtype == source[1].truncations.dtype == np.bool_
    assert source[1].terminations[-1]


def test_files_without_costs(tmp_path: Path) -> None:
    source = load_episodes(flat_file(tmp_path / "f.h5", costs=None))
    assert source[0].costs is None
    assert source.metadata["observation_space"].shape == (2,)


def test_files_without_timeouts(tmp_path: Path) -> None:
    """A time limit of 4 cuts 5, 1, 9 steps into 4 + 1, 1, 4 + 4 + 1; the rest terminates."""
    path = flat_file(tmp_path / "f.hdf5", timeouts=None)
    terminals = np.zeros(sum(LENGTHS), bool)
    terminals[[5, 18]] = True
    with h5py.File(path, "r+") as file:
        file["terminals"][:] = terminals
    layout = FlatFormat(episode_length=4, check_continuity=False)
    source = load_episodes(path, layout=layout)
    assert source.lengths.tolist() == [4, 2, 4, 4, 4, 1]
    ends = [(e.terminations[-1], e.truncations[-1]) for e in source]
    assert ends == [(False, True), (True, False), *[(False, True)] * 3, (True, False)]


def test_ends_that_are_not_marked_are_noticed(tmp_path: Path) -> None:
    path = flat_file(tmp_path / "f.hdf5", timeouts=np.zeros(sum(LENGTHS), bool))
    with pytest.raises(DataError, match="the end of an episode is not marked") as caught:
        load_episodes(path)[0]
    assert (caught.value.episode, caught.value.step) == (0, 4)
    joined = load_episodes(path, layout=FlatFormat(check_continuity=False))
    assert joined.lengths.tolist() == [6, 13]


def test_files_without_next_observations(tmp_path: Path) -> None:
    """The last row gives the last observation; the episode of one row vanishes."""
    path = flat_file(tmp_path / "f.hdf5", next_observations=None)
    source = load_episodes(path, layout=FlatFormat(drop_last_transition=True))
    assert source.lengths.tolist() == [4, 8, 3]
    for episode, whole in zip(source, (EPISODES[0], EPISODES[2], EPISODES[3]), strict=True):
        expected = part(whole, 0, len(whole) - 1)
        np.testing.assert_array_equal(episode.observations, expected["observations"])
        np.testing.assert_array_equal(episode.rewards, expected["rewards"])
        assert not episode.terminations.any() and episode.truncations[-1]
        assert episode.truncations.sum() == 1
    window = source.window(1, 2, 5)
    np.testing.assert_array_equal(window.observations, EPISODES[2].observations[2:6])


# --- memory and frames ---------------------------------------------------------------------------


def test_spaces_of_episodes_in_memory_are_inferred() -> None:
    known = load_episodes(EPISODES).metadata
    assert known["observation_space"] == Box(-np.inf, np.inf, (2,), np.float32)
    pixels = marked(0, 3)
    pixels = Episode(**{**vars(pixels), "observations": {"a": np.zeros((4, 2, 2), np.uint8)}})
    space = load_episodes([pixels]).metadata["observation_space"]
    assert space == Dict({"a": Box(0, 255, (2, 2), np.uint8)})
    for nothing in ([], [3]):
        with pytest.raises(InputError, match="at least one Episode"):
            load_episodes(nothing)


def test_frames_are_stacked_as_gymnasium_does() -> None:
    class Ticks(gym.Env):
        observation_space = Box(0, 255, (3, 2), np.uint8)
        action_space = Box(-1, 1, (1,), np.float32)

        def reset(self, **_: Any) -> Any:
            self.t = 0
            return np.full((3, 2), 7, np.uint8), {}

        def step(self, action: Any) -> Any:
            self.t += 1
            return np.full((3, 2), 7 + self.t, np.uint8), 0.0, False, False, {}

    plain, stacked = Ticks(), FrameStackObservation(Ticks(), 3)
    frames, shown = [plain.reset()[0]], [stacked.reset()[0]]
    for _ in range(5):
        frames.append(plain.step(None)[0])
        shown.append(stacked.step(None)[0])
    np.testing.assert_array_equal(stack_frames(np.stack(frames), 3), np.stack(shown))
