"""The file format: exact round trips, and every kind of damage noticed before harm is done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from mpd_gym import checkpoint
from mpd_gym.checkpoint import load_file, load_into, save_file
from mpd_gym.errors import CheckpointError, InputError

HEADER = {"name": "mpdiffuser", "budget": 0.1, "spaces": {"low": [-1.0, 1.0]}, "goal": None}
PREFIX = len(b'{"__metadata__":{"mpd_gym_sha256":"')


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(2, 3, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "table": np.linspace(-1, 1, 4),
        "count": torch.tensor(7),
        "mask": np.array([True, False, True]),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file(path, tensors(), HEADER, kind="agent")
    return path


def rewritten(
    path: Path, change: Callable[[dict[str, Any]], None], extra: bytes = b"", pad: bytes = b""
) -> None:
    """Change the table of a file and give it a digest that is right again: a skilled attacker."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    table["__metadata__"]["mpd_gym_sha256"] = "0" * 64
    change(table)
    text = json.dumps(table, separators=(",", ":")).encode() + pad
    seal(path, len(text).to_bytes(8, "little") + text + content[8 + length :] + extra)


def seal(path: Path, content: bytes) -> None:
    start = 8 + PREFIX
    digest = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content[:start] + digest + content[start + 64 :])


# Round trips


def test_round_trip_is_exact_for_every_dtype(tmp_path: Path) -> None:
    given = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in checkpoint._DTYPES.values()}
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


# Damage


def test_each_flipped_byte_is_caught(file: Path) -> None:
    content = file.read_bytes()
    with open(file, "r+b", buffering=0) as damaged:
        for position, byte in enumerate(content):
            for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
                damaged.seek(position)
                damaged.write(bytes([byte ^ mask]))
                with pytest.raises(CheckpointError, match=r"small\.safetensors"):
                    load_file(file)
            damaged.seek(position)
            damaged.write(bytes([byte]))
    load_file(file)


def test_truncation_at_every_length_is_caught(file: Path) -> None:
    for length in reversed(range(file.stat().st_size)):
        os.truncate(file, length)
        with pytest.raises(CheckpointError, match=r"small\.safetensors"):
            load_file(file)


@pytest.mark.parametrize("extra", [b"\0", b" ", b"x" * 100])
def test_appended_bytes_are_caught(file: Path, extra: bytes) -> None:
    file.write_bytes(file.read_bytes() + extra)
    with pytest.raises(CheckpointError, match="tensors need"):
        load_file(file)


def test_swapped_tensors_of_equal_shape_are_caught(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(path, {"a": torch.zeros(2), "b": torch.ones(2)}, {}, kind="agent")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"a":{', b'"x":{').replace(b'"b":{', b'"a":{'))
    with pytest.raises(CheckpointError, match="digest does not match"):
        load_file(path)


def test_edited_header_is_caught(file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b"mpdiffuser") == 1
    file.write_bytes(content.replace(b"mpdiffuser", b"decisioner"))
    with pytest.raises(CheckpointError, match="digest does not match its contents"):
        load_file(file)


# Other files


def code_runner(path: Path) -> Any:
    class Runner:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path),)

    return Runner()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(code_runner(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"looks like a pickle\. .*never opens pickles"):
        load_file(path)
    assert not (tmp_path / "ran").exists()


def test_torch_and_zip_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "new.pt")
    torch.save({"w": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "sb3.zip", "w") as archive:
        archive.writestr("data", "{}")
    for name, kind in (("new.pt", "zip"), ("old.pt", "pickle"), ("sb3.zip", "zip")):
        with pytest.raises(CheckpointError, match=rf"{name}: looks like a {kind}.*never opens"):
            load_file(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (np.random.default_rng(0).bytes(4096), "damaged, truncated or of another format"),
        (bytes(4096), "damaged, truncated or of another format"),
    ],
)
def test_foreign_bytes_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        load_file(path)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"w": torch.zeros(100)}, path, metadata)
        with pytest.raises(CheckpointError, match="mpd_gym did not write"):
            load_file(path)


def test_missing_file_folder_and_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_file(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_file(tmp_path / "pipe")


def test_another_kind_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"kind 'agent'.*kind 'training'"):
        load_file(file, kind="training")


def test_a_newer_format_asks_for_an_update(file: Path) -> None:
    rewritten(file, lambda table: table["__metadata__"].update(format_version="2"))
    with pytest.raises(CheckpointError, match=r"format version 2.*pip install --upgrade mpd-gym"):
        load_file(file)


# Sizes, before memory is taken


def assert_refused_without_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*args: Any, **options: Any) -> None:
        raise AssertionError("memory for a tensor was asked for")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(AssertionError):
        torch.empty(1)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            load_file(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**32, 100_000, 99, 1, 0])
def test_a_table_length_beyond_the_file_takes_no_memory(
    file: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file.read_bytes()
    file.write_bytes(length.to_bytes(8, "little") + content[8:])
    assert_refused_without_memory(file, monkeypatch)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2**58], "data_offsets": [0, 2**60]},
        {"shape": [2**31, 2**31], "data_offsets": [0, 2**64]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"shape": [-1, -6], "data_offsets": [0, 24]},
        {"shape": [6.0], "data_offsets": [0, 24]},
        {"shape": [True] * 6, "data_offsets": [0, 4]},
        {"shape": [1] * 100, "data_offsets": [0, 4]},
        {"shape": 6, "data_offsets": [0, 24]},
        {"shape": [6], "data_offsets": [24, 0]},
        {"shape": [6], "data_offsets": [8, 32]},
        {"shape": [6], "data_offsets": [0]},
        {"dtype": "F8_E4M3"},
        {"dtype": ["F32"]},
        {"more": 1},
    ],
)
def test_a_table_that_contradicts_the_file_takes_no_memory(
    file: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten(file, lambda table: table["weight"].update(fields))
    assert_refused_without_memory(file, monkeypatch)


def test_a_file_over_max_bytes_is_refused(file: Path) -> None:
    size = file.stat().st_size
    load_file(file, max_bytes=size)
    with pytest.raises(CheckpointError, match=f"more than max_bytes={size - 1}"):
        load_file(file, max_bytes=size - 1)


# Contents that only a skilled hand can make, as their digest is right


def test_rewriting_is_possible_for_the_tests_below(file: Path) -> None:
    rewritten(file, lambda table: None)
    load_file(file)


def test_deep_nesting_is_refused(file: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    rewritten(file, lambda table: table["__metadata__"].update(header='{"a":' + deep + "}"))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_file(file)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ('{"a":1,"a":2}', "appears twice"),
        ('{"a":NaN}', "NaN is not JSON"),
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_inner_header_is_refused(file: Path, header: str, match: str) -> None:
    rewritten(file, lambda table: table["__metadata__"].update(header=header))
    with pytest.raises(CheckpointError, match=match):
        load_file(file)


@pytest.mark.parametrize("change", [{"header": 1}, {"extra": "x"}, {"format_version": "one"}])
def test_other_metadata_are_refused(file: Path, change: dict[str, Any]) -> None:
    rewritten(file, lambda table: table["__metadata__"].update(change))
    with pytest.raises(CheckpointError, match="metadata are not those"):
        load_file(file)


def test_duplicate_tensor_names_are_refused(file: Path) -> None:
    def repeat(table: dict[str, Any]) -> None:
        table["weigh2"] = table["weight"]

    rewritten(file, repeat)
    content = file.read_bytes().replace(b"weigh2", b"weight")
    start = 8 + PREFIX
    seal(file, content[:start] + b"0" * 64 + content[start + 64 :])
    with pytest.raises(CheckpointError, match="appears twice"):
        load_file(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_tensors_are_refused_both_ways(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.safetensors"
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with pytest.raises(InputError, match="'w' holds NaN or infinity"):
            save_file(path, {"w": torch.tensor([0, value], dtype=dtype)}, {}, kind="agent")
    assert list(tmp_path.glob("*.safetensors")) == []
    marker = np.array([1.25, -7.5])
    save_file(path, {"w": marker}, {}, kind="agent")
    content = path.read_bytes().replace(marker.tobytes(), np.array([1.25, value]).tobytes())
    seal(path, content[: 8 + PREFIX] + b"0" * 64 + content[8 + PREFIX + 64 :])
    with pytest.raises(CheckpointError, match="'w' holds NaN"):
        load_file(path)


def test_a_bool_that_is_none_is_refused(file: Path) -> None:
    def retype(table: dict[str, Any]) -> None:
        table["weight"].update(dtype="BOOL", shape=[24])

    rewritten(file, retype)
    with pytest.raises(CheckpointError, match="no bool"):
        load_file(file)


# Writing


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


def test_a_failing_disk_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*unchanged\. Free space"):
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
