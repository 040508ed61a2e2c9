"""The one file format: tensors and a JSON header in one safetensors file, and no pickle anywhere.

A file is what every safetensors reader expects: eight bytes with the length of a JSON table, the
table (padded with spaces), and the bytes of the tensors. The table's ``__metadata__`` begins with
a SHA-256 digest of the *whole file*, taken with the digest's own 64 characters set to ``0``. No
byte is outside it, neither white space nor the order of keys, so any damaged byte is noticed
(safetensors itself notices none in the payload). The digest finds damage and careless editing; it
is no signature, as whoever writes a file can compute it.

Reading believes nothing: sizes are compared with the file before memory is taken, the bytes are
read into private memory (a memory map dies by SIGBUS when the file shrinks), and nothing in a
file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym._version import __version__
from mpd_gym.atomic import atomic_path
from mpd_gym.errors import CheckpointError, InputError
from mpd_gym.types import Array

__all__ = ["FORMAT_VERSION", "flatten", "load_file", "load_into", "save_file", "unflatten"]

FORMAT_VERSION = 1
"""Version of the format that this package writes; it reads this one and refuses newer ones."""

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_PREFIX = b'{"__metadata__":{"mpd_gym_sha256":"'  # opens every file of ours, so the digest is found
_ZEROS = b"0" * 64
_RESERVED = ("format_version", "kind", "package_version")
_MAX_TABLE_BYTES = 16 * 2**20
_SUFFIX = ".safetensors"

_COPY_AGAIN = "Copy or download it again"
_NEVER_PICKLE = (
    "mpd_gym reads only .safetensors files that it wrote itself and never opens pickles, because "
    "loading one can run any code"
)
_FOREIGN = (
    (b"PK", "a zip archive, as torch.save and Stable-Baselines3 write them (pickles inside)"),
    (b"\x80", "a pickle"),
    (b"\x89HDF", "an HDF5 file; data sets are read by mpd_gym.datasets"),
    (b"\x1f\x8b", "a gzip archive"),
)


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Array],
    header: Mapping[str, Any],
    *,
    kind: str,
) -> None:
    """Write one file, whole or not at all; equal contents give equal bytes.

    Args:
        path: Ends in ``.safetensors``; its folder is made if missing.
        tensors: Finite tensors or NumPy arrays of any shape; float64, float32, float16, bfloat16,
            integers or bool. Those on other devices are copied one by one.
        header: What describes them, JSON values only; the keys ``format_version``, ``kind`` and
            ``package_version`` are added and must be absent.
        kind: What the file is for, such as ``"agent"`` or ``"training"``; checked by `load_file`.

    Raises:
        InputError: If a name, dtype or header value cannot be stored, or a tensor holds NaN or
            infinity. An existing file stays as it is.
        CheckpointError: If the disk refuses; an existing file stays as it is.
    """
    target = Path(path)
    if target.suffix != _SUFFIX:
        raise InputError(f"path must end in '{_SUFFIX}'; got '{target}'")
    stored = {name: _as_tensor(name, value) for name, value in tensors.items()}
    names = sorted(stored, key=lambda name: (-stored[name].element_size(), name))  # all aligned
    opening = _opening({name: stored[name] for name in names}, _header_text(header), kind)
    digest = hashlib.sha256(opening)
    try:
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            file.write(opening)
            for name in names:
                content = _bytes_of(_finite(name, stored[name].cpu().contiguous()))
                digest.update(content)
                file.write(content)
            file.seek(8 + len(_PREFIX))
            file.write(digest.hexdigest().encode())
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written ({error}); what was there before is unchanged. "
            "Free space or choose another folder"
        ) from error


def load_file(
    path: str | os.PathLike[str], *, kind: str | None = None, max_bytes: int = 4 * 2**30
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_file` wrote, with every byte checked.

    Args:
        path: The file.
        kind: The kind it must be of; None accepts any.
        max_bytes: Larger files are refused before memory is taken.

    Returns:
        CPU tensors by name (``.numpy()`` gives the array at no cost), and the header, with the
        keys ``format_version``, ``kind`` and ``package_version`` added.

    Raises:
        CheckpointError: If the file is missing, truncated, damaged, of another kind, written by a
            newer version, or not one of ours. The message names the file and what to do.
    """
    try:
        with _regular_file(path) as (file, size):
            table, digest = _read_opening(file, size, max_bytes)
            metadata, entries = _parse(table, size)
            tensors = {entry.name: _read_tensor(file, entry, digest) for entry in entries}
        if digest.hexdigest() != metadata["mpd_gym_sha256"]:
            _refuse("is damaged: its digest does not match its contents")
        for name, tensor in tensors.items():
            if not _is_valid(tensor):
                _refuse(f"tensor '{name}' holds NaN, infinity or no bool", "Train again")
        return tensors, _header_of(metadata, kind)
    except _RefusedError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    except OSError as error:
        problem = error.strerror or error
        raise CheckpointError(f"{os.fspath(path)}: cannot be read ({problem})") from error


def load_into(
    target: nn.Module | Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    *,
    source: str = "checkpoint",
) -> None:
    """Copy tensors into a module's parameters and buffers, all of them or none.

    Unlike `Module.load_state_dict` it neither recasts dtypes nor accepts NaN.

    Args:
        target: Takes the values, on its own device: a module or named tensors.
        tensors: Names as in ``module.state_dict()``, after `prefix`; others are ignored.
        prefix: Opens the names that belong to `target`, for example ``"planner/"``.
        source: File or origin, for messages.

    Raises:
        CheckpointError: If a name is missing or unknown, or a shape or dtype differs, or a value
            is not finite; the target is then unchanged.
    """
    given = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    wanted = target.state_dict() if isinstance(target, nn.Module) else target
    problems = [f"'{prefix}{name}' is missing" for name in wanted if name not in given]
    problems += [f"'{prefix}{name}' is unknown" for name in given if name not in wanted]
    for name, want in wanted.items():
        have = given.get(name, want)
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(f"'{prefix}{name}' is {_spec(have)}, expected {_spec(want)}")
        elif not _is_valid(have):
            problems.append(f"'{prefix}{name}' holds NaN or infinity")
    if problems:
        shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{source}: {len(problems)} tensors do not fit {type(target).__name__}: {shown}. "
            "Build it from the configuration that the file was saved with"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name])


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Join the keys of nested mappings with ``/``: ``{"a": {"b": x}}`` becomes ``{"a/b": x}``.

    Raises:
        InputError: If a key is empty or holds ``/``, or a mapping is empty, which `unflatten`
            could not give back.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not key or "/" in key:
            raise InputError(f"a tensor's name must be non-empty and without '/'; got '{key}'")
        if not isinstance(value, Mapping):
            flat[key] = value
            continue
        if not value:
            raise InputError(f"'{key}' holds no tensors; leave it out")
        flat |= {f"{key}/{name}": leaf for name, leaf in flatten(value).items()}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `flatten`.

    Raises:
        CheckpointError: If a name is both a value and a folder of others.
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node: Any = tree
        for folder in folders:
            node = node.setdefault(folder, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf in node:
            raise CheckpointError(f"tensor name '{name}' lies inside another tensor's name")
        node[leaf] = value
    return tree


class _RefusedError(Exception):
    """What is wrong with the file at hand; the caller adds its path."""


def _refuse(problem: str, remedy: str = _COPY_AGAIN) -> NoReturn:
    raise _RefusedError(f"{problem}. {remedy}")


@final
@dataclass(frozen=True)
class _Entry:
    """A tensor that the table announces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


# Writing


def _as_tensor(name: str, value: Tensor | Array) -> Tensor:
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise InputError(f"a tensor's name must be a non-empty string; got {name!r}")
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.require(value, requirements=("C", "W")))
        except (TypeError, ValueError) as error:
            raise InputError(f"tensor '{name}' cannot be stored: {error}") from error
    if value.dtype not in _DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPE_NAMES)
        raise InputError(f"tensor '{name}' is {value.dtype}; convert it to one of {known}")
    return value.detach()


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not _is_valid(tensor):
        raise InputError(f"tensor '{name}' holds NaN or infinity and is not saved")
    return tensor


def _header_text(header: Mapping[str, Any]) -> str:
    taken = sorted(set(header) & set(_RESERVED))
    if taken:
        raise InputError(f"header keys {taken} are written by save_file; leave them out")
    try:
        _check_keys(header)
        return json.dumps(dict(header), sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"header must hold finite JSON values under string keys: {error}"
        ) from None


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not a string")  # json would make it one
            _check_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item)


def _opening(tensors: Mapping[str, Tensor], header: str, kind: str) -> bytes:
    """Length and table of a file, with zeros for its digest."""
    table: dict[str, Any] = {
        "__metadata__": {
            "mpd_gym_sha256": _ZEROS.decode(),  # first, as _PREFIX expects
            "format_version": str(FORMAT_VERSION),
            "kind": kind,
            "package_version": __version__,
            "header": header,
        }
    }
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_TABLE_BYTES:
        raise InputError(
            f"header and tensor names take {len(text):,} bytes, more than {_MAX_TABLE_BYTES:,}; "
            "store long lists as tensors"
        )
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """Memory of a contiguous CPU tensor, shared."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _is_valid(tensor: Tensor) -> bool:
    """Whether all floats are finite and all bools 0 or 1."""
    if tensor.dtype is torch.bool:
        return tensor.numel() == 0 or int(tensor.view(torch.uint8).max()) <= 1
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# Reading


@contextmanager
def _regular_file(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], int]]:
    mode = os.stat(path).st_mode  # opening a pipe or device would wait, or never end
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        _refuse(f"is {kind}", "Name one .safetensors file")
    with open(path, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


def _read_opening(file: IO[bytes], size: int, max_bytes: int) -> tuple[bytes, hashlib._Hash]:
    """Read the table, and begin the digest of the file."""
    if size > max_bytes:
        _refuse(
            f"is {size:,} bytes, more than max_bytes={max_bytes:,}", "Raise it if that is right"
        )
    start = file.read(8 + len(_PREFIX))
    if start[8:] != _PREFIX:
        _refuse(*_what_else(start, size))
    length, digest_stop = int.from_bytes(start[:8], "little"), len(_PREFIX) + len(_ZEROS)
    if not digest_stop <= length <= min(size - 8, _MAX_TABLE_BYTES):
        _refuse(f"is truncated or damaged: its table claims {length:,} bytes of {size:,}")
    table = _PREFIX + file.read(length - len(_PREFIX))
    if len(table) != length:
        _refuse("shrank while it was read")
    digest = hashlib.sha256(start)
    digest.update(_ZEROS + table[digest_stop:])
    return table, digest


def _what_else(start: bytes, size: int) -> tuple[str, str]:
    """What a file is that does not open as ours do, and what to do."""
    if not start:
        return "is empty", _COPY_AGAIN
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "is a safetensors file that mpd_gym did not write, or a damaged one", _COPY_AGAIN
    for magic, name in _FOREIGN:
        if start.startswith(magic):
            return f"looks like {name}", _NEVER_PICKLE
    return "is damaged, truncated or of another format", _NEVER_PICKLE


def _parse(table: bytes, size: int) -> tuple[dict[str, str], list[_Entry]]:
    """Check the table against the file's size, before memory is taken."""
    content = _json(table)
    metadata = content.pop("__metadata__")
    _check_metadata(metadata)
    entries, stop = [], 0
    for name, fields in content.items():
        entry, start, next_stop = _entry(name, fields)
        if start != stop:
            _refuse(f"is damaged: tensor '{name}' does not follow the one before it")
        entries.append(entry)
        stop = next_stop
    there = size - 8 - len(table)
    if stop != there:
        _refuse(f"is truncated or damaged: its tensors need {stop:,} bytes, {there:,} are there")
    return metadata, entries


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    version = metadata.get("format_version")
    if isinstance(version, str) and re.fullmatch("[1-9][0-9]{0,8}", version):
        if int(version) > FORMAT_VERSION:
            _refuse(
                f"has format version {version}; mpd_gym {__version__} reads up to {FORMAT_VERSION}",
                "Update it: pip install --upgrade mpd-gym",
            )
    keys = {"mpd_gym_sha256", "format_version", "kind", "package_version", "header"}
    strings = all(isinstance(value, str) for value in metadata.values())
    if version != str(FORMAT_VERSION) or set(metadata) != keys or not strings:
        _refuse("is damaged: its metadata are not those that mpd_gym writes")


def _entry(name: str, fields: Any) -> tuple[_Entry, int, int]:
    """Return what the table says of one tensor, and where its bytes start and stop."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"is damaged: the table's entry for tensor '{name}' is incomplete")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(f"is damaged: tensor '{name}' has the unknown dtype {dtype!r}")
    lists = _are_sizes(shape) and _are_sizes(offsets) and len(shape) <= 32 and len(offsets) == 2
    # The second product is for shapes such as [0, 2**62], whose strides would overflow.
    if (
        not lists
        or math.prod(shape) * _DTYPES[dtype].itemsize != offsets[1] - offsets[0]
        or math.prod(max(length, 1) for length in shape) >= 2**60
    ):
        _refuse(f"is damaged: shape and offsets of tensor '{name}' contradict each other")
    return _Entry(name, _DTYPES[dtype], tuple(shape)), offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _read_tensor(file: IO[bytes], entry: _Entry, digest: hashlib._Hash) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    content, taken = _bytes_of(tensor), 0
    while taken < len(content):
        count = file.readinto(content[taken:])  # type: ignore[attr-defined]  # binary files have it
        if not count:
            _refuse("shrank while it was read")
        taken += count
    digest.update(content)
    return tensor


def _header_of(metadata: Mapping[str, str], kind: str | None) -> dict[str, Any]:
    found = metadata["kind"]
    if kind is not None and found != kind:
        _refuse(f"is a file of kind '{found}'", f"Name one of kind '{kind}'")
    return _json(metadata["header"].encode()) | {
        "format_version": int(metadata["format_version"]),
        "kind": found,
        "package_version": metadata["package_version"],
    }


def _json(text: bytes) -> dict[str, Any]:
    """Parse an object strictly: no duplicate keys, no NaN, no nesting beyond Python's limit."""
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"is damaged: its table is not valid JSON ({error})")
    if not isinstance(content, dict):
        _refuse("is damaged: its table is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
