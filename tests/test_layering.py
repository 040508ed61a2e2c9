"""The house: every module has a room, rooms import one way, and no modules import in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import mpd_gym

ROOT = Path(mpd_gym.__file__).parent
FLOORS = [  # from the ground up; a room may import from its own floor and from those below
    ("_version", "atomic", "boundary", "errors", "processes", "types", "validation"),
    ("envs",),
    ("collect",),
    ("datasets",),
    ("models",),
    ("diffusion",),
    ("rankers",),
    ("checkpoint", "training"),
    ("latent",),
    ("agents",),
    ("evaluation",),
    ("cli",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GATHERERS = {"__init__", "__main__"}  # the package itself offers names of every room
FORBIDDEN = {  # neighbours on lower floors that a room does not know all the same
    "envs": {"torch"},
    "collect": {"mpd_gym.models"},
    "datasets": {"torch"},
    "diffusion": {"mpd_gym.models"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> set[str]:
    """Absolute names that a module imports at run time, also inside functions."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for child in block.body
        for node in ast.walk(child)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {
    module_name(path): imported(ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))
}


def room(name: str) -> str:
    """Room of a module, or of a name in it: the part after ``mpd_gym``."""
    return [*name.split("."), "__init__"][1]


def graph() -> dict[str, set[str]]:
    """Which modules of the package each of them imports."""
    return {
        module: {
            name if name in IMPORTS else name.rpartition(".")[0]
            for name in names
            if name.startswith("mpd_gym.")
        }
        - {module}
        for module, names in IMPORTS.items()
    }


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that all import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            left += new if (new := edges.get(left.pop(), set()) - found) else ()
            found |= new
        return found

    reach = {module: reached(module) for module in edges}
    groups = {
        tuple(sorted(other for other in reach[module] if module in reach.get(other, ())))
        for module in edges
    }
    return sorted(list(group) for group in groups if group)


def test_the_plan_names_every_room_and_no_other() -> None:
    assert {room(module) for module in IMPORTS} - GATHERERS - {"pretrained"} == set(FLOOR)


def test_no_import_runs_upwards() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names)
        if room(module) in FLOOR
        and name.startswith("mpd_gym.")
        and FLOOR.get(room(name), -1) > FLOOR[room(module)]
    ]
    assert upwards == []


def test_no_room_knows_a_forbidden_neighbour() -> None:
    known = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names)
        for banned in FORBIDDEN.get(room(module), ())
        if f"{name}.".startswith(f"{banned}.")
    ]
    assert known == []


def test_modules_do_not_import_in_a_circle() -> None:
    planted = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(planted) == [["a", "b", "c"]]
    assert circles(graph()) == []


def test_import_is_light_and_registers_every_id() -> None:
    code = (
        "import sys, mpd_gym, mpd_gym.evaluation, gymnasium;"
        "heavy = {'torch', 'mujoco', 'stable_baselines3', 'casadi', 'minari', 'pygame', 'scipy',"
        " 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)));"
        "print(sum('mpd_gym' in str(s.entry_point) for s in gymnasium.registry.values()))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert output[0] == "[]"
    assert int(output[1]) >= 5


def test_rooms_that_load_lazily_hold_what_they_name() -> None:
    from mpd_gym import agents, evaluation

    for package in (mpd_gym, agents, evaluation):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="nothing"):
            package.nothing  # noqa: B018
