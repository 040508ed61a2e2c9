"""The C code of `native_unet.c`, compiled for the machine at hand at its first use.

A U-Net for control is some sixty layers of a few microseconds each: PyTorch spends more time
between them than in them, and its products of few rows read weights and multiply in turn. Where the
machine has a C compiler, which PyTorch's own compiler needs as well, this code takes their place;
it is compiled once, in three seconds, and kept in the user's cache. Without a compiler, or with
``MPD_GYM_NATIVE=0``, PyTorch's operators do the same, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from mpd_gym.atomic import atomic_path
from mpd_gym.models.backends.cpu import description

__all__ = ["compiler", "describe", "library"]

SOURCE = Path(__file__).with_name("native_unet.c")
FLAGS = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
COMPILING = 120  # seconds; it takes three


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is no compiler, or it is not wanted.

    Warns:
        RuntimeWarning: If a compiler is there and fails.
    """
    command = compiler()
    if command is None:
        return None
    try:
        return _load(_compiled(command))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        warnings.warn(
            f"{command} did not compile {SOURCE.name}, so that plans take longer than they could "
            f"(MPD_GYM_NATIVE=0 says that this is wanted): {_reason(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def compiler() -> str | None:
    """Path of the C compiler, ``CC`` first; None where there is none or it is not wanted."""
    if os.environ.get("MPD_GYM_NATIVE") == "0" or os.name == "nt":
        return None
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def describe() -> str:
    """One sentence for people: what computes the networks on this CPU."""
    found = library()
    if found is not None:
        lanes, dtypes = int(found.mpd_lanes()), "float32"
        if found.mpd_pairs():
            dtypes += " and bfloat16"
        return (
            f"On the CPU networks run in C, compiled by {compiler()}, {lanes} numbers at a time, "
            f"in {dtypes}."
        )
    reason = "no C compiler was found or it failed"
    if os.environ.get("MPD_GYM_NATIVE") == "0":
        reason = "MPD_GYM_NATIVE=0"
    return f"On the CPU networks run in PyTorch's operators: {reason}."


def _compiled(command: str) -> Path:
    """Path of the compiled code; its name tells source, compiler, CPU and its own content.

    Loading a file that was cut short would end the program, so its content is compared first.
    """
    arm = platform.machine().lower() in ("arm64", "aarch64")
    flags = (*FLAGS, "-mcpu=native" if arm else "-march=native")
    version = _run(command, "--version")
    parts = (SOURCE.read_text(), *flags, command, version, description())
    name, folder = f"native-{_digest(chr(0).join(parts).encode())}", _cache()
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as build:
        output = Path(build) / f"{name}.so"
        _run(command, *flags, "-o", str(output), str(SOURCE), "-lm")
        content = output.read_bytes()
    path = folder / f"{name}-{_digest(content)}.so"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _reason(error: Exception) -> str:
    """The line of a compiler's messages that tells what is wrong."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _run(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=COMPILING
    ).stdout


def _cache() -> Path:
    """The user's cache folder, or a temporary one where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(home) if home else Path.home() / ".cache") / "mpd_gym"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or a read-only one
        pass
    return Path(tempfile.mkdtemp(prefix="mpd_gym-"))


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for size in (found.mpd_lanes, found.mpd_pairs, found.mpd_step_size):
        size.restype = ctypes.c_int64
    found.mpd_run.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.mpd_run.argtypes = (
        *(pointer, number),  # steps
        *(pointer,) * 5,  # work space, input, output, scale and shift
        *(number,) * 3,
        *(pointer,) * 3,  # gradients
        number,
    )
    return found
