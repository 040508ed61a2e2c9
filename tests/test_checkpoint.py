"""The file format: exact round trips, whole files, and exact fits into modules."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import HEADER, tensors, written
from torch import nn

from mpd_gym.checkpoint import load_file, load_into, save_file
from mpd_gym.errors import CheckpointError, InputError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path)


def test_round_trip_is_exact_for_every_dtype(tmp_path: Path) -> None:
    given = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPES}
    given |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "strided": torch.eye(4)[::2]}
    save_file(tmp_path / "a.safetensors", given, HEADER, kind="agent")
    loaded, header = load_file(tmp_path / "a.safetensors", kind="agent")
    assert loaded.keys() == given.keys()
    for name, tensor in given.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)
    assert {key: header[key] for key in HEADER} == HEADER
    assert (header["kind"], header["format_version"]) == ("agent", 1)
    assert header["package_version"]


def test_numpy_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    given = {
        "float64": np.random.default_rng(0).normal(size=(3, 4)),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "int64": np.array([-1, 2**62]),
        "bool": np.array([[True], [False]]),
        "scalar": np.array(0.1),
    }
    given["float64"].flags.writeable = False
    save_file(tmp_path / "a.safetensors", given, {}, kind="agent")
    loaded, _ = load_file(tmp_path / "a.safetensors")
    for name, array in given.items():
        assert loaded[name].numpy().dtype == array.dtype
        assert np.array_equal(loaded[name].numpy(), array)


def test_random_states_with_128_bit_integers_survive_in_the_header(tmp_path: Path) -> None:
    state = np.random.default_rng(0).bit_generator.state
    save_file(tmp_path / "a.safetensors", {}, {"state": state}, kind="training")
    assert load_file(tmp_path / "a.safetensors")[1]["state"] == state


def test_any_safetensors_reader_reads_it(file: Path) -> None:
    read = safetensors.torch.load_file(file)
    assert torch.equal(read["weight"], tensors()["weight"])
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata()["kind"] == "agent"


def test_equal_contents_give_equal_bytes(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_file(
        again, dict(reversed(tensors().items())), dict(reversed(HEADER.items())), kind="agent"
    )
    assert again.read_bytes() == file.read_bytes()


def test_a_loaded_tensor_is_private_memory(file: Path) -> None:
    loaded, _ = load_file(file)
    os.truncate(file, 8)
    assert torch.equal(loaded["weight"], tensors()["weight"])
    loaded["weight"].add_(1)  # writable, and nobody else's


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"a": np.array(["text"])}, "'a' cannot be stored"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"": torch.zeros(2)}, "non-empty"),
        ({"__metadata__": torch.zeros(2)}, "name"),
        ({3: torch.zeros(2)}, "got 3"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, given: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        save_file(tmp_path / "a.safetensors", given, {}, kind="agent")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "header", [{"a": np.float32(1)}, {"a": float("nan")}, {"a": {1, 2}}, {"kind": "agent"}, {1: 2}]
)
def test_headers_that_are_not_json_are_refused(tmp_path: Path, header: Any) -> None:
    with pytest.raises(InputError, match="header"):
        save_file(tmp_path / "a.safetensors", {}, header, kind="agent")


def test_header_of_unbounded_size_is_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="store long lists as tensors"):
        save_file(tmp_path / "a.safetensors", {}, {"a": "x" * 2**24}, kind="agent")


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in '\.safetensors'"):
        save_file(tmp_path / "a.zip", {}, {}, kind="agent")


@pytest.mark.fault(
    "Files", "a disk that fails during a save", "a typed error; the old file is whole"
)
def test_a_failing_disk_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*free space.*is unchanged"):
        save_file(file, {"w": torch.ones(3)}, {}, kind="agent")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.glob("*")] == [file.name]
    assert not list(file.parent.glob(".*"))


def test_a_bad_tensor_leaves_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(InputError):
        save_file(file, {"a": torch.ones(9), "b": torch.tensor(np.nan)}, {}, kind="agent")
    assert file.read_bytes() == before
    assert not list(file.parent.glob(".*"))


# Into modules


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_load_into_copies_every_value() -> None:
    source, target = module(), module()
    given = {f"planner/{name}": tensor for name, tensor in source.state_dict().items()}
    load_into(target, given | {"dynamics/other": torch.zeros(1)}, "planner/")
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def change_dtype(given: dict[str, Any]) -> None:
    given["0.weight"] = given["0.weight"].double()


def change_shape(given: dict[str, Any]) -> None:
    given["0.weight"] = given["0.weight"].T


def add_nan(given: dict[str, Any]) -> None:
    given["0.bias"] = torch.full((3,), torch.nan)


@pytest.mark.fault(
    "Files", "tensors of another shape, type or name", "refused; the network is unchanged"
)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (change_dtype, r"'0\.weight' is float64 \[3, 2\], expected float32 \[3, 2\]"),
        (change_shape, r"'0\.weight' is float32 \[2, 3\], expected float32 \[3, 2\]"),
        (add_nan, r"'0\.bias' holds NaN"),
        (lambda given: given.pop("0.bias"), r"'0\.bias' is missing"),
        (lambda given: given.update(more=torch.zeros(1)), "'more' is unknown"),
    ],
)
def test_load_into_accepts_exact_fits_only(change: Callable[[Any], Any], match: str) -> None:
    target = module()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in module().state_dict().items()}
    change(given)
    with pytest.raises(CheckpointError, match=rf"^agent\.safetensors: 1 tensors.*{match}"):
        load_into(target, given, source="agent.safetensors")
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])
