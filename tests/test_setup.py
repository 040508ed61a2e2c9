"""Building the package: whatever a compiler does, it is built, and a line says why without C."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
HANGS = "import time; time.sleep(60)"
SPEAKS = "import sys; sys.stderr.buffer.write(b'fatal error: \\xff\\xfe'); sys.exit(1)"
LIES = "pass"
WRITES = "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('no library')"
READS = "import sys; sys.stdin.read(); sys.exit('read to the end, an error')"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The setup script, which builds nothing yet."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    spec: Any = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SECONDS", 3)
    return module


def built(command: Any, folder: Path) -> Any:
    package = {"name": "mpd-gym", "packages": ["mpd_gym"], "script_name": "setup.py"}
    command = command(setuptools.Distribution(package))
    command.build_lib, command.inplace, command.editable_mode = str(folder), False, False
    return command


@pytest.mark.fault(
    "Machine",
    "a compiler that hangs, reads, lies, or prints bytes that are not UTF-8",
    "the package is built without C, and says why",
)
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (HANGS, "timed out after [23]"),
        (SPEAKS, "fatal error: \N{REPLACEMENT CHARACTER}"),
        (LIES, "cannot open shared object file"),
        (WRITES, "file too short|invalid ELF header"),
        (READS, "read to the end"),
    ],
    ids=["hangs", "speaks", "lies", "writes", "reads"],
)
def test_a_bad_compiler_leaves_a_package_without_c(
    compiler: str,
    reason: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "compiler"
    path.write_text(f"#!{sys.executable} -S\n{compiler}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    built(script.BuildLibrary, tmp_path).run()
    said = capfd.readouterr().out
    assert re.search(reason, said)
    *_, last = said.strip().splitlines()
    assert last.startswith("mpd_gym: ") and last.endswith("; networks will run in plain PyTorch")
    assert not (tmp_path / script.LIBRARY).exists()
    assert not list((tmp_path / script.BACKENDS).iterdir())


@pytest.mark.fault(
    "Machine", "modules that were removed since an earlier build", "are not packed into a wheel"
)
def test_a_build_holds_no_module_of_an_earlier_one(script: ModuleType, tmp_path: Path) -> None:
    stale = tmp_path / "mpd_gym/removed.py"
    stale.parent.mkdir()
    stale.write_text("raise ImportError")
    command = built(script.Modules, tmp_path)
    command.ensure_finalized()
    command.build_lib = str(tmp_path)
    command.run()
    assert not stale.exists() and (tmp_path / "mpd_gym/errors.py").exists()
