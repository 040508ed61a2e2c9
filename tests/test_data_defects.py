"""Every defect that a data file can have is refused, with its place, before anything uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from mpd_gym.collect.record import write_dataset
from mpd_gym.datasets.episodes import FlatFormat, load_episodes, recover_env
from mpd_gym.errors import ConfigError, DataError
from mpd_gym.types import Episode

ID = "tests/broken-v0"
T = 6
SPACES = {
    "observation_space": Box(-100, 100, (2,), np.float32),
    "action_space": Box(-1, 1, (1,), np.float32),
}


def an_episode(**changes: Any) -> Episode:
    rng = np.random.default_rng(0)
    ends = np.arange(T) == T - 1
    episode = Episode(
        observations=rng.normal(size=(T + 1, 2)).astype(np.float32),
        actions=rng.uniform(-1, 1, (T, 1)).astype(np.float32),
        rewards=rng.normal(size=T),
        terminations=ends,
        truncations=np.zeros(T, bool),
        costs=np.ones(T),
        successes=ends,
    )
    return replace(episode, **changes)


def minari_folder() -> Path:
    """Three sound episodes; the tests damage the second, `episode_1`."""
    dataset = write_dataset(ID, [an_episode()] * 3, env_id="Pendulum-v1", **SPACES)
    return Path(dataset.storage.data_path)


def tamper(change: Callable[[h5py.Group], None]) -> Path:
    folder = minari_folder()
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        change(file["episode_1"])
    return folder


def put(name: str, value: Any) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        del group[name]
        group[name] = value

    return change


def poke(name: str, place: Any, value: Any) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        group[name][place] = value

    return change


def drop(name: str) -> Callable[[h5py.Group], None]:
    return lambda group: group.__delitem__(name)


OBSERVATIONS, ACTIONS = an_episode().observations, an_episode().actions

# what is done to episode_1, what the message says, which step it names
DEFECTS: dict[str, tuple[Callable[[h5py.Group], None], str, int | None]] = {
    "NaN observation": (poke("observations", (6, 1), np.nan), "'observations' is not finite", 6),
    "infinite observation": (poke("observations", (0, 0), np.inf), "'observations' is not", 0),
    "NaN action": (poke("actions", (2, 0), np.nan), "'actions' is not finite", 2),
    "NaN reward": (poke("rewards", 3, np.nan), "'rewards' is not finite", 3),
    "NaN cost": (poke("infos/cost", 1, np.nan), "'costs' is not finite", 0),
    "short rewards": (put("rewards", np.zeros(T - 2)), r"'rewards' must have shape \(6,\)", T - 2),
    "long rewards": (put("rewards", np.zeros(T + 1)), r"'rewards' must have shape \(6,\)", T),
    "rewards in a column": (put("rewards", np.zeros((T, 1))), "'rewards' must have shape", None),
    "short actions": (put("actions", ACTIONS[:-1]), "'actions' must have shape", T - 1),
    "short terminations": (put("terminations", np.zeros(2, bool)), "'terminations' must have", 2),
    "short truncations": (put("truncations", np.zeros(2, bool)), "'truncations' must have", 2),
    "T observations": (put("observations", OBSERVATIONS[:-1]), "the final observation is miss", T),
    "T + 2 observations": (put("observations", np.zeros((T + 2, 2))), "'observations' must", T + 1),
    "wide observations": (put("observations", np.zeros((T + 1, 3))), "'observations' must", None),
    "flat actions": (put("actions", np.zeros(T)), "'actions' must have shape", None),
    "action outside": (poke("actions", (4, 0), 1.5), "'actions' leave the action space", 4),
    "ends in the middle": (poke("terminations", 2, True), "goes on to step 5", 2),
    "cut in the middle": (poke("truncations", 0, True), "goes on to step 5", 0),
    "flag that is none": (put("truncations", np.arange(T)), "'truncations' is set here", 1),
    "last flag that is none": (put("truncations", 7 * an_episode().terminations), "0 or 1", 5),
    "short costs": (put("infos/cost", np.zeros(T - 1)), "'costs' must have shape", T - 1),
    "long costs": (put("infos/cost", np.zeros(T + 2)), "'costs' must have shape", T),
    "cost at the reset": (poke("infos/cost", 0, 1.0), "the first, at the reset, must be 0", 0),
    "text": (put("rewards", [b"x"] * T), "'rewards' must hold numbers", None),
    "objects": (
        lambda group: put("rewards", group.file.create_dataset(
            "texts", data=["a"] * T, dtype=h5py.string_dtype()))(group),
        "'rewards' must hold numbers", None,
    ),
    "no observations": (drop("observations"), "'episode_1/observations' is missing", None),
    "no actions": (drop("actions"), "'episode_1/actions' is missing", None),
    "no rewards": (drop("rewards"), "'episode_1/rewards' is missing", None),
    "no terminations": (drop("terminations"), "'episode_1/terminations' is missing", None),
    "no truncations": (drop("truncations"), "'episode_1/truncations' is missing", None),
    "no costs": (drop("infos/cost"), "'episode_1/infos/cost' is missing", None),
    "a group for an array": (
        lambda group: (group.__delitem__("actions"), group.create_group("actions")),
        "'episode_1/actions' is missing", None,
    ),
    "a scalar for an array": (put("actions", 1.0), "'actions' must have shape", None),
    "external link": (
        put("actions", h5py.ExternalLink("elsewhere.hdf5", "/x")), "soft or external link", None
    ),
    "external info": (
        put("infos", h5py.ExternalLink("elsewhere.hdf5", "/x")), "soft or external link", None
    ),
    "soft link": (put("actions", h5py.SoftLink("/episode_0/actions")), "soft or external", None),
}  # fmt: skip


@pytest.mark.fault(
    "Data",
    "36 defects of a Minari episode: NaN, lengths, shapes, types, flags, links",
    "refused, with data set, episode and step",
)
@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_minari_episodes(name: str) -> None:
    change, message, step = DEFECTS[name]
    tamper(change)
    source = load_episodes(ID)
    assert len(source[0]) == len(source[2]) == T  # the others can be used
    for read in (lambda: source[1], source.validate_all, lambda: source.select([0, 1])[1]):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert (caught.value.source, caught.value.episode) == (ID, 1)
        assert caught.value.step == step
        assert str(caught.value).startswith(f"{ID}, episode 1")


def test_windows_check_the_rows_that_they_read() -> None:
    tamper(poke("observations", (4, 0), np.nan))
    source = load_episodes(ID)
    assert len(source.window(1, 0, 3)) == 3
    for start, stop in ((0, 4), (4, 6), (3, 5)):
        with pytest.raises(DataError) as caught:
            source.window(1, start, stop)
        assert caught.value.step == 4


@pytest.mark.fault("Data", "arrays that are stored in other files of the machine", "not read")
@pytest.mark.parametrize("storage", ["external", "virtual"])
def test_data_in_other_files_is_not_read(storage: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 8 * T)

    def change(group: h5py.Group) -> None:
        del group["rewards"]
        if storage == "external":
            group.create_dataset("rewards", (T,), "f8", external=[(secret, 0, 8 * T)])
        else:
            layout = h5py.VirtualLayout((T,), "f8")
            layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "x", (T,))
            group.create_virtual_dataset("rewards", layout)

    tamper(change)
    with pytest.raises(DataError, match="stored in another file"):
        load_episodes(ID)[1]


def test_clipping_is_on_request_and_never_hides_nan() -> None:
    tamper(poke("actions", (4, 0), 1.5))
    assert load_episodes(ID, clip_actions=True)[1].actions[4, 0] == 1.0
    tampered = load_episodes(ID, metadata={"action_space": Box(-2, 2, (1,), np.float32)})
    assert tampered[1].actions[4, 0] == 1.5
    minari.delete_dataset(ID)
    tamper(poke("actions", (4, 0), np.nan))
    with pytest.raises(DataError, match="not finite"):
        load_episodes(ID, clip_actions=True)[1]


# --- whole files ---------------------------------------------------------------------------------


def edit(**changes: Any) -> Path:
    """Change entries of metadata.json; None removes one."""
    folder = minari_folder()
    path = folder / "metadata.json"
    metadata = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
    return folder


@pytest.mark.fault("Data", "metadata that are malformed, or nested 100,000 deep", "refused")
@pytest.mark.parametrize(
    "changes",
    [
        {"observation_space": None},  # Minari would make the environment to find out
        {"action_space": "no JSON"},
        {"action_space": '{"type": "Evil", "n": 1}'},
        {"action_space": '{"type": "Box", "dtype": "nonsense", "shape": [1], "low": 0, "high": 1}'},
        {"action_space": "[" * 100_000},
        {"action_space": 3},
        {"env_spec": "{}"},
        {"env_spec": "no JSON"},
        {"total_episodes": None},
        {"total_episodes": "many"},
        {"frame_stack": "four"},
    ],
    ids=str,
)
def test_malformed_metadata(changes: dict[str, Any]) -> None:
    edit(**changes)
    with pytest.raises(DataError, match=r"metadata\.json is missing or malformed"):
        load_episodes(ID)


@pytest.mark.fault("Data", "metadata that promise 10^15 episodes", "refused before any work")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_format": "arrow"}, "data_format must be 'hdf5', got 'arrow'"),
        ({"total_episodes": 4}, "'episode_3' is missing"),
        ({"total_episodes": 10**15}, "'episode_3' is missing"),
        ({"total_episodes": 0}, "no episodes"),
        ({"frame_stack": 0}, "frame_stack must be 1"),
        ({"frame_stack": 10**12}, "frame_stack must be 1, or up to 1000"),
        ({"action_space": '{"type": "Discrete", "n": 2, "start": 0}'}, "must be a Box of shape"),
        ({"observation_space": '{"type": "Discrete", "n": 2, "start": 0}'}, "must be a Box or a"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    edit(**changes)
    with pytest.raises(DataError, match=message):
        load_episodes(ID)


@pytest.mark.fault("Data", "a data file that is cut, empty or missing", "refused")
def test_damaged_files() -> None:
    folder = minari_folder()
    data = folder / "main_data.hdf5"
    content = data.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"not HDF5" * 100):
        data.write_bytes(damage)
        with pytest.raises(DataError, match="missing or damaged"):
            load_episodes(ID)
    data.unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        load_episodes(ID)
    (folder / "metadata.json").unlink()
    with pytest.raises(DataError, match=r"metadata\.json is missing"):
        load_episodes(ID)


def test_total_steps_must_be_there() -> None:
    tamper(lambda group: group.attrs.__delitem__("total_steps"))
    with pytest.raises(DataError, match="total_steps") as caught:
        load_episodes(ID)
    assert caught.value.episode == 1
    minari.delete_dataset(ID)
    tamper(lambda group: group.attrs.__setitem__("total_steps", 0))
    with pytest.raises(DataError, match="the episode is empty"):
        load_episodes(ID)[1]


MANY = 4_000_000_000


@pytest.mark.fault("Data", "a file that declares 4 billion steps", "refused before any work")
@pytest.mark.parametrize("steps", [MANY, 2**62, 2**64 - 1])
def test_steps_that_a_file_cannot_hold_are_refused(steps: int) -> None:
    tamper(lambda group: group.attrs.__setitem__("total_steps", np.uint64(steps)))
    with pytest.raises(DataError, match=r"must have shape|no whole number") as caught:
        load_episodes(ID)
    assert caught.value.episode == 1


@pytest.mark.fault("Data", "arrays that declare 4 billion rows", "refused before they are read")
@pytest.mark.parametrize("chunks", [None, (1024,)])
def test_arrays_that_declare_more_than_they_hold_are_refused(chunks: Any, tmp_path: Path) -> None:
    def declare(group: h5py.Group) -> None:
        group.attrs["total_steps"] = MANY
        for name, array in [*group.items()]:
            if isinstance(array, h5py.Dataset):
                shape, dtype = (MANY + (name == "observations"), *array.shape[1:]), array.dtype
                side = chunks and chunks + shape[1:]
                del group[name]
                made = group.create_dataset(name, shape, dtype, chunks=side)
                made[:1] = 0  # all others are made up by HDF5

    tamper(declare if chunks else lambda group: None)
    if chunks:
        with pytest.raises(DataError, match="its values were not written"):
            load_episodes(ID)
    path = flat(tmp_path)
    with h5py.File(path, "r+") as file:
        for name, array in [*file.items()]:
            shape, dtype = (MANY, *array.shape[1:]), array.dtype
            side = chunks and chunks + shape[1:]
            del file[name]
            file.create_dataset(name, shape, dtype, chunks=side)
    with pytest.raises(DataError, match="its values were not written"):
        load_episodes(path)


def test_compressed_data_are_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "flat.hdf5", 100_000
    with h5py.File(path, "w") as file:
        for name, array in flat_arrays().items():
            zeros = np.zeros((rows, *array.shape[1:]), array.dtype)
            zeros[-1] = name == "timeouts"
            file.create_dataset(name, data=zeros, compression="gzip", compression_opts=9)
    assert path.stat().st_size < rows
    assert load_episodes(path)[0].actions.shape == (rows, 1)


# --- environments named in files -----------------------------------------------------------------


def env_spec(**changes: Any) -> str:
    spec = json.loads(gym.spec("Pendulum-v1").to_json())
    return json.dumps({**spec, **changes})


WRAPPER = {"name": "Evil", "entry_point": "evil_module:Evil", "kwargs": {}}


@pytest.mark.fault("Data", "code that a data set's environment names", "not run")
@pytest.mark.parametrize(
    "changes",
    [
        {"entry_point": "evil_module:run"},
        {"id": "evil_module:Pendulum-v1"},
        {"id": "Evil-v0", "entry_point": "evil_module:run"},
        {"id": "Evil-v0"},
        {"additional_wrappers": [WRAPPER]},
    ],
    ids=str,
)
def test_code_named_in_a_file_is_not_run(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(env_spec=env_spec(**changes))
    source = load_episodes(ID)
    source.validate_all()
    with pytest.raises(DataError, match=r"is not registered here|which is not run"):
        recover_env(source)
    assert not (tmp_path / "ran").exists()


def test_recover_env_uses_arguments_and_time_limit() -> None:
    edit(env_spec=env_spec(kwargs={"g": 3.0}, max_episode_steps=17))
    env = recover_env(load_episodes(ID), render_mode="rgb_array")
    assert (env.unwrapped.g, env.spec.max_episode_steps) == (3.0, 17)
    assert env.render_mode == "rgb_array"
    minari.delete_dataset(ID)
    edit(env_spec=None)
    with pytest.raises(DataError, match="None is not registered"):
        recover_env(load_episodes(ID))


# --- flat files ----------------------------------------------------------------------------------

N = 10


def flat_arrays() -> dict[str, Any]:
    """Two episodes of 4 and 6 rows."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 7, 2)).astype(np.float32)
    return {
        "observations": np.concatenate((first[:4], second[:6])),
        "next_observations": np.concatenate((first[1:5], second[1:])),
        "actions": rng.uniform(-1, 1, (N, 1)).astype(np.float32),
        "rewards": rng.normal(size=N),
        "costs": np.ones(N),
        "terminals": np.arange(N) == 3,
        "timeouts": np.arange(N) == N - 1,
    }


def flat(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "flat.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in {**flat_arrays(), **changes}.items():
            if value is not None:
                file[name] = value
    return path


def poked(name: str, row: int, value: float) -> dict[str, Any]:
    array = np.array(flat_arrays()[name], dtype=np.float64)
    array[row] = value
    return {name: array}


@pytest.mark.fault("Data", "22 defects of a flat HDF5 file", "refused, with file, episode and step")
@pytest.mark.parametrize(
    ("changes", "message", "episode", "step"),
    [
        (poked("observations", 6, np.nan), "'observations' is not finite", 1, 2),
        (poked("actions", 6, np.nan), "'actions' is not finite", 1, 2),
        (poked("rewards", 9, np.inf), "'rewards' is not finite", 1, 5),
        (poked("costs", 4, np.nan), "'costs' is not finite", 1, 0),
        (poked("next_observations", 9, np.nan), "'observations' is not finite", 1, 6),
        (poked("next_observations", 6, 3.0), "does not continue", 1, 2),
        ({"costs": np.ones((N, 1))}, "'costs' must have shape", 1, None),
        ({"actions": np.array([[b"a"]] * N)}, "'actions' must hold numbers", 1, None),
        ({"actions": np.zeros(N)}, r"action space must be a Box of shape \(nu,\)", None, None),
        ({"next_observations": np.ones((N, 3))}, "'next_observations' must hold", 1, None),
        ({"timeouts": np.zeros(N)[:, None]}, r"'timeouts' must have shape \[N\]", None, None),
        ({"timeouts": np.arange(N)}, "'timeouts' must be 0 or 1", None, None),
        ({"terminals": np.full(N, np.nan)}, "'terminals' must be 0 or 1", None, None),
        ({"actions": np.zeros((N - 1, 1))}, "same number of rows", None, None),
        ({k: v[:0] for k, v in flat_arrays().items()}, "at least 1", None, None),
        ({"rewards": 1.0}, "same number of rows", None, None),
        ({"rewards": None}, "'rewards' is missing", None, None),
        ({"terminals": None}, "'terminals' is missing", None, None),
        ({"next_observations": None}, "drop_last_transition=True", None, None),
        ({"timeouts": None}, r"episode_length=\.\.\.", None, None),
        ({"actions": h5py.ExternalLink("x.hdf5", "/x")}, "soft or external", None, None),
        ({"costs": h5py.SoftLink("/rewards")}, "soft or external", None, None),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:24],
)
def test_defects_of_flat_files(
    tmp_path: Path, changes: dict[str, Any], message: str, episode: int | None, step: int | None
) -> None:
    path = flat(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load_episodes(path)[1]
    found = caught.value
    assert (found.source, found.episode, found.step) == (str(path), episode, step)


def test_layouts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="episode_length: expected a positive number"):
        FlatFormat(episode_length=0)
    minari_folder()
    with pytest.raises(ConfigError, match="layout: only for flat files"):
        load_episodes(ID, layout=FlatFormat())
    with pytest.raises(DataError, match="missing or damaged"):
        load_episodes(tmp_path / "none.hdf5")


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.fault("Data", "defects of episodes in memory", "refused, with episode and step")
@pytest.mark.parametrize(
    ("changes", "message", "step"),
    [
        ({"rewards": np.zeros(T - 1)}, "'rewards' must have shape", T - 1),
        ({"rewards": np.full(T, np.nan)}, "'rewards' is not finite", 0),
        ({"observations": OBSERVATIONS[:-1]}, "the final observation is missing", T),
        ({"observations": {"a": OBSERVATIONS}}, "'observations' is missing", None),
        ({"costs": np.zeros(T + 1)}, "'costs' must have shape", T),
        ({"truncations": np.ones(T, bool)}, "'truncations' is set here", 0),
        ({"actions": np.array([[None]] * T)}, "'actions' is not finite", 0),
    ],
    ids=str,
)
def test_defects_of_episodes_in_memory(
    changes: dict[str, Any], message: str, step: int | None
) -> None:
    source = load_episodes([an_episode(), an_episode(**changes)])
    with pytest.raises(DataError, match=message) as caught:
        source[1]
    assert (caught.value.episode, caught.value.step) == (1, step)


def test_dict_spaces_are_checked_key_by_key() -> None:
    space = Dict({"a": SPACES["observation_space"], "b": SPACES["observation_space"]})
    episodes = [
        an_episode(observations={"a": OBSERVATIONS, "b": OBSERVATIONS[:-1]}),
        an_episode(observations={"a": OBSERVATIONS}),
    ]
    source = load_episodes(episodes, metadata={**SPACES, "observation_space": space})
    for index, message in ((0, "'observations/b' must have shape"), (1, "'observations/b' is mis")):
        with pytest.raises(DataError, match=message):
            source[index]
