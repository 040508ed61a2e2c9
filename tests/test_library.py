"""What is compiled is used; what is missing, damaged or of other sources is said once."""

from __future__ import annotations

import _ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from unets import LEVELS, needs_c

from mpd_gym.errors import ConfigError
from mpd_gym.models.backends import library
from mpd_gym.models.backends.library import compiled, describe


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not looked for compiled code yet, and wants it."""
    monkeypatch.delenv("MPD_GYM_NATIVE", raising=False)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@needs_c
def test_the_best_level_is_taken_and_named() -> None:
    best, *_ = LEVELS
    level = compiled()
    assert level is not None and level.name.decode() == best
    assert f"run in C for {best} in float32" in describe()


@pytest.mark.parametrize("no", ["0", "false", "OFF"])
def test_it_can_be_switched_off(no: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPD_GYM_NATIVE", no)
    assert compiled() is None
    assert f"MPD_GYM_NATIVE={no}" in describe()


@needs_c
@pytest.mark.parametrize("yes", ["", "1", "true", "On"])
def test_it_can_be_switched_on(yes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPD_GYM_NATIVE", yes)
    assert compiled() is not None


@pytest.mark.fault(
    "Machine", "MPD_GYM_NATIVE that is neither yes nor no", "ConfigError with the words that are"
)
def test_a_switch_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPD_GYM_NATIVE", "flase")
    with pytest.raises(ConfigError, match=r"MPD_GYM_NATIVE: expected one of 0, 1, false.*'false'"):
        compiled()


def damaged(path: Path) -> Path:
    path.write_bytes(b"no library")
    return path


def cut(path: Path) -> Path:
    path.write_bytes(Path(_ctypes.__file__).read_bytes()[:3000])
    return path


def linked(path: Path) -> Path:
    path.symlink_to(path.with_name("gone.so"))
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def foreign(path: Path) -> Path:
    content = bytearray(Path(_ctypes.__file__).read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # RISC-V
    path.write_bytes(content)
    return path


@pytest.mark.fault(
    "Machine",
    "a compiled library that is missing, damaged, cut or another",
    "plain PyTorch, with one warning",
)
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (lambda path: path, "no C compiler was found"),
        (damaged, "file too short|invalid ELF header|not a mach-o"),
        (cut, "lacks its end|mach-o|truncated"),
        (lambda _: Path(_ctypes.__file__), "has no mpd_find_level"),
        (linked, r"is a link to .*gone\.so, which is not there"),
        (pipe, "is no file"),
        (folder, "is no file"),
        pytest.param(
            foreign,
            "is for another kind of machine",
            marks=pytest.mark.fault(
                "Machine",
                "a dangling link, a pipe, a folder or another machine's library in its place",
                "plain PyTorch, with one warning that says which",
            ),
        ),
    ],
    ids=["missing", "damaged", "cut", "another", "link", "pipe", "folder", "foreign"],
)
def test_without_it_plain_pytorch_runs_and_says_so_once(
    file: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "LIBRARY", file(tmp_path / "libunet.so"))  # type: ignore[operator]
    with pytest.warns(RuntimeWarning, match=reason) as warned:
        assert compiled() is None
        assert compiled() is None
    assert len(warned) == 1
    assert "plain PyTorch" in describe()


@pytest.mark.fault(
    "Machine", "a compiled library of other sources", "plain PyTorch, with one warning"
)
@needs_c
def test_a_library_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "level.c").write_text("/* changed since it was compiled */")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.warns(RuntimeWarning, match="is of other sources"):
        assert compiled() is None
