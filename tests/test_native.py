"""Compiled code is the plain network, for any batch and number of threads, and can be missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_packed import CAUSAL, CONFIGS, inputs, network, outputs, relative
from torch import Tensor

from mpd_gym.models.backends import native
from mpd_gym.models.backends import packed as packed_module
from mpd_gym.models.backends.native_unet import BLOCK_ROWS, NativeUnet, _InferencePlan, packed
from mpd_gym.models.backends.packed import PackedDenoiser
from mpd_gym.models.backends.packed_unet import Unet

LIBRARY = native.library()
NEEDS_PAIRS = pytest.mark.skipif(
    LIBRARY is None or not LIBRARY.mpd_pairs(), reason="no bfloat16 in compiled code"
)
PRECISIONS = ["fp32", pytest.param("bf16", marks=NEEDS_PAIRS)]
NEEDS_COMPILER = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "mpd_gym"
    native.library.cache_clear()


def native_of(packed: PackedDenoiser) -> NativeUnet:
    assert packed._native is not None
    return packed._native


# --- the same function ---------------------------------------------------------------------------


@NEEDS_COMPILER
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (2, 2), (1, 5), (2, 16), (9, 9)])
def test_causal_networks_are_themselves(name: str, groups: int, rows: int) -> None:
    plain = network(name)
    expected, found = outputs(plain, PackedDenoiser(plain), groups, rows)
    assert relative(found, expected) < 1e-5


@NEEDS_COMPILER
@pytest.mark.parametrize("name", [*CONFIGS, *CAUSAL])
@pytest.mark.parametrize("rows", [BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 2, 3 * BLOCK_ROWS + 2])
def test_large_batches_are_cut_without_a_trace(name: str, rows: int) -> None:
    plain = network(name)
    expected, found = outputs(plain, PackedDenoiser(plain), 1 if rows % 2 else 2, rows)
    assert relative(found, expected) < 1e-5


@NEEDS_COMPILER
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("name", ["wide", "causal"])
def test_threads_change_nothing(name: str, rows: int, precision: str) -> None:
    packed = PackedDenoiser(network(name), precision)
    trajectory, conditioning = inputs(packed.config, 1, rows)
    modulations = packed.modulations(packed.embed(*conditioning))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(packed.denoise(trajectory, modulations))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@NEEDS_COMPILER
def test_calls_from_several_threads_do_not_meet() -> None:
    packed = PackedDenoiser(network("wide"))
    scale, shift = packed.modulations(packed.embed(*inputs(packed.config, 1, 1)[1]))[0]
    batches = [inputs(packed.config, 1, 8)[0] + i for i in range(16)]
    expected = [native_of(packed)(batch, scale, shift) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda batch: native_of(packed)(batch, scale, shift), batches))
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@NEEDS_COMPILER
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 CPUs")
@pytest.mark.parametrize(("cpu", "lanes"), [("x86-64", 4), ("x86-64-v3", 8)])
def test_smaller_vectors_compute_the_same(
    cpu: str, lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "narrow.so"
    command = (str(native.compiler()), *native.FLAGS, f"-march={cpu}", "-o", str(target))
    subprocess.run((*command, str(native.SOURCE), "-lm"), check=True)
    narrow = native._load(target)
    assert narrow.mpd_lanes() == lanes
    assert narrow.mpd_pairs() == 0
    monkeypatch.setattr(packed_module, "library", lambda: narrow)
    for name in (*CONFIGS, *CAUSAL):
        plain = network(name)
        for rows in (1, 16):
            expected, found = outputs(plain, PackedDenoiser(plain), 1, rows)
            assert relative(found, expected) < 1e-5


@NEEDS_COMPILER
@pytest.mark.parametrize("size", [30.0, 300.0])  # exp(−300) is 0, exp(300) infinite
def test_swish_holds_far_from_zero(size: float) -> None:
    plain = network()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in plain.unet.named_parameters():
            if "films" in name and name.endswith("2.bias"):
                weight += size * torch.randn(weight.shape, generator=generator)
    expected, found = outputs(plain, PackedDenoiser(plain), 2, 4)
    assert expected.isfinite().all()
    assert relative(found, expected) < 1e-4


@NEEDS_COMPILER
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(value: float) -> None:
    packed = PackedDenoiser(network())
    trajectory, conditioning = inputs(packed.config, 1, 3)
    modulations = packed.modulations(packed.embed(*conditioning))
    expected = packed.denoise(trajectory, modulations)
    trajectory[1, 0, 0] = value
    found = packed.denoise(trajectory, modulations)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@NEEDS_COMPILER
def test_views_and_doubles_are_taken_as_they_are() -> None:
    packed = PackedDenoiser(network())
    trajectory, conditioning = inputs(packed.config, 2, 4)
    modulations = packed.modulations(packed.embed(*conditioning))
    expected = packed.denoise(trajectory, modulations)
    view = trajectory.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(packed.denoise(view, modulations), expected)
    doubles: Tensor = packed.denoise(trajectory.double(), modulations)
    assert doubles.dtype == torch.float64
    assert torch.equal(doubles.float(), expected)


@NEEDS_COMPILER
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("length", "rows"), [(1, 1), (2, 3), (8, 2), (7, 12), (32, 16)])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (16, 16), (40, 33), (600, 48)])
def test_products_of_whole_numbers_are_exact(
    inputs: int, outputs: int, length: int, rows: int, size: int, precision: str
) -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    assert LIBRARY is not None
    paired, lanes = precision == "bf16", int(LIBRARY.mpd_lanes())
    module = torch.nn.Conv1d(inputs, outputs, size, padding=size // 2)
    module.weight.data, module.bias.data = numbers(outputs, inputs, size), numbers(outputs)  # type: ignore[union-attr]
    series = numbers(rows, length, inputs)
    plan = _InferencePlan(rows, lanes, paired=paired)
    source, target = plan.series(length, inputs), plan.series(length, outputs)
    plan.load(source)
    shifts = range(-(size // 2), size // 2 + 1)
    panels = packed(module, 0, lanes, paired=paired)
    plan.product([(source, shift) for shift in shifts], panels, target)
    plan.store(target)
    program, found = plan.program(), torch.zeros(rows, length, outputs)
    scale = torch.zeros(1, 1)
    program.work[target.start : target.start + length * target.time] = torch.nan
    program.run(LIBRARY, program.steps, series, found, scale, scale)
    with torch.no_grad():
        assert torch.equal(found, module(series.transpose(1, 2)).transpose(1, 2))


@NEEDS_PAIRS
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("name", [*CONFIGS, *CAUSAL])
def test_in_bfloat16_it_stays_within_its_bound(name: str, rows: int) -> None:
    plain = network(name)
    packed_network = PackedDenoiser(plain, "bf16")
    assert packed_network._native is not None
    expected, found = outputs(plain, packed_network, 1, rows)
    assert 1e-5 < relative(found, expected) < 0.02


# --- the compiler --------------------------------------------------------------------------------


@NEEDS_COMPILER
def test_code_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library() is not None
    (file,) = fresh.iterdir()
    written = file.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert str(native.compiler()) in native.describe()
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [written]
    monkeypatch.setattr(native, "description", lambda: "another CPU")
    native.library.cache_clear()
    assert native.library() is not None
    assert len(list(fresh.iterdir())) == 2


@NEEDS_COMPILER
def test_a_cache_that_cannot_be_written_is_done_without(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.parent.joinpath("mpd_gym").write_text("a file where the folder should be")
    assert native.library() is not None


@NEEDS_COMPILER
def test_a_damaged_file_is_compiled_anew(fresh: Path) -> None:
    file = native._compiled(str(native.compiler()))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert native.library() is not None
    assert [path.stat().st_size for path in fresh.iterdir()] == [len(whole)]


@pytest.mark.parametrize("reason", ["not wanted", "not there"])
def test_without_a_compiler_operators_do_the_same(
    reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "not wanted":
        monkeypatch.setenv("MPD_GYM_NATIVE", "0")
    else:
        monkeypatch.delenv("MPD_GYM_NATIVE", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native.library() is None
    assert ("MPD_GYM_NATIVE=0" if reason == "not wanted" else "no C comp") in native.describe()
    plain = network()
    packed = PackedDenoiser(plain)
    assert packed._native is None
    assert isinstance(packed._unet, Unet)
    expected, found = outputs(plain, packed, 2, 4)
    assert relative(found, expected) < 1e-5


@pytest.mark.skipif(os.name == "nt", reason="no shell scripts")
def test_a_compiler_that_fails_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fresh.parent / "broken-cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such target" >&2; exit 1; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.delenv("MPD_GYM_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match=r"broken-cc did not compile.*no such target"):
        assert native.library() is None
    assert list(fresh.iterdir()) == []
