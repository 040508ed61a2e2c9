"""Packed networks are the plain ones: same outputs, new ones after training, nothing on disk."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_agent
from torch import Tensor

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.diffusion import guided, make_schedule
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends import packed as packed_module
from mpd_gym.models.backends import packed_ops
from mpd_gym.models.backends.cpu import computes_bf16
from mpd_gym.models.backends.native import library
from mpd_gym.models.backends.packed import PackedDenoiser, PackedNetworks, max_relative_error
from mpd_gym.models.backends.packed_cuda import GraphedDenoiser
from mpd_gym.models.backends.packed_ops import (
    PRODUCT_ROWS,
    Convolution,
    _norm_by_moments,
    modulated_norm,
    packs,
)

BF16_BOUND = 5e-2  # of the largest output
FORMS = ("NativeUnet", "Unet")
NEEDS_BF16 = pytest.mark.skipif(not computes_bf16(), reason="the CPU has no bfloat16")

SMALL = UnetConfig(width=16, multipliers=(1, 2, 4), groups=4)
CONFIGS = {
    "laptop": DenoiserConfig(6, 2, 16, conditions=(("return", 1),), unet=SMALL),
    "dynamics": DenoiserConfig(
        3, 1, 12, output="observations", conditions=(("goal", 2), ("cost", 1)), unet=SMALL
    ),
    "one level": DenoiserConfig(5, 3, 7, unet=UnetConfig(width=8, multipliers=(1,), groups=2)),
    "falling": DenoiserConfig(
        2, 2, 2, initial_state="inpaint", unet=UnetConfig(width=12, multipliers=(3, 1), groups=3)
    ),
    "no kernel": DenoiserConfig(2, 1, 8, unet=UnetConfig(16, (1, 1), kernel_size=1, groups=1)),
    "states only": DenoiserConfig(4, 0, 8, null="learned", conditions=(("return", 1),), unet=SMALL),
    "wide": DenoiserConfig(11, 3, 32, unet=UnetConfig(width=64, multipliers=(1, 4))),
}
CAUSAL = {  # for compiled code only
    "causal": DenoiserConfig(
        4, 2, 16, unet=UnetConfig(width=16, multipliers=(1, 2, 2), groups=4, causal=True)
    ),
    "one causal level": DenoiserConfig(3, 1, 5, unet=UnetConfig(8, (2,), groups=2, causal=True)),
    "causal, no kernel": DenoiserConfig(
        2, 1, 8, unet=UnetConfig(16, (1, 1), kernel_size=1, groups=1, causal=True)
    ),
}


def network(name: str = "laptop", seed: int = 0) -> TrajectoryDenoiser:
    """A network none of whose weights has a special value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = TrajectoryDenoiser((CONFIGS | CAUSAL)[name]).eval()
        with torch.no_grad():
            for weight in found.parameters():
                weight += 0.05 * torch.randn_like(weight)
    return found


def inputs(config: DenoiserConfig, groups: int, rows: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(groups + rows)
    present = torch.ones(groups, len(config.conditions))
    present[groups // 2 :] = 0
    conditioning = [
        torch.randint(1, 50, (groups,), generator=generator),
        torch.randn(groups, config.observation_dim, generator=generator),
        torch.randn(groups, config.condition_dim, generator=generator),
        present,
    ]
    shape = (rows, config.horizon, config.trajectory_dim)
    return torch.randn(shape, generator=generator), conditioning


@torch.no_grad()
def outputs(
    plain: TrajectoryDenoiser, packed: PackedDenoiser, groups: int, rows: int
) -> tuple[Tensor, Tensor]:
    trajectory, conditioning = inputs(plain.config, groups, rows)
    expected, found = (
        part.denoise(trajectory, part.modulations(part.embed(*conditioning)))
        for part in (plain, packed)
    )
    return expected, found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of what computes the U-Net: compiled code, or PyTorch's operators."""
    if request.param == "Unet":
        monkeypatch.setattr(packed_module, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C compiler")
    return str(request.param)


@pytest.fixture
def public_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A PyTorch without the private operators."""

    def gone(*_: object) -> Tensor:
        raise AttributeError("_linear_pointwise")

    for name in ("_pack_product", "_product", "_pack_image", "_convolve"):
        monkeypatch.setattr(packed_ops, name, gone)
    packs.cache_clear()
    yield
    packs.cache_clear()


# --- agreement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (2, 2), (4, 4), (1, 5), (2, 16), (9, 9)])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_packed_is_plain_in_float32(name: str, groups: int, rows: int, form: str) -> None:
    plain = network(name)
    expected, found = outputs(plain, PackedDenoiser(plain), groups, rows)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-5


@NEEDS_BF16
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_stays_within_its_bound(name: str, rows: int, native: bool) -> None:
    plain = network(name)
    expected, found = outputs(plain, PackedDenoiser(plain, "bf16", native), 2, rows)
    assert found.dtype == torch.float32
    assert 1e-5 < relative(found, expected) < BF16_BOUND


@pytest.mark.parametrize("rows", [2, 16])
def test_public_operators_serve_where_private_ones_are_missing(
    rows: int, public_only: None
) -> None:
    assert not packs(torch.float32)
    plain = network()
    expected, found = outputs(plain, PackedDenoiser(plain, native=False), 2, rows)
    assert relative(found, expected) < 1e-5


def test_operators_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packs.cache_clear()
    monkeypatch.setattr(packed_ops, "_product", lambda rows, packed, bias: rows.new_zeros(3, 32))
    assert not packs(torch.float32)
    packs.cache_clear()


@pytest.mark.parametrize("levels", [(20, 10, 1), (20,)])
@pytest.mark.parametrize(("guidance", "num_envs", "candidates"), [(2.0, 2, 3), (1.0, 1, 4)])
def test_guided_denoisers_agree(
    levels: tuple[int, ...], guidance: float, num_envs: int, candidates: int
) -> None:
    plain = network("dynamics")
    schedule = make_schedule("cosine", 20)
    trajectory, (_, initial, conditions, present) = inputs(
        plain.config, num_envs, num_envs * candidates
    )
    bound = (initial, conditions, present, guidance)
    with torch.no_grad():
        for k in levels:
            expected, found = (
                guided(part, schedule, *bound, levels=levels, clip=None)(trajectory, k)
                for part in (plain, PackedDenoiser(plain))
            )
            assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_equal_calls_give_equal_bits_and_leave_their_inputs(rows: int, form: str) -> None:
    packed = PackedDenoiser(network())
    trajectory, conditioning = inputs(packed.config, 2, rows)
    modulations = packed.modulations(packed.embed(*conditioning))
    kept = copy.deepcopy((trajectory, modulations))
    first, second = (packed.denoise(trajectory, modulations) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(trajectory, kept[0])
    assert all(
        torch.equal(a, b)
        for pair, other in zip(modulations, kept[1], strict=True)
        for a, b in zip(pair, other, strict=True)
    )
    first += 1  # the output is the caller's own


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (2, 2), (0, 1), (3, 1)])
@pytest.mark.parametrize("rows", [1, PRODUCT_ROWS, PRODUCT_ROWS + 1])
@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("tiny", [0, 2**23])  # for products of packed and of plain weights
def test_convolution_is_the_textbook_sum(
    stride: int,
    padding: tuple[int, int],
    rows: int,
    length: int,
    tiny: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_ops, "TINY_PRODUCT", tiny)
    monkeypatch.setattr(packed_ops, "multiplies_slowly", lambda: True)
    rng = np.random.default_rng(0)
    weight, bias, series = (rng.normal(size=size) for size in ((4, 3, 3), 4, (length, rows, 3)))
    padded = np.pad(series, (padding, (0, 0), (0, 0)))
    expected = np.array(
        [
            np.einsum("tmc,oct->mo", padded[start : start + 3], weight) + bias
            for start in range(0, len(padded) - 2, stride)
        ]
    )
    tensors = (torch.tensor(value, dtype=torch.float32) for value in (weight, bias, series))
    kernel, offset, values = tensors
    for packed in (False, packs(torch.float32)):
        layer = Convolution(kernel, offset, padding, stride, torch.float32, packed)
        np.testing.assert_allclose(layer(values).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [modulated_norm, _norm_by_moments])
def test_norm_has_the_moments_that_it_is_given(norm: type) -> None:
    generator = torch.Generator().manual_seed(0)
    series = 3 + 2 * torch.randn(10, 3, 8, generator=generator)
    scale, shift = torch.full((3, 8), 0.5), torch.arange(3.0)[:, None].expand(3, 8)
    grouped = norm(series, scale.flatten(), shift.flatten(), 2, 1e-6).view(10, 3, 2, 4)
    mean, std = grouped.mean((0, 3)), grouped.std((0, 3), correction=0)
    torch.testing.assert_close(mean, torch.arange(3.0)[:, None].expand(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.full((3, 2), 0.5), atol=1e-5, rtol=0)


@NEEDS_BF16
@pytest.mark.parametrize("channels", [8, 64])  # below and above the switch of its arithmetic
def test_norms_agree_in_bfloat16(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    series = torch.randn(6, 2, channels, generator=generator)
    scale, shift = torch.randn(2, 2 * channels, generator=generator)
    rounded = modulated_norm(series.bfloat16(), scale, shift, 2, 1e-6)
    assert rounded.dtype == torch.bfloat16
    exact = modulated_norm(series, scale, shift, 2, 1e-6)
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.02)


# --- which network is used ---------------------------------------------------------------------


def test_networks_are_packed_once_and_again_after_each_change() -> None:
    plain, networks = network(), PackedNetworks()
    first = networks.get(plain, "fp32", 1)
    assert isinstance(first, PackedDenoiser)
    assert networks.get(plain, "fp32", 1) is first
    with torch.no_grad():
        plain.unet.head[3].bias += 1.0  # as an optimiser does
    second = networks.get(plain, "fp32", 1)
    assert second is not first
    assert isinstance(second, PackedDenoiser)
    expected, found = outputs(plain, second, 1, 1)
    assert relative(found, expected) < 1e-5
    plain.load_state_dict(network(seed=1).state_dict())
    third = networks.get(plain, "fp32", 1)
    assert third is not second
    plain.time_embedding[0].weight = torch.nn.Parameter(plain.time_embedding[0].weight * 2)
    assert networks.get(plain, "fp32", 1) is not third


def test_plain_precision_and_other_types_are_left_alone() -> None:
    networks, plain, double = PackedNetworks(), network(), network().double()
    assert networks.get(plain, "plain", 1) is plain
    assert networks.get(double, "fp32", 1) is double


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_packed_network_that_disagrees_is_not_used(
    rows: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(packed_module, form).__call__
    wrong = lambda *args: 1.001 * real(*args)  # noqa: E731
    monkeypatch.setattr(getattr(packed_module, form), "__call__", wrong)
    plain, networks = network(), PackedNetworks()
    with pytest.warns(RuntimeWarning, match=r"departs from the plain one by 1\.0e-03"):
        assert networks.get(plain, "fp32", rows) is plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert networks.get(plain, "fp32", rows) is plain


def test_networks_that_are_not_finite_cannot_be_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_module, "library", lambda: None)
    plain, broken = network(), network()
    with torch.no_grad():
        broken.unet.head[3].bias += torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the agent has an error for it
        assert PackedNetworks().get(broken, "fp32", 1) is broken
    monkeypatch.setattr(
        packed_module.Unet, "__call__", lambda *args: torch.full((16, 1, 8), torch.nan)
    )
    assert max_relative_error(PackedDenoiser(plain), 1) == float("inf")


def test_errors_name_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = network()
    with pytest.raises(ConfigError, match="precision: expected one of"):
        PackedNetworks().get(plain, "fp16", 1)
    packed = PackedDenoiser(plain)
    trajectory, conditioning = inputs(plain.config, 2, 4)
    modulations = packed.modulations(packed.embed(*conditioning))
    with pytest.raises(InputError, match="trajectory: expected shape"):
        packed.denoise(trajectory[:, 1:], modulations)
    with pytest.raises(InputError, match="trajectory: expected a multiple of 2 rows; got 3"):
        packed.denoise(trajectory[:3], modulations)
    monkeypatch.setattr(packed_module, "computes_bf16", lambda: False)
    with pytest.raises(ConfigError, match="precision: this CPU does not compute in bfloat16"):
        PackedDenoiser(plain, "bf16")


def test_copies_and_files_hold_no_packed_weights() -> None:
    plain, networks = network(), PackedNetworks()
    networks.get(plain, "fp32", 1)
    for other in (pickle.loads(pickle.dumps(networks)), copy.deepcopy(networks)):
        assert isinstance(other, PackedNetworks)
        assert not other._found


# --- agents ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent() -> MPDiffuserAgent:
    return tiny_agent()


def actions(agent: MPDiffuserAgent, **options: object) -> np.ndarray:
    plan = agent.with_options(**options).plan(np.zeros(2, np.float32), deterministic=True)
    return plan.actions


@pytest.mark.parametrize("num_candidates", [1, 6])
def test_agents_plan_the_same_packed_and_plain(agent: MPDiffuserAgent, num_candidates: int) -> None:
    options = {"num_candidates": num_candidates, "guidance_scale": 2.0}
    packed = actions(agent, **options)
    np.testing.assert_allclose(packed, actions(agent, precision="plain", **options), atol=1e-4)
    assert any(isinstance(entry.used, PackedDenoiser) for entry in agent._networks._found.values())


@NEEDS_BF16
def test_bfloat16_plans_are_near(agent: MPDiffuserAgent) -> None:
    plain = actions(agent, precision="plain", num_candidates=6)
    near = actions(agent, precision="bf16", num_candidates=6)
    assert 0 < np.abs(near - plain).max() < 0.2 * np.abs(plain).max()


def test_agents_plan_with_new_weights_after_a_change(agent: MPDiffuserAgent) -> None:
    other = copy.deepcopy(agent)
    before = actions(other)
    with torch.no_grad():
        for weight in other.models["planner"].parameters():
            weight *= 1.1
    after = actions(other)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, actions(other, precision="plain"), atol=1e-4)


def test_files_are_the_same_with_and_without_packed_weights(
    agent: MPDiffuserAgent, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(agent)
    fresh.save(tmp_path / "fresh.safetensors")
    actions(fresh)
    fresh.save(tmp_path / "used.safetensors")
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("fresh", "used")]
    assert contents[0] == contents[1]
    loaded = MPDiffuserAgent.load(tmp_path / "used.safetensors", precision="plain")
    assert loaded.options == replace(fresh.options, precision="plain")
    np.testing.assert_allclose(actions(loaded), actions(fresh), atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_replay_with_new_inputs_and_new_shapes() -> None:
    plain = network().cuda()
    graphed = PackedNetworks().get(plain, "bf16", 1)
    assert isinstance(graphed, GraphedDenoiser)
    for groups, rows in ((2, 4), (2, 4), (1, 16), (2, 4)):
        trajectory, conditioning = inputs(plain.config, groups, rows)
        conditioning = [part.cuda() for part in conditioning]
        trajectory = (trajectory + rows).cuda()
        with torch.no_grad():
            expected, found = (
                part.denoise(trajectory, part.modulations(part.embed(*conditioning)))
                for part in (plain, graphed)
            )
        assert relative(found, expected) < BF16_BOUND
