"""The layers import one way: a module may import only from layers below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mpd_gym

ROOT = Path(mpd_gym.__file__).parent
LAYERS = [
    ("_version", "atomic", "errors", "processes", "types", "validation"),
    ("envs",),
    ("collect",),
    ("datasets",),
    ("models",),
    ("diffusion",),
    ("rankers",),
    ("checkpoint", "training"),
    ("latent",),
    ("agents",),
    ("evaluation", "open_loop_error"),
    ("reports",),
    ("comparison", "experiments", "demo", "watch"),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
# The layers below agents know nothing of these neighbours although they rank lower.
FORBIDDEN = {
    "envs": {"torch"},
    "collect": {"mpd_gym.models"},
    "datasets": {"torch"},
    "diffusion": {"mpd_gym.models"},
}


def imported(module: Path) -> list[str]:
    """Absolute names that `module` imports at run time, in functions too."""
    tree = ast.parse((ROOT / module).read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for child in block.body
        for node in ast.walk(child)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def test_every_module_has_a_layer() -> None:
    known = {*RANK, "__init__", "__main__", "pretrained"}
    assert {layer(module) for module in MODULES} <= known


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_flow_one_way(module: Path) -> None:
    here = layer(module)
    if here not in RANK:
        return  # the package's own __init__ gathers names from every layer
    for name in imported(module):
        parts = name.split(".")
        if parts[0] == "mpd_gym" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[here], f"{module} imports {name} from a layer above"
        for banned in FORBIDDEN.get(here, ()):
            assert name != banned and not name.startswith(banned + "."), f"{module}: {name}"


def test_import_is_light_and_registers_every_id() -> None:
    code = (
        "import sys, mpd_gym, gymnasium;"
        "heavy = {'torch', 'mujoco', 'stable_baselines3', 'casadi', 'minari', 'pygame', 'scipy'};"
        "print(sorted(heavy & set(sys.modules)));"
        "print(sum('mpd_gym' in str(s.entry_point) for s in gymnasium.registry.values()))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert output[0] == "[]"
    assert int(output[1]) >= 5
