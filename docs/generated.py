"""Text of the pages that is made from the code: options, commands, environments, public names.

A page has it where it says ``<!-- generated: KIND ARGUMENT -->``, which readers of Markdown do not
show. Links to a file of the repository that is included in a page lead to that page.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import typer
from typer.cli import get_docs_for_click

import mpd_gym.cli

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MARK = re.compile(r"<!-- generated: (\w+) ?(.*?) -->")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
SECTION = re.compile(r"^(?:Attributes|Args):\n((?: {4}.*\n|\n)+)", re.MULTILINE)
FIELD = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
PAGES = {
    "README.md": "docs/index.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "CHANGELOG.md": "docs/changelog.md",
    "mpd_gym/pretrained/README.md": "docs/pretrained.md",
}
RESULTS = """
```{toctree}
:hidden:
:glob:
results/*
```
"""


def fill_in(app: Any, page: str, source: list[str]) -> None:
    """Replace the marks of a page and lead its links, for Sphinx's event ``source-read``."""
    folder = (DOCS / page).parent
    text = _led(source[0], folder, folder)
    text = MARK.sub(lambda mark: KINDS[mark[1]](*filter(None, [mark[2]])), text)
    source[0] = text + (RESULTS if page == "results" else "")


def file(path: str) -> str:
    """A file of the repository, or its section that stands after ``#`` in `path`."""
    name, _, heading = path.partition("#")
    text = _led((ROOT / name).read_text(), (ROOT / name).parent, DOCS)
    if not heading:
        return text
    return re.split(rf"^## {re.escape(heading)}\n", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def options(path: str) -> str:
    """A table of a dataclass's fields, with defaults and what its docstring says of each."""
    config = _found(path)
    texts = _field_texts(config)
    rows = [
        f"| `{field.name}` | {_default(field)} | {texts[field.name]} |"
        for field in dataclasses.fields(config)
    ]
    table = ["```{table}", ":class: options", "", "| option | default | meaning |", "|---|---|---|"]
    return "\n".join([f"## {config.__name__}", "", *table, *rows, "```"])


def commands() -> str:
    """What every command of the command line says of itself."""
    command = typer.main.get_command(mpd_gym.cli.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="mpd-gym")
    return text[text.index("\n## ") :]


def environments() -> str:
    """The docstring of every environment, which is Markdown as Gymnasium's are, under its id."""
    parts = []
    for spec in gymnasium.registry.values():
        if isinstance(spec.entry_point, str) and spec.entry_point.startswith("mpd_gym."):
            text = str(inspect.getdoc(_found(spec.entry_point)))
            picture = f"images/{spec.id}.gif"
            parts += [f"## {spec.id}", f"![{spec.id}]({picture})"][: 1 + (DOCS / picture).exists()]
            parts.append(re.sub(r"^## ", "### ", text, flags=re.MULTILINE))
    return "\n\n".join(parts)


def names(module: str) -> str:
    """The reference of a module's public names."""
    found = import_module(module)
    lines = [str(found.__doc__).partition("\n\n")[2], "```{eval-rst}"]
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value):
            lines += [f".. autoclass:: {module}.{name}", "   :members:", ""]
        elif inspect.isfunction(value):
            lines += [f".. autofunction:: {module}.{name}", ""]
        elif isinstance(value, (dict, tuple)):
            entries = ", ".join(f"``{entry}``" for entry in value)
            lines += [f".. py:data:: {module}.{name}", "", f"   {entries}", ""]
    return "\n".join([*lines, "```"])


KINDS = {
    "commands": commands,
    "environments": environments,
    "file": file,
    "names": names,
    "options": options,
}


def _led(text: str, home: Path, place: Path) -> str:
    """Lead relative links of a text that lies in the folder `home` from the folder `place`."""

    def led(link: re.Match[str]) -> str:
        target = Path(os.path.relpath(home / link[1], ROOT)).as_posix()
        return f"]({Path(os.path.relpath(ROOT / PAGES.get(target, target), place)).as_posix()}"

    return LINK.sub(led, text)


def _found(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return f"`{type(made).__name__}(…)`" if dataclasses.is_dataclass(made) else f"`{made!r}`"
    return "–"


def _field_texts(config: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of the fields, by name."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if dataclasses.is_dataclass(kind):
            section = SECTION.search(f"{inspect.getdoc(kind)}\n")
            found = FIELD.findall(section[1]) if section else []
            texts |= {name: " ".join(text.split()) for name, text in found}
    return texts
