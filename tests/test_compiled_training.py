"""Training in C: the plain network's predictions and gradients, one graph or several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from unets import CONFIGS, LEVELS, inputs, needs_c, needs_pairs, network

from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.models.backends.compiled_training import compiled_forward
from mpd_gym.models.backends.interface import TrainingForward

pytestmark = needs_c


def in_c(plain: TrajectoryDenoiser) -> TrainingForward:
    return compiled_forward(plain, next(iter(LEVELS.values())))


def arguments(plain: TrajectoryDenoiser, rows: int) -> tuple[Tensor, ...]:
    trajectory, conditioning = inputs(plain.config, rows, rows)
    return trajectory, *conditioning


def loss_of(output: Tensor) -> Tensor:
    return (output - 0.5).square().mean()


def gradients(
    function: Callable[..., Tensor], plain: TrajectoryDenoiser, rows: int
) -> dict[str, Tensor]:
    """Prediction, and gradients of a squared error to all parameters."""
    output = function(*arguments(plain, rows))
    named = dict(plain.named_parameters())
    found = torch.autograd.grad(loss_of(output), list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {"output": output.detach(), **{name: g for name, g in pairs if g is not None}}


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def scatter(plain: TrajectoryDenoiser) -> None:
    """Move the weights of convolutions to other places, in another order."""
    for module in plain.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.weight.data = module.weight.data.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_and_all_gradients_are_those_of_the_plain_network(
    name: str, level: object
) -> None:
    plain = network(name)
    function = compiled_forward(plain, level)  # type: ignore[arg-type]
    for rows in (1, 5, 64):
        expected, found = (gradients(part, plain, rows) for part in (plain, function))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].shape == value.shape
            assert torch.equal(found[key], value) or distance(found[key], value) < 1e-4, key


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=needs_pairs)])
@pytest.mark.parametrize("rows", [7, 8])
def test_threads_and_layout_change_nothing(
    rows: int, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = network()
    embedding = plain.embed(*arguments(plain, rows)[1:]).detach()
    monkeypatch.setattr(plain, "embed", lambda *_: embedding)  # which PyTorch computes

    def found() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return list(gradients(in_c(plain), plain, rows).values())

    first = found()
    for count in (2, 5):
        torch.set_num_threads(count)
        assert all(torch.equal(*pair) for pair in zip(first, found(), strict=True))
    scatter(plain)
    assert all(torch.equal(*pair) for pair in zip(first, found(), strict=True))


@needs_pairs
@pytest.mark.parametrize("rows", [5, 16])  # an odd number of rows has no pairs of them
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_gradients_are_no_further_off_than_with_autocast(name: str, rows: int) -> None:
    plain = network(name)
    exact = gradients(plain, plain, rows)
    with torch.autocast("cpu", torch.bfloat16):
        found, autocast = (gradients(part, plain, rows) for part in (in_c(plain), plain))
    keys = [key for key, value in exact.items() if value.any()]
    off, usual = (
        torch.tensor([distance(one[key].float(), exact[key]) for key in keys])
        for one in (found, autocast)
    )
    assert 1e-4 < off.median() < usual.median()
    assert off.max() < max(2 * float(usual.max()), 0.05)


def test_graphs_do_not_share_their_memory() -> None:
    plain = network()
    function, weights = in_c(plain), list(plain.unet.parameters())
    first, *others = arguments(plain, 4)
    batches = [(first, *others), (first + 1, *others)]
    expected = [torch.autograd.grad(loss_of(plain(*batch)), weights) for batch in batches]
    losses = [loss_of(function(*batch)) for batch in batches]
    with torch.no_grad():
        function(first - 1, *others)
    for loss, values in zip(reversed(losses), reversed(expected), strict=True):
        found = torch.autograd.grad(loss, weights)
        assert all(distance(*pair) < 1e-4 for pair in zip(found, values, strict=True))


def test_weights_that_move_before_the_backward_pass() -> None:
    plain = network()
    expected = gradients(plain, plain, 3)
    loss = loss_of(in_c(plain)(*arguments(plain, 3)))
    scatter(plain)
    in_c(plain)(*arguments(plain, 3))
    found = torch.autograd.grad(loss, plain.unet.head[3].weight)[0]
    assert distance(found, expected["unet.head.3.weight"]) < 1e-4
    again = gradients(in_c(plain), plain, 3)
    assert all(distance(again[key], value) < 1e-4 for key, value in expected.items())


def test_it_reads_the_weights_of_the_moment() -> None:
    plain = network()
    function, given = in_c(plain), arguments(plain, 2)
    with torch.no_grad():
        before = function(*given)
        for weight in plain.parameters():
            weight.mul_(1.1)
        torch.testing.assert_close(function(*given), plain(*given), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(function(*given), before, rtol=1e-2)


def test_a_second_backward_pass_is_refused() -> None:
    plain = network()
    loss, weights = loss_of(in_c(plain)(*arguments(plain, 3))), list(plain.unet.parameters())
    torch.autograd.grad(loss, weights, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, weights)


def test_what_c_does_not_compute_plain_pytorch_does() -> None:
    plain = network()
    trajectory, *others = arguments(plain, 2)
    wanted = trajectory.clone().requires_grad_()
    found, expected = (
        torch.autograd.grad(function(wanted, *others).sum(), wanted)[0]
        for function in (in_c(plain), plain)
    )
    assert torch.equal(found, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert torch.equal(in_c(plain)(trajectory, *others), plain(trajectory, *others))


def test_autocast_leaves_c_without_bfloat16_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    least = list(LEVELS.values())[-1]
    if least.pairs:
        pytest.skip("all compiled code multiplies in bfloat16")
    plain = network()
    embedding = plain.embed(*arguments(plain, 3)[1:]).detach()
    monkeypatch.setattr(plain, "embed", lambda *_: embedding)  # which PyTorch computes
    function = compiled_forward(plain, least)
    exact = gradients(function, plain, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(function, plain, 3)
    assert all(torch.equal(found[key], value) for key, value in exact.items())
