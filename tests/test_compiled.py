"""The network in C is the plain one, for all sizes, batches, threads and sets of instructions."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from unets import CAUSAL, CONFIGS, LEVELS, difference, inputs, needs_c, needs_pairs, network

from mpd_gym.errors import InputError
from mpd_gym.models.backends.compiled import BLOCK_ROWS, CompiledDenoiser
from mpd_gym.models.temporal_unet import Modulation

pytestmark = needs_c
PAIRED = [False, pytest.param(True, marks=needs_pairs)]
# one group of one row; rows that share a group; a group for each; blocks that are cut unevenly
BATCHES = [(1, 1), (2, 16), (9, 9), (1, BLOCK_ROWS + 3)]


def compiled(name: str = "laptop", *, paired: bool = False) -> CompiledDenoiser:
    return CompiledDenoiser(network(name), next(iter(LEVELS.values())), paired=paired)


def prepared(other: CompiledDenoiser, groups: int, rows: int) -> tuple[Tensor, list[Modulation]]:
    trajectory, conditioning = inputs(other.config, groups, rows)
    return trajectory, other.modulations(other.embed(*conditioning))


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("name", [*CONFIGS, *CAUSAL])
def test_it_is_the_plain_network(name: str, level: object) -> None:
    plain = network(name)
    other = CompiledDenoiser(plain, level)  # type: ignore[arg-type]
    for groups, rows in BATCHES:
        assert difference(plain, other, groups, rows) < 1e-5, (groups, rows)


@needs_pairs
@pytest.mark.parametrize("name", [*CONFIGS, *CAUSAL])
def test_in_bfloat16_it_stays_within_its_bound(name: str) -> None:
    plain, other = network(name), compiled(name, paired=True)
    for groups, rows in BATCHES:
        assert 1e-5 < difference(plain, other, groups, rows) < 0.02, (groups, rows)


@pytest.mark.parametrize("paired", PAIRED)
@pytest.mark.parametrize("name", ["wide", "causal"])
def test_threads_change_nothing(name: str, paired: bool) -> None:
    other = compiled(name, paired=paired)
    for rows in (1, 3, 40):
        given = prepared(other, 1, rows)
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(other.denoise(*given))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_calls_from_several_threads_do_not_meet() -> None:
    other = compiled("wide")
    trajectory, modulations = prepared(other, 1, 8)
    batches = [trajectory + i for i in range(16)]
    expected = [other.denoise(batch, modulations) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda batch: other.denoise(batch, modulations), batches)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [30.0, 300.0])  # exp(−300) is 0, exp(300) infinite
def test_swish_holds_far_from_zero(size: float) -> None:
    plain = network()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in plain.unet.named_parameters():
            if "films" in name and name.endswith("2.bias"):
                weight += size * torch.randn(weight.shape, generator=generator)
    assert difference(plain, CompiledDenoiser(plain, next(iter(LEVELS.values()))), 2, 4) < 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(value: float) -> None:
    other = compiled()
    trajectory, modulations = prepared(other, 1, 3)
    expected = other.denoise(trajectory, modulations)
    trajectory[1, 0, 0] = value
    found = other.denoise(trajectory, modulations)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_views_and_doubles_are_taken_as_they_are() -> None:
    other = compiled()
    trajectory, modulations = prepared(other, 2, 4)
    expected = other.denoise(trajectory, modulations)
    view = trajectory.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(other.denoise(view, modulations), expected)
    doubles = other.denoise(trajectory.double(), modulations)
    assert doubles.dtype == torch.float64
    assert torch.equal(doubles.float(), expected)


def test_equal_calls_give_equal_bits_and_leave_their_inputs() -> None:
    other = compiled()
    given = prepared(other, 2, 16)
    kept = copy.deepcopy(given)
    first, second = (other.denoise(*given) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(given[0], kept[0])
    assert all(torch.equal(*pair) for pair in zip(given[1][0], kept[1][0], strict=True))
    first += 1  # the output is the caller's own
    assert torch.equal(other.denoise(*given), second)


def test_wrong_shapes_are_refused() -> None:
    other = compiled()
    trajectory, modulations = prepared(other, 2, 4)
    with pytest.raises(InputError, match="trajectory: expected shape"):
        other.denoise(trajectory[:, 1:], modulations)
    with pytest.raises(InputError, match="trajectory: expected a multiple of 2 rows; got 3"):
        other.denoise(trajectory[:3], modulations)
