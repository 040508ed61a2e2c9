"""The documentation: links lead somewhere, commands parse, snippets run, pages stay short."""

from __future__ import annotations

import pkgutil
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import mpd_gym
from mpd_gym.cli import app
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "mpd_gym/pretrained/*.md")
    for path in ROOT.glob(pattern)
)
LENGTHS = {"README.md": 150, "docs/guide.md": 150, "docs/speed.md": 60, "CHANGELOG.md": 60}
TAUGHT = ["README.md", "docs/guide.md", "docs/data.md", "docs/agents.md"]
BUDGETS = {
    "episodes=100": "episodes=2",
    '"Pendulum-v1").items()': '"Pendulum-v1", seeds=2).items()',
}
TINY = {
    "unet": UnetConfig(width=8, multipliers=(1, 2), groups=4),
    "training": TrainingConfig(steps=2, batch_size=4, validation_batches=1, ema_every=1),
    "regressor_training": TrainingConfig(steps=2, batch_size=4, validation_batches=1, ema_every=1),
    "validation_fraction": 0.5,
}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_headings_that_a_page_leads_to_exist(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", path.read_text())
    assert not [link for link in links if not _there(path, *link.partition("#")[::2])]
    scripts = re.findall(r"(?:benchmarks|examples)/[a-z_\d]+\.py", path.read_text())
    assert not [script for script in scripts if not (ROOT / script).exists()]


def _there(page: Path, name: str, heading: str) -> bool:
    target = page.parent / name if name else page
    if not heading:
        return target.exists()
    titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_names_in_pages_and_docstrings_exist() -> None:
    rooms = ("mpd_gym", "studies", "examples")
    pages = [ROOT / page for page in PAGES if "results" not in page]  # which tell of former code
    code = [path for room in rooms for path in ROOT.glob(f"{room}/**/*.py")]
    texts = [path.read_text() for path in (*pages, *code)]
    names = {name for text in texts for name in re.findall(r"`(mpd_gym(?:\.\w+)+)`", text)}
    assert len(names) > 20
    assert not sorted(name for name in names if not _exists(name))


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


@pytest.mark.parametrize("page", LENGTHS)
def test_a_page_stays_short(page: str) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= LENGTHS[page]


@pytest.mark.parametrize("page", TAUGHT)
def test_commands_of_a_page_are_those_of_the_command_line(page: str) -> None:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^mpd-gym (.*)$", text, re.MULTILINE)
    mentioned = re.findall(r"(?<!`)`mpd-gym ([a-z][^`]*)`", text)  # these may leave out arguments
    assert lines or mentioned
    known: Any = typer.main.get_command(app)
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        known.commands[name].make_context(name, arguments)  # parses, and runs nothing
    for line in mentioned:
        name, *arguments = shlex.split(line)
        options = {option for parameter in known.commands[name].params for option in parameter.opts}
        assert {part for part in arguments if part.startswith("-")} <= options


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/data.md"])
def test_the_snippets_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpd_gym").symlink_to(ROOT / "mpd_gym")  # as in a clone, which stays clean
    monkeypatch.chdir(tmp_path)
    laptop = mpd_gym.preset
    monkeypatch.setattr(
        mpd_gym, "preset", lambda name: replace(laptop(name), **TINY), raising=False
    )
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    for full, small in BUDGETS.items():
        code = code.replace(full, small)
    exec(compile(code, page, "exec"), {})
