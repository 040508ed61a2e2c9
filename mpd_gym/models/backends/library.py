"""The compiled code of `c/`, which is built with the package.

The source is compiled for several sets of instructions, levels, into one library; the best level
that the CPU runs is chosen when it is loaded. The library is no Python module: it needs neither
Python's headers to be built nor a certain Python to be loaded.

It is trusted as the Python files beside it are: who can write to one can write to the other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import final

from mpd_gym.errors import check_choice

__all__ = ["LIBRARY", "Call", "Level", "Op", "compiled", "describe", "levels"]

LIBRARY = Path(__file__).with_name("libunet.so")
SOURCES = LIBRARY.with_name("c")  # which wheels do not hold
SWITCH = "MPD_GYM_NATIVE"  # an environment variable
_ANSWERS = {"0": False, "1": True, "false": False, "off": False, "on": True, "true": True}
_MACHINES = {62: ("x86_64", "amd64"), 183: ("aarch64", "arm64")}  # of ELF files


@final
class Op(ctypes.Structure):
    """``struct op``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "length", "rows", "channels")),
        *((name, ctypes.c_int64) for name in ("source", "target", "source_stride")),
        *((name, ctypes.c_int64) for name in ("target_stride", "source_time", "target_time")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("segments", "chunks", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("depth", "fetched", "chunk_size", "paired")),
        *((name, ctypes.c_int64) for name in ("groups", "film", "residual", "swish", "scratch")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("d_source", "d_target", "d_residual", "d_shifts")),
        *((name, ctypes.c_int64) for name in ("moments", "accumulate")),
        *((name, ctypes.c_void_p) for name in ("panels", "plain")),
        *((name, ctypes.c_int64) for name in ("lane_stride", "inner_stride", "place")),
        *((name, ctypes.c_int64) for name in ("row_pairs", "shifts")),
    ]


@final
class Call(ctypes.Structure):
    """``struct call``."""

    _fields_ = [
        ("ops", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("work", "input", "output", "scale", "shift")),
        *((name, ctypes.c_int64) for name in ("film_stride", "share", "first")),
        *((name, ctypes.c_void_p) for name in ("d_scale", "d_shift", "gradients")),
        ("threads", ctypes.c_int64),
    ]


@final
class Level(ctypes.Structure):
    """``struct level``: the code for one set of instructions.

    Attributes:
        name: Of the instructions.
        sources: Digest of the sources.
        lanes: Numbers in a vector.
        pairs: Whether it multiplies in bfloat16.
        run: Runs a `Call`, given its address.
    """

    name: bytes
    sources: bytes
    lanes: int
    pairs: int
    run: Callable[[int], None]
    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("sources", "name")),
        *((name, ctypes.c_int64) for name in ("lanes", "pairs")),
        ("run", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


@functools.cache
def compiled() -> Level | None:
    """The best level that this CPU runs; None where there is none, or where it is not wanted.

    Raises:
        ConfigError: If `SWITCH` has a value that is neither yes nor no.

    Warns:
        RuntimeWarning: If it is wanted and there is none.
    """
    if not _wanted():
        return None
    try:
        return levels()[0]
    except OSError as error:
        warnings.warn(
            f"Networks run in plain PyTorch, several times as slowly as in C: {error} "
            f"{SWITCH}=0 says that this is wanted.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def levels() -> list[Level]:
    """All levels that were compiled and that this CPU runs, from the best one on.

    Raises:
        OSError: If there are none, or if the library is damaged or of other sources.
    """
    if not os.path.lexists(LIBRARY):
        raise OSError("no C compiler was found, or it failed, when mpd_gym was installed.")
    if problem := _problem(LIBRARY):
        raise OSError(f"{LIBRARY.name} {problem}; install mpd_gym again.")
    library = ctypes.CDLL(str(LIBRARY))
    try:
        find = library.mpd_find_level
    except AttributeError as error:
        raise OSError(f"{LIBRARY.name} has no mpd_find_level; install mpd_gym again.") from error
    find.argtypes, find.restype = (ctypes.c_int64,), ctypes.POINTER(Level)
    found: list[Level] = []
    while pointer := find(len(found)):
        found.append(pointer.contents)
    if not found:
        raise OSError("this CPU lacks the instructions that it was compiled for.")
    if SOURCES.exists() and found[0].sources.decode() != _digest(SOURCES):
        raise OSError(f"{LIBRARY.name} is of other sources; install mpd_gym again.")
    return found


def _wanted() -> bool:
    answer = (os.environ.get(SWITCH) or "1").lower()
    check_choice(SWITCH, answer, _ANSWERS)
    return _ANSWERS[answer]


def _problem(path: Path) -> str:
    """What is wrong with a library that the loader would not say, or not survive."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait
            return "is no file"
        content = path.read_bytes()
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)}, which is not there"
    if not content.startswith(b"\x7fELF\x02\x01"):
        return ""
    machine, start, size, count = (
        int.from_bytes(content[a:b], "little") for a, b in ((18, 20), (40, 48), (58, 60), (60, 62))
    )
    if platform.machine().lower() not in _MACHINES.get(machine, ()):
        return f"is for another kind of machine than {platform.machine()}"
    return "lacks its end" if len(content) < start + size * count else ""


def _digest(folder: Path) -> str:
    content = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha256(content).hexdigest()


def describe() -> str:
    """One sentence for people: what computes the networks on this CPU."""
    if not _wanted():
        return f"On the CPU networks run in plain PyTorch: {SWITCH}={os.environ[SWITCH]}."
    try:
        best = levels()[0]
    except OSError as error:
        return f"On the CPU networks run in plain PyTorch: {error}"
    dtypes = "float32 and bfloat16" if best.pairs else "float32"
    return f"On the CPU networks run in C for {best.name.decode()} in {dtypes}."
