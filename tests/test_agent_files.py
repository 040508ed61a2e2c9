"""Files of agents: equal actions after loading, options at load, damage, contradictions."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import observations, tiny_agent

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents.presets import preset
from mpd_gym.errors import CheckpointError, ConfigError


def test_save_then_load_gives_bit_equal_actions(agent: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    chosen = agent.with_options(num_candidates=3, action_chunk=2, temperature=0.3)
    chosen.save(path)
    loaded = MPDiffuserAgent.load(path)
    assert loaded.options == chosen.options
    batch = observations(agent, 3)
    state = other = None
    for flag in (True, False, False, True):
        flags = np.full(3, flag)
        left, state = chosen.predict(batch, state, flags)
        right, other = loaded.predict(batch, other, flags)
        np.testing.assert_array_equal(left, right)


def test_options_at_load_replace_the_saved_ones(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    lqr.save(path)
    assert MPDiffuserAgent.load(path, num_candidates=8).options.num_candidates == 8
    with pytest.raises(ConfigError, match="num_candidates"):
        MPDiffuserAgent.load(path, candidates=8)


@pytest.mark.fault("Files", "load(None)", "refused; the message says what is expected")
def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(CheckpointError, match="source: expected a path, or the id"):
        MPDiffuserAgent.load(None)  # type: ignore[arg-type]


def test_unknown_devices_and_empty_data_are_named(tmp_path: Path) -> None:
    tiny_agent("LQR-v0").save(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"device: expected 'auto', 'cpu'.*got 'gpu'"):
        MPDiffuserAgent.load(tmp_path / "a.safetensors", device="gpu")
    with pytest.raises(ConfigError, match="dataset: expected at least one"):
        MPDiffuserAgent.fit([], preset("laptop"))


def test_save_says_that_functions_are_not_saved(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    agent = lqr.with_options()
    agent.set_reward(lambda x, u, y: np.zeros(u.shape[:2]))
    with pytest.warns(UserWarning, match="not saved"):
        agent.save(tmp_path / "agent.safetensors")


@pytest.fixture(scope="module")
def stored(lqr: MPDiffuserAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    path = tmp_path_factory.mktemp("stored") / "agent.safetensors"
    lqr.save(path)
    yield path.read_bytes()


def test_flipped_bytes_are_caught(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    places = np.random.default_rng(0).integers(len(stored), size=60)
    for place in [0, 7, 8, len(stored) - 1, *places]:
        flipped = bytearray(stored)
        flipped[place] ^= 1 << int(place) % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            MPDiffuserAgent.load(path)


def test_truncated_pickled_and_missing_files_are_refused(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    for length in (0, 5, 100, len(stored) // 2, len(stored) - 1):
        path.write_bytes(stored[:length])
        with pytest.raises(CheckpointError):
            MPDiffuserAgent.load(path)
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(CheckpointError, match="pickle"):
        MPDiffuserAgent.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        MPDiffuserAgent.load(tmp_path / "nothing.safetensors")


@pytest.mark.fault("Files", "weights that contradict the configuration beside them", "refused")
def test_a_file_that_contradicts_its_configuration_is_refused(
    lqr: MPDiffuserAgent, tmp_path: Path
) -> None:
    from mpd_gym.checkpoint import load_file, save_file

    path = tmp_path / "agent.safetensors"
    lqr.save(path)
    tensors, header = load_file(path, kind="agent")
    plain = {
        k: v for k, v in header.items() if k not in ("format_version", "kind", "package_version")
    }
    wider = json.loads(json.dumps(plain))
    wider["config"]["unet"]["width"] = 16
    save_file(path, tensors, wider, kind="agent")
    with pytest.raises(CheckpointError):
        MPDiffuserAgent.load(path)
    save_file(path, tensors, {**plain, "agent": "other"}, kind="agent")
    with pytest.raises(CheckpointError, match="other"):
        MPDiffuserAgent.load(path)
    extra = {**tensors, "models/value/weight": torch.zeros(1)}
    save_file(path, extra, plain, kind="agent")
    with pytest.raises(CheckpointError, match="does not name"):
        MPDiffuserAgent.load(path)
