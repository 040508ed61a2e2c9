"""Training in C: the plain network's predictions and gradients, one graph or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_fused import CONFIGS, denoiser, distance, inputs
from torch import Tensor

from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.models.backends import native
from mpd_gym.models.backends.native_training import native_forward, trains_natively
from mpd_gym.models.fused import fused, lay_out

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C compiler")
NEEDS_PAIRS = pytest.mark.skipif(
    LIBRARY is None or not LIBRARY.mpd_pairs(), reason="no bfloat16 in compiled code"
)

ACAUSAL = [name for name in CONFIGS if "causal" not in name]
Network = Callable[..., Tensor]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(network: TrajectoryDenoiser, rows: int) -> tuple[Tensor, ...]:
    trajectory, *others = inputs(network, rows)
    return trajectory.detach(), *others


def loss_of(output: Tensor) -> Tensor:
    return (output - 0.5).square().mean()


def gradients(function: Network, network: TrajectoryDenoiser, rows: int) -> dict[str, Tensor]:
    """Prediction, and gradients of a squared error to all parameters."""
    output = function(*arguments(network, rows))
    named = dict(network.named_parameters())
    found = torch.autograd.grad(loss_of(output), list(named.values()))
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("name", ACAUSAL)
def test_prediction_and_every_gradient_agree_with_the_plain_network(name: str, rows: int) -> None:
    network = denoiser(**CONFIGS[name])
    lay_out(network)
    assert trains_natively(network.unet, arguments(network, rows)[0], torch.float32)
    expected, found = (gradients(part, network, rows) for part in (network, fused(network)))
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert torch.equal(found[key], value) or distance(found[key], value) < 1e-4, key


@pytest.mark.parametrize("paired", [False, pytest.param(True, marks=NEEDS_PAIRS)])
@pytest.mark.parametrize("rows", [7, 8])
def test_threads_and_layout_change_nothing(rows: int, paired: bool, threads: None) -> None:
    network = denoiser(**CONFIGS["laptop"])
    trajectory, *others = arguments(network, rows)
    embedding = network.embed(*others).detach().requires_grad_()

    def found() -> list[Tensor]:
        output = native_forward(network.unet, trajectory, embedding, paired=paired)
        inputs = [embedding, *network.unet.parameters()]
        return [output.detach(), *torch.autograd.grad(loss_of(output), inputs)]

    first = found()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert all(torch.equal(*pair) for pair in zip(first, found(), strict=True))
    lay_out(network)  # the weights move to other places
    assert all(torch.equal(*pair) for pair in zip(first, found(), strict=True))


@NEEDS_PAIRS
@pytest.mark.parametrize("rows", [5, 16])  # an odd number of rows has no pairs of them
@pytest.mark.parametrize("name", ACAUSAL)
def test_in_bfloat16_gradients_are_no_further_off_than_with_autocast(name: str, rows: int) -> None:
    network = denoiser(**CONFIGS[name])
    exact = gradients(network, network, rows)
    with torch.autocast("cpu", torch.bfloat16):
        found, autocast = (gradients(part, network, rows) for part in (fused(network), network))
    keys = [key for key, value in exact.items() if value.any()]
    off, usual = (
        torch.tensor([distance(one[key].float(), exact[key]) for key in keys])
        for one in (found, autocast)
    )
    assert 1e-4 < off.median() < usual.median()
    assert off.max() < max(2 * float(usual.max()), 0.05)


def test_graphs_do_not_share_their_memory() -> None:
    network = denoiser()
    function = fused(network)
    weights = list(network.parameters())
    (first, *rest), (second, *others) = arguments(network, 4), arguments(network, 4)
    expected = [
        torch.autograd.grad(loss_of(network(*one)), weights)
        for one in ((first, *rest), (second + 1, *others))
    ]
    losses = [loss_of(function(*one)) for one in ((first, *rest), (second + 1, *others))]
    with torch.no_grad():
        function(first - 1, *rest)
    for loss, values in zip(reversed(losses), reversed(expected), strict=True):
        found = torch.autograd.grad(loss, weights)
        assert all(distance(*pair) < 1e-4 for pair in zip(found, values, strict=True))


def test_weights_that_move_before_the_backward_pass() -> None:
    network = denoiser()
    expected = gradients(network, network, 3)
    loss = loss_of(fused(network)(*arguments(network, 3)))
    lay_out(network)
    fused(network)(*arguments(network, 3))
    found = torch.autograd.grad(loss, network.unet.head[3].weight)[0]
    assert distance(found, expected["unet.head.3.weight"]) < 1e-4
    again = gradients(fused(network), network, 3)
    assert all(distance(again[key], value) < 1e-4 for key, value in expected.items())


def test_a_second_backward_pass_is_refused() -> None:
    network = denoiser()
    loss = loss_of(fused(network)(*arguments(network, 3)))
    weights = list(network.parameters())
    torch.autograd.grad(loss, weights, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, weights)


def test_what_has_no_compiled_form_is_computed_otherwise() -> None:
    network = denoiser()
    trajectory = arguments(network, 2)[0]
    single = torch.float32
    assert not trains_natively(network.unet, trajectory.double(), single)
    assert not trains_natively(network.unet, trajectory, torch.float16)
    assert not trains_natively(network.unet, trajectory.clone().requires_grad_(), single)
    assert not trains_natively(denoiser(**CONFIGS["causal"]).unet, trajectory, single)
