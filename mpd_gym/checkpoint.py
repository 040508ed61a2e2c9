"""The one file format: tensors and a JSON header in one safetensors file, and no pickle anywhere.

Every safetensors reader can read a file: eight bytes with the length of a JSON table, the table
(padded with spaces), and the bytes of the tensors. The table's ``__metadata__`` begins with a
SHA-256 digest of the *whole file*, taken with the digest's own 64 characters set to ``0``. It
covers every byte, also white space and the order of keys, so any damaged byte is noticed
(safetensors itself notices none in the payload). The digest finds damage and careless editing. It
is no signature: whoever writes a file can compute it.

Reading trusts nothing: it compares sizes with the file before it takes memory, copies the bytes
into private memory (a memory map dies by SIGBUS when the file shrinks), and executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym._version import __version__
from mpd_gym.atomic import atomic_path, user_path
from mpd_gym.errors import CheckpointError, FileError, InputError
from mpd_gym.types import Array

__all__ = ["FORMAT_VERSION", "load_file", "load_into", "save_file", "weights_digest"]

FORMAT_VERSION = 1
"""Version of the format that this package writes; it reads this one and refuses newer ones."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_PREFIX = b'{"__metadata__":{"mpd_gym_sha256":"'  # opens the table of every file of this package
_ZEROS = b"0" * 64
_RESERVED = ("format_version", "kind", "package_version")
_MAX_TABLE_BYTES = 16 * 2**20
_SUFFIX = ".safetensors"

_COPY_AGAIN = "Copy or download it again"
_NEVER_PICKLE = "mpd_gym reads only files that it wrote and never opens pickles: they can run code"
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
        header: Describes them, JSON values only. This function adds the keys ``format_version``,
            ``kind`` and ``package_version``.
        kind: Purpose of the file, such as ``"agent"`` or ``"training"``; `load_file` checks it.

    Raises:
        InputError: If a name, dtype or header value cannot be stored, or a tensor holds NaN or
            infinity. An existing file stays as it is.
        CheckpointError: If the disk refuses; an existing file stays as it is.
    """
    target = user_path(path)
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
                tensor = stored[name].cpu().contiguous()
                if not _is_valid(tensor):
                    raise InputError(f"tensor '{name}' holds NaN or infinity and is not saved")
                content = _bytes_of(tensor)
                digest.update(content)
                file.write(content)
            file.seek(8 + len(_PREFIX))
            file.write(digest.hexdigest().encode())
    except FileError as error:
        raise CheckpointError(f"{error}; an existing file is unchanged") from error


def load_file(
    path: str | os.PathLike[str], *, kind: str | None = None, max_bytes: int = 4 * 2**30
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_file` wrote, with every byte checked.

    Args:
        path: The file.
        kind: Expected kind; None accepts any.
        max_bytes: Larger files are refused before memory is taken.

    Returns:
        CPU tensors by name (``.numpy()`` shares their memory), and the header with the keys
        ``format_version``, ``kind`` and ``package_version``.

    Raises:
        CheckpointError: If the file is missing, truncated, damaged, of another kind, written by a
            newer version, or not written by this package. The message names the file and the
            remedy.
    """
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            table, digest = _read_opening(file, size, max_bytes)
            metadata, entries = _parse(table, size)
            tensors = {name: _read_tensor(file, one, digest) for name, one in entries.items()}
        if digest.hexdigest() != metadata["mpd_gym_sha256"]:
            _refuse("is damaged: its digest does not match its contents")
        for name, tensor in tensors.items():
            if not _is_valid(tensor):
                _refuse(f"tensor '{name}' holds NaN, infinity or no bool", "Train again")
        return tensors, _header_of(metadata, kind)
    except _RefusedError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def load_into(
    target: nn.Module | Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    *,
    source: str = "checkpoint",
) -> None:
    """Copy tensors into a module's parameters and buffers, all of them or none.

    Unlike `Module.load_state_dict`, it neither recasts dtypes nor accepts NaN.

    Args:
        target: Module or named tensors to fill, each on its own device.
        tensors: Values named as in ``module.state_dict()``, after `prefix`. Names without the
            prefix are ignored.
        prefix: Opens the names that belong to `target`, for example ``"planner/"``.
        source: File, for messages.

    Raises:
        CheckpointError: If a name is missing or unknown, a shape or dtype differs, or a value is
            not finite. The target is then unchanged.
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


def weights_digest(module: nn.Module) -> str:
    """32 hexadecimal digits that differ where a parameter or buffer does."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        tensor = value.cpu().contiguous()
        digest.update(f"{name} {_spec(tensor)} ".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


class _RefusedError(Exception):
    """The problem with a file; the caller adds its path."""


def _refuse(problem: str, remedy: str = _COPY_AGAIN) -> NoReturn:
    raise _RefusedError(f"{problem}. {remedy}")


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


def _header_text(header: Mapping[str, Any]) -> str:
    if taken := sorted(set(header) & set(_RESERVED)):
        raise InputError(f"header keys {taken} are written by save_file; leave them out")
    try:
        _check_keys(header)
        return json.dumps(dict(header), sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"header: expected finite JSON under string keys: {error}") from None


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"key {odd[0]!r} is not a string")  # json would make it one
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
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
        stop = start + tensor.nbytes
        dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_TABLE_BYTES:
        problem = f"header and names take {len(text):,} bytes, more than {_MAX_TABLE_BYTES:,}"
        raise InputError(f"{problem}; store long lists as tensors")
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


def _open(path: str | os.PathLike[str]) -> IO[bytes]:
    path = user_path(path)
    mode = os.stat(path).st_mode  # a pipe or device would block
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        _refuse(f"is {kind}", "Name one .safetensors file")
    return open(path, "rb")


def _read_opening(file: IO[bytes], size: int, max_bytes: int) -> tuple[bytes, hashlib._Hash]:
    """Read the table, and begin the digest of the file."""
    if size > max_bytes:
        _refuse(f"is {size:,} bytes, more than max_bytes={max_bytes:,}", "Raise the limit")
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
    """Name the format of a foreign file, and the remedy."""
    if not start:
        return "is empty", _COPY_AGAIN
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "is a safetensors file that mpd_gym did not write, or a damaged one", _COPY_AGAIN
    names = (f"looks like {name}" for magic, name in _FOREIGN if start.startswith(magic))
    return next(names, "is damaged, truncated or of another format"), _NEVER_PICKLE


def _parse(table: bytes, size: int) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Check the table against the file's size; return metadata and the fields of each tensor."""
    content = _json(table)
    metadata = content.pop("__metadata__")
    _check_metadata(metadata)
    stop = 0
    for name, fields in content.items():
        start, next_stop = _check_entry(name, fields)
        if start != stop:
            _refuse(f"is damaged: tensor '{name}' does not follow the one before it")
        stop = next_stop
    there = size - 8 - len(table)
    if stop != there:
        _refuse(f"is truncated or damaged: its tensors need {stop:,} bytes, {there:,} are there")
    return metadata, content


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    version = str(metadata.get("format_version"))
    if re.fullmatch("[1-9][0-9]{0,8}", version) and int(version) > FORMAT_VERSION:
        _refuse(
            f"has format version {version}; mpd_gym {__version__} reads up to {FORMAT_VERSION}",
            "Update it: pip install --upgrade mpd-gym",
        )
    keys = {"mpd_gym_sha256", "format_version", "kind", "package_version", "header"}
    strings = all(isinstance(value, str) for value in metadata.values())
    if version != str(FORMAT_VERSION) or set(metadata) != keys or not strings:
        _refuse("is damaged: its metadata are not those that mpd_gym writes")


def _check_entry(name: str, fields: Any) -> tuple[int, int]:
    """Check the table's entry for one tensor; return where its bytes start and stop."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"is damaged: the table's entry for tensor '{name}' is incomplete")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(f"is damaged: tensor '{name}' has the unknown dtype {dtype!r}")
    valid = _are_sizes(shape) and _are_sizes(offsets) and len(shape) <= 32 and len(offsets) == 2
    valid = valid and math.prod(shape) * _DTYPES[dtype].itemsize == offsets[1] - offsets[0]
    # Strides of shapes such as [0, 2**62] would overflow.
    if not valid or math.prod(max(length, 1) for length in shape) >= 2**60:
        _refuse(f"is damaged: shape and offsets of tensor '{name}' contradict each other")
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _read_tensor(file: IO[bytes], fields: Mapping[str, Any], digest: hashlib._Hash) -> Tensor:
    tensor = torch.empty(fields["shape"], dtype=_DTYPES[fields["dtype"]])
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
        content = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        _refuse(f"is damaged: its table is not valid JSON ({error})")
    if not isinstance(content, dict):
        _refuse("is damaged: its table is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):  # NaN, Infinity, 1e999
        raise ValueError(f"{text} is no finite number")
    return number
