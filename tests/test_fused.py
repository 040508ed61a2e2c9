"""The denoisers that a training on a CPU computes with, against the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig, fused_convolution
from mpd_gym.models.fused import fused, lay_out

CONFIGS: dict[str, dict[str, Any]] = {
    "laptop": {"unet": UnetConfig(32, (1, 2, 4)), "horizon": 32},
    "one level": {"unet": UnetConfig(8, (1,), groups=4)},
    "one step left": {"unet": UnetConfig(8, (1, 2, 4), groups=2), "horizon": 4},
    "equal levels": {"unet": UnetConfig(16, (1, 1), kernel_size=3)},
    "no window": {"unet": UnetConfig(16, (1, 2), kernel_size=1, groups=4)},
    "falling levels": {"unet": UnetConfig(16, (3, 1))},
    "dynamics": {"output": "observations", "conditions": ()},
    # few channels in a group make the first steps' variances too small to compare closely
    "causal": {"unet": UnetConfig(32, (1, 2, 2), groups=4, causal=True), "horizon": 16},
    "causal, one level": {"unet": UnetConfig(16, (1,), groups=2, causal=True)},
    "learned null": {"null": "learned", "initial_state": "inpaint"},
}


def denoiser(**changes: Any) -> TrajectoryDenoiser:
    values: dict[str, Any] = {
        "observation_dim": 3,
        "action_dim": 2,
        "horizon": 8,
        "conditions": (("return", 1), ("goal", 2)),
        "unet": UnetConfig(16, (1, 2)),
    }
    torch.manual_seed(0)
    return TrajectoryDenoiser(DenoiserConfig(**(values | changes)))


def inputs(network: TrajectoryDenoiser, rows: int) -> tuple[Tensor, ...]:
    config, generator = network.config, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        normal(rows, config.horizon, config.trajectory_dim).requires_grad_(),
        torch.randint(1, 51, (rows,), generator=generator),
        normal(rows, config.observation_dim),
        normal(rows, config.condition_dim),
        torch.ones(rows, len(config.conditions)),
    )


def output_and_gradients(
    function: Callable[..., Tensor], network: TrajectoryDenoiser, rows: int, *, bf16: bool = False
) -> dict[str, Tensor]:
    """Prediction, and gradients of a squared error to trajectory and parameters."""
    arguments = inputs(network, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = function(*arguments)
    loss = (output.float() - 0.5 * torch.ones_like(output)).square().mean()
    named = {"trajectory": arguments[0], **dict(network.named_parameters())}
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {"output": output.detach(), **dict(zip(named, gradients, strict=True))}


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_and_every_gradient_agree_with_the_plain_network(
    name: str, rows: int, images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_convolution, "multiplies_slowly", lambda: images)
    network = denoiser(**CONFIGS[name])
    plain = output_and_gradients(network, network, rows)
    lay_out(network)
    fast = output_and_gradients(fused(network), network, rows)
    for key, expected in plain.items():
        bound = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(fast[key], expected, rtol=0, atol=bound, msg=key)


def test_it_is_not_the_plain_network() -> None:
    network = denoiser()
    assert fused(network) is not network
    assert fused(network).__module__ == fused.__module__


def test_in_bfloat16_it_is_as_close_as_autocast_is() -> None:
    network = denoiser(**CONFIGS["laptop"])
    exact = output_and_gradients(network, network, 16)
    autocast = output_and_gradients(network, network, 16, bf16=True)
    lay_out(network)
    fast = output_and_gradients(fused(network), network, 16, bf16=True)

    def joined(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([v.flatten() for k, v in values.items() if k not in ("output",)])

    assert fast["output"].dtype == torch.float32
    assert 1e-4 < distance(fast["output"], exact["output"]) < 0.02
    assert 1e-4 < distance(joined(fast), joined(exact)) < 0.02
    for key, expected in exact.items():
        bound = max(2 * distance(autocast[key].float(), expected), 0.05)
        assert distance(fast[key], expected) < bound, key


def test_the_memory_layout_changes_neither_values_nor_predictions() -> None:
    network = denoiser()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    scattered = output_and_gradients(fused(network), network, 3)
    lay_out(network)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not network.get_parameter("unet.head.0.weight").is_contiguous()
    for name, value in output_and_gradients(fused(network), network, 3).items():
        torch.testing.assert_close(value, scattered[name], rtol=1e-4, atol=1e-6)


def test_it_reads_the_weights_of_the_moment() -> None:
    network = denoiser()
    function, arguments = fused(network), inputs(network, 2)
    before = function(*arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(function(*arguments), network(*arguments), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(function(*arguments), before, rtol=1e-2)


def test_without_gradients_it_predicts_the_same() -> None:
    network = denoiser()
    function, arguments = fused(network), inputs(network, 2)
    with torch.no_grad():
        assert torch.equal(function(*arguments), function(*arguments))
        torch.testing.assert_close(function(*arguments), network(*arguments), rtol=1e-4, atol=1e-5)


def test_other_dtypes_keep_the_plain_network() -> None:
    network = denoiser().double()
    assert fused(network) is network


def test_the_handwritten_gradients_are_those_of_finite_differences() -> None:
    network = denoiser(unet=UnetConfig(8, (1, 2), groups=2))
    function, (trajectory, *others) = fused(network), inputs(network, 2)
    loss = function(trajectory, *others).square().sum()
    (gradient,) = torch.autograd.grad(loss, trajectory)
    step = 0.1 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            function(trajectory + sign * step, *others).double().square().sum() for sign in (1, -1)
        )
    expected = float(ahead - behind) / 0.2
    assert float(gradient.norm()) == pytest.approx(expected, rel=1e-2)
