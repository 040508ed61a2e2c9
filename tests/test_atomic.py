"""Files are written whole or not at all, under names that stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpd_gym.atomic import atomic_path, file_name


@pytest.mark.parametrize("name", ["CarUMaze-v0", "PointMaze_UMaze-v3", "a.b", "a..b", "x" * 100])
def test_a_plain_name_is_its_own_file_name(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.fault(
    "Files", "a name from data that is a path, hidden, a device, too long or empty", "a plain name"
)
@pytest.mark.parametrize(
    "name",
    [
        *("../../../x", "/etc/passwd", "a/b", "a\\b", "C:\\x", "..", ".", ".hidden", "-rf", ""),
        *(" ", "a b", "a\x00b", "a\nb", "CON", "nul.zip", "lpt1", "x" * 101, "é", "\ud800", "a."),
    ],
)
def test_any_name_becomes_one_part_of_a_path(tmp_path: Path, name: str) -> None:
    made = file_name(name)
    path = tmp_path / made
    path.write_text("")
    assert path.resolve().parent == tmp_path.resolve()
    assert (tmp_path / f".{made}-12345678.safetensors").name.isascii()
    assert made[0] not in ".-" and len(made) <= 112
    assert made.partition(".")[0].upper() not in {"CON", "NUL", "LPT1"}


def test_different_names_get_different_file_names() -> None:
    names = ["a/b", "a-b", "a:b", "a b", "../a/b", "a/b/", "", "unnamed", "x" * 200, "x" * 201]
    assert len({file_name(name).lower() for name in names}) == len(names)


@pytest.mark.fault(
    "Files",
    "temporary files that a killed save left",
    "the next save removes them, and none of a save that runs",
)
def test_the_next_save_removes_what_killed_ones_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as running:
        running.write_text("running")
        kept = [tmp_path / name for name in (".a-1.txt", ".a-b-writing-1.txt", ".a-writing-1.csv")]
        killed = tmp_path / ".a-writing-1.txt"
        for file in (killed, *kept):
            file.touch()
        with atomic_path(path) as other:
            other.write_text("other")
        assert path.read_text() == "other" and not killed.exists()
        assert running.exists() and all(file.exists() for file in kept)
    assert path.read_text() == "running"
    assert {*tmp_path.iterdir()} == {path, *kept}


@pytest.mark.fault("Files", "a save to a symbolic link", "the file that it names is written")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "folder/real.txt", tmp_path / "link.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("old")
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
