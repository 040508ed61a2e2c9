"""Build the C code of the networks where there is a compiler; everything else is in `setup.cfg`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

BACKENDS = Path("mpd_gym/models/backends")
LIBRARY = BACKENDS / "libunet.so"
FLAGS = ("-O3", "-ffp-contract=fast", "-std=gnu11", "-Wall", "-Wextra", "-fPIC", "-pthread")
X86 = {
    "v3": ("x86-64-v3", "-march=x86-64-v3"),
    "v4": ("x86-64-v4", "-march=x86-64-v4"),
    "v4_bf16": ("x86-64-v4 with bfloat16", "-march=x86-64-v4", "-mavx512bf16"),
}
ARM = {"aarch64": ("aarch64",)}
LOADED = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).mpd_find_level"
SECONDS = 300  # that a compiler may take for one file
LEVELS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


class BuildLibrary(build_ext):
    """Compile one library for `ctypes`, once for each level; without it PyTorch does the same."""

    def run(self) -> None:
        """Compile into the source tree or the build folder; a failure is told and no more."""
        target = Path() if self.inplace else Path(self.build_lib)
        target = (target / LIBRARY).absolute()
        target.unlink(missing_ok=True)
        names = (os.environ.get("CC"), "cc", "gcc", "clang")
        compiler = next((path for name in names if name and (path := shutil.which(name))), None)
        if names[0] and compiler != shutil.which(names[0]):
            print(f"mpd_gym: CC={names[0]!r} is no command; flags go into CFLAGS; took {compiler}")
        levels = LEVELS.get(platform.machine().lower(), {})
        if compiler is None or not levels or os.name == "nt":
            print("mpd_gym: no C compiler for this machine; networks will run in plain PyTorch")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _build(compiler, levels, Path(folder)).replace(target)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"mpd_gym: {_reason(error)}; networks will run in plain PyTorch")

    def get_outputs(self) -> list[str]:
        """Return what `run` has written into the build folder."""
        built = Path(self.build_lib) / LIBRARY
        return [str(built)] if built.exists() and not self.inplace else []

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: an editable installation reads the source tree."""
        return {}


class Modules(build_py):
    """Copy the modules that there are, beside none that an earlier build left."""

    def run(self) -> None:
        """Empty the build folder first."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "mpd_gym", ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """A wheel for one platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def _build(compiler: str, levels: dict[str, tuple[str, ...]], folder: Path) -> Path:
    """Compile all levels that the compiler knows; return the library, which loads."""
    files = sorted((BACKENDS / "c").iterdir())  # as `library.py` reads them
    digest = sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    objects, known = [], []
    for symbol, (name, *flags) in levels.items():
        defined = (f"-DLEVEL=mpd_{symbol}", f'-DLEVEL_NAME="{name}"', f'-DSOURCES="{digest}"')
        objects.append(folder / f"{symbol}.o")
        try:
            _compile(compiler, "level.c", objects[-1], *flags, *defined)
        except subprocess.CalledProcessError as error:
            print(f"mpd_gym: left out {name}: {_reason(error)}")
            objects.pop()
        else:
            known.append(f"-DHAS_{symbol.upper()}")
    if not known:
        raise OSError(f"{compiler} compiles for none of {', '.join(levels)}")
    objects.append(folder / "dispatch.o")
    _compile(compiler, "dispatch.c", objects[-1], *known)
    library = folder / "library.so"
    _run(compiler, *_more(), "-shared", "-pthread", "-o", str(library), *map(str, objects), "-lm")
    _run(sys.executable, "-c", LOADED, str(library))  # there, as a wrong one may end the process
    return library


def _more() -> list[str]:
    return os.environ.get("CFLAGS", "").split()


def _compile(compiler: str, source: str, target: Path, *flags: str) -> None:
    _run(compiler, *FLAGS, *flags, *_more(), "-c", str(BACKENDS / "c" / source), "-o", str(target))


def _run(*command: str) -> None:
    """Run a command that may hang, read what is typed, or print bytes that are no text."""
    with tempfile.TemporaryFile() as told:  # a pipe would wait for a hanging command's children
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, timeout=SECONDS
        )
        told.seek(0)
        text = told.read().decode(errors="replace")
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, stderr=text)


def _reason(error: Exception) -> str:
    """The line of a compiler's messages that tells what is wrong."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


setup(
    ext_modules=[
        Extension(
            "mpd_gym.models.backends.libunet",
            [str(BACKENDS / "c/level.c"), str(BACKENDS / "c/dispatch.c")],
            depends=glob(str(BACKENDS / "c/*")),
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "build_py": Modules, "bdist_wheel": Wheel},
)
