"""Every kind of damage to a file, and every foreign file, is refused before harm is done."""

from __future__ import annotations

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
from checkpoints import written

from mpd_gym.checkpoint import load_file, save_file
from mpd_gym.errors import CheckpointError, InputError

PREFIX = len(b'{"__metadata__":{"mpd_gym_sha256":"')


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.mark.fault(
    "Files", "any flipped byte of a file, each bit", "refused as damaged, by its digest"
)
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


@pytest.mark.fault("Files", "a file cut at any length", "refused, with the file's name")
def test_truncation_at_every_length_is_caught(file: Path) -> None:
    for length in reversed(range(file.stat().st_size)):
        os.truncate(file, length)
        with pytest.raises(CheckpointError, match=r"small\.safetensors"):
            load_file(file)


@pytest.mark.fault("Files", "bytes appended to a file", "refused: sizes contradict")
@pytest.mark.parametrize("extra", [b"\0", b" ", b"x" * 100])
def test_appended_bytes_are_caught(file: Path, extra: bytes) -> None:
    file.write_bytes(file.read_bytes() + extra)
    with pytest.raises(CheckpointError, match="tensors need"):
        load_file(file)


@pytest.mark.fault("Files", "tensors of equal shape swapped", "refused by the digest")
def test_swapped_tensors_of_equal_shape_are_caught(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(path, {"a": torch.zeros(2), "b": torch.ones(2)}, {}, kind="agent")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"a":{', b'"x":{').replace(b'"b":{', b'"a":{'))
    with pytest.raises(CheckpointError, match="digest does not match"):
        load_file(path)


@pytest.mark.fault("Files", "a header edited by hand", "refused by the digest")
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


@pytest.mark.fault("Files", "a pickle in place of an agent, all protocols", "refused and not run")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(code_runner(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"looks like a pickle\. .*never opens pickles"):
        load_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("Files", "files of torch.save and SB3", "refused, named for what they are")
def test_torch_and_zip_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "new.pt")
    torch.save({"w": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "sb3.zip", "w") as archive:
        archive.writestr("data", "{}")
    for name, kind in (("new.pt", "zip"), ("old.pt", "pickle"), ("sb3.zip", "zip")):
        with pytest.raises(CheckpointError, match=rf"{name}: looks like a {kind}.*never opens"):
            load_file(tmp_path / name)


@pytest.mark.fault(
    "Files", "an empty file, HDF5, random bytes, zeros", "refused, named for what they are"
)
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


@pytest.mark.fault("Files", "safetensors of another project", "refused")
def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"w": torch.zeros(100)}, path, metadata)
        with pytest.raises(CheckpointError, match="mpd_gym did not write"):
            load_file(path)


@pytest.mark.fault(
    "Files", "a missing file, a folder, a pipe", "refused at once; a pipe is not waited for"
)
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


@pytest.mark.fault("Files", "a file of a newer format", "refused, with the command that updates")
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


@pytest.mark.fault(
    "Files", "a table that claims up to 2^64 bytes", "refused before memory is taken"
)
@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**32, 100_000, 99, 1, 0])
def test_a_table_length_beyond_the_file_takes_no_memory(
    file: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file.read_bytes()
    file.write_bytes(length.to_bytes(8, "little") + content[8:])
    assert_refused_without_memory(file, monkeypatch)


@pytest.mark.fault(
    "Files",
    "tensor sizes that contradict the file, up to 2^64 bytes",
    "refused before memory is taken",
)
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


@pytest.mark.fault("Files", "a header nested 100,000 levels deep", "refused as no valid JSON")
def test_deep_nesting_is_refused(file: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    rewritten(file, lambda table: table["__metadata__"].update(header='{"a":' + deep + "}"))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_file(file)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ('{"a":1,"a":2}', "appears twice"),
        ('{"a":NaN}', "NaN is no finite number"),
        ('{"a":1e999}', "1e999 is no finite number"),
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


@pytest.mark.fault("Files", "weights that are NaN or infinite", "neither written nor read")
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
