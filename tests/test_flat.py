"""Parameters in one piece of memory."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpd_gym.checkpoint import load_file
from mpd_gym.errors import InputError
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.choice import training_forward
from mpd_gym.training import TrainingConfig, TrainingResult, fit
from mpd_gym.training.flat import FlatParameters
from mpd_gym.types import Array


def network(seed: int = 0, *, turned: bool = True) -> TrajectoryDenoiser:
    torch.manual_seed(seed)
    unet = UnetConfig(8, (1, 2), groups=4)
    found = TrajectoryDenoiser(DenoiserConfig(2, 1, 8, unet=unet))
    if turned:
        for module in found.modules():
            if isinstance(module, nn.Conv1d):
                module.weight.data = module.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    return found


def test_parameters_and_gradients_are_views_that_keep_their_strides() -> None:
    module = network()
    before = {n: (p.detach().clone(), p.stride()) for n, p in module.named_parameters()}
    flat = FlatParameters(dict(module.named_parameters()))
    assert any(not p.is_contiguous() for p in module.parameters())
    for name, parameter in module.named_parameters():
        value, strides = before[name]
        assert torch.equal(parameter, value) and parameter.stride() == strides
        assert parameter.data_ptr() % 4 == 0
        assert parameter.untyped_storage().data_ptr() == flat.values.untyped_storage().data_ptr()
    for parameter in module.parameters():
        torch.autograd.backward((2 * parameter).sum())
    total = sum(p.numel() for p in module.parameters())
    assert float(flat.gradients.sum()) == 2 * total  # nothing lies in the gaps
    flat.values.data.mul_(3)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, 3 * before[name][0])


def test_gathered_gradients_replace_those_before() -> None:
    module = network()
    flat = FlatParameters(dict(module.named_parameters()))
    first, *others = module.parameters()
    other = torch.ones((), requires_grad=True)
    for factor in (2.0, 3.0):
        flat.gradients.fill_(7.0)
        flat.gather((factor * first).sum() + other)
        assert first.grad is not None and torch.equal(first.grad, torch.full_like(first, factor))
        assert all(part.grad is not None and not part.grad.any() for part in others)
    flat.gather(2 * other)  # reaches none of them
    assert all(part.grad is not None and not part.grad.any() for part in module.parameters())


def test_join_is_the_inverse_of_views() -> None:
    module = network()
    flat = FlatParameters(dict(module.named_parameters()))
    vector = flat.values.detach()
    assert torch.equal(flat.join({n: v.clone() for n, v in flat.views(vector).items()}), vector)


def test_expanded_parameters_get_memory_of_their_own() -> None:
    parameter = nn.Parameter(torch.ones(1).expand(4))
    flat = FlatParameters({"p": parameter})
    assert parameter.stride() == (1,)
    assert float(flat.values.detach().sum()) == 4


def test_parameters_of_several_dtypes_are_refused() -> None:
    parameters = {
        "a": nn.Parameter(torch.ones(1)),
        "b": nn.Parameter(torch.ones(1, dtype=torch.float64)),
    }
    with pytest.raises(InputError, match=r"one dtype; got \['torch.float32', 'torch.float64'\]"):
        FlatParameters(parameters)


# In a training


def sampler(batch_size: int, rng: np.random.Generator) -> dict[str, Array]:
    rows = rng.normal(size=(batch_size, 8, 3)).astype(np.float32)
    return {"clean": np.cumsum(rows, axis=1) * np.float32(0.3)}


def loss(
    module: nn.Module, batch: dict[str, Tensor], noise: torch.Generator, *, plain: bool = False
) -> dict[str, Tensor]:
    assert isinstance(module, TrajectoryDenoiser)
    clean = batch["clean"]
    empty = clean.new_empty(len(clean), 0)
    k = torch.randint(1, 11, (len(clean),), generator=noise)
    drawn = torch.randn(clean.shape, generator=noise)
    function = module if plain else training_forward(module)
    output = function(clean + drawn, k, clean[:, 0, :2], empty, empty)
    return {"loss": (output - drawn).square().mean()}


def plain_loss(
    module: nn.Module, batch: dict[str, Tensor], noise: torch.Generator
) -> dict[str, Tensor]:
    return loss(module, batch, noise, plain=True)


CONFIG = TrainingConfig(steps=30, batch_size=8, learning_rate=1e-3, log_every=5, ema_every=3)


def train(module: nn.Module, path: Path | None = None, steps: int = 30) -> TrainingResult:
    config = TrainingConfig(**{**vars(CONFIG), "steps": steps})
    return fit(module, loss, sampler, config, name="a", directory=path, progress=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_agrees_with_one_of_the_plain_network(precision: str) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "precision": precision})
    fast = fit(network(), loss, sampler, config, name="a", progress=False)
    plain = fit(network(), plain_loss, sampler, config, name="a", progress=False)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    np.testing.assert_allclose(fast.training["loss"], plain.training["loss"], rtol=tolerance)
    assert fast.training["loss"][-1] < fast.training["loss"][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_ends_with_the_same_bits_every_time(precision: str) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "precision": precision})
    first, second = (
        fit(network(), loss, sampler, config, name="a", progress=False) for _ in range(2)
    )
    for name, value in first.weights.items():
        assert torch.equal(value, second.weights[name]), name


def test_a_checkpoint_does_not_depend_on_the_memory_layout(tmp_path: Path) -> None:
    whole = train(network())
    train(network(), tmp_path, steps=15)
    tensors, _ = load_file(tmp_path / "a/checkpoint.safetensors")
    shapes = {name: value.shape for name, value in network().named_parameters()}
    for part in ("weights/{}", "average/{}", "adam/{}/exp_avg", "adam/{}/exp_avg_sq"):
        assert {n: tensors[part.format(n)].shape for n in shapes} == shapes
    resumed = train(network(1), tmp_path)
    for name, value in whole.weights.items():
        assert torch.equal(value, resumed.weights[name]), name


def test_a_training_goes_on_in_another_layout(tmp_path: Path) -> None:
    whole = train(network())
    train(network(turned=False), tmp_path, steps=15)
    resumed = train(network(1), tmp_path)
    for name, value in whole.weights.items():
        torch.testing.assert_close(value, resumed.weights[name], rtol=1e-3, atol=1e-5)


def test_afterwards_the_module_is_as_any_other() -> None:
    module = network()
    result = train(module)
    size = sum(p.numel() for p in module.parameters()) * 4
    for parameter in module.parameters():
        assert parameter.is_contiguous() and parameter.grad is None
    assert len(pickle.dumps(module)) < 1.5 * size + 100_000
    for name, value in module.state_dict().items():
        assert value.is_contiguous()
        assert torch.equal(value, result.weights[name])
