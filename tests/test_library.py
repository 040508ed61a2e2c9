"""What is compiled is used; what is missing, damaged or of other sources is said once."""

from __future__ import annotations

import _ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
from unets import LEVELS, needs_c

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


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPD_GYM_NATIVE", "0")
    assert compiled() is None
    assert "MPD_GYM_NATIVE=0" in describe()


def damaged(path: Path) -> Path:
    path.write_bytes(b"no library")
    return path


def cut(path: Path) -> Path:
    path.write_bytes(Path(_ctypes.__file__).read_bytes()[:3000])
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
    ],
    ids=["missing", "damaged", "cut", "another"],
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
