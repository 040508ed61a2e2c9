"""The denoising loss: its examples, its mean by hand, levels, dropout and padding."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import SCHEDULE, network
from torch import Tensor

from mpd_gym.diffusion.loss import Examples, LossConfig, assemble, denoising_loss
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.models import UnetConfig
from mpd_gym.types import Batch


def batch(size: int = 6, horizon: int = 4, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.normal(size=(size, *shape)).astype(np.float32)

    mask = np.ones((size, horizon), np.float32)
    mask[0, 2:] = 0
    return Batch(
        initial=normal(2),
        observations=normal(horizon, 2),
        actions=normal(horizon, 1),
        conditions={"return": normal(1), "goal": normal(2), "cost": normal(1)},
        rewards=normal(horizon),
        costs=normal(horizon),
        terminations=np.zeros((size, horizon), np.float32),
        mask=mask,
    )


def test_film_examples_hold_the_next_state_and_the_action() -> None:
    windows = batch()
    examples = assemble(windows, ["goal", "return"])
    np.testing.assert_array_equal(examples.trajectory[..., :2], windows.observations)
    np.testing.assert_array_equal(examples.trajectory[..., 2:], windows.actions)
    np.testing.assert_array_equal(examples.conditions[:, :2], windows.conditions["goal"])
    np.testing.assert_array_equal(examples.conditions[:, 2:], windows.conditions["return"])
    np.testing.assert_array_equal(examples.recorded, np.repeat(windows.mask[..., None], 3, axis=-1))
    assert examples.present.shape == (6, 2) and (examples.present == 1).all()
    assert not examples.fixed.any()
    assert assemble(windows, []).conditions.shape == (6, 0)


def test_inpainted_examples_start_with_the_initial_state() -> None:
    windows = batch()
    examples = assemble(windows, [], initial_state="inpaint")
    np.testing.assert_array_equal(examples.trajectory[:, 0, :2], windows.initial)
    np.testing.assert_array_equal(examples.trajectory[:, 1:, :2], windows.observations[:, :-1])
    np.testing.assert_array_equal(examples.trajectory[..., 2:], windows.actions)
    assert examples.fixed.nonzero().tolist() == [[0, 0], [0, 1]]
    # two recorded steps: x_0, x_1, x_2 and u_0, u_1 are known
    assert examples.recorded[0, :, 0].tolist() == [1, 1, 1, 0]
    assert examples.recorded[0, :, 2].tolist() == [1, 1, 0, 0]
    with pytest.raises(InputError, match=r"\['speed'\] missing"):
        assemble(windows, ["speed"])


class Recorder:
    """Network that keeps its inputs and predicts a constant."""

    def __init__(self, columns: int = 3, value: float = 0.0) -> None:
        self.columns, self.value = columns, value

    def __call__(
        self, trajectory: Tensor, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor
    ) -> Tensor:
        self.noisy, self.k, self.present = trajectory, k, present
        constant: Tensor = torch.full_like(trajectory[..., : self.columns], self.value)
        return constant


def drawn(examples: Examples, seed: int) -> Tensor:
    """The noise that the loss draws: second use of its generator."""
    generator = torch.Generator().manual_seed(seed)
    torch.randint(1, 11, (len(examples.initial),), generator=generator)
    return torch.randn(examples.trajectory.shape, generator=generator)


@pytest.mark.parametrize("columns", [3, 2])
@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("initial_state", ["film", "inpaint"])
def test_the_loss_is_the_weighted_mean_squared_error(
    columns: int, prediction: Any, initial_state: str
) -> None:
    examples = assemble(batch(), ["goal"], initial_state=initial_state)
    config = LossConfig(prediction, first_action_weight=7.0, padding_weight=0.5)
    recorder = Recorder(columns, 0.1)
    loss = denoising_loss(recorder, examples, SCHEDULE, config, torch.Generator().manual_seed(3))
    epsilon = drawn(examples, 3)
    kept = torch.tensor(SCHEDULE.alphas_bar)[recorder.k][:, None, None]
    noisy = kept.sqrt() * examples.trajectory + (1 - kept).sqrt() * epsilon
    weights = np.where(examples.recorded > 0, 1.0, 0.5)
    weights[:, 0, 2] *= 7
    if initial_state == "inpaint":
        noisy[:, 0, :2] = examples.trajectory[:, 0, :2]
        weights[:, 0, :2] = 0
    target = epsilon if prediction == "noise" else examples.trajectory
    expected = (weights * (0.1 - target.numpy()) ** 2)[..., :columns].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(recorder.noisy, noisy.float())


def test_levels_and_dropout_have_their_frequencies() -> None:
    size = 20_000
    zeros = torch.zeros(size, 1, 2)
    examples = Examples(
        zeros,
        zeros[:, 0, :1],
        torch.ones(size, 2),
        torch.ones(size, 2),
        torch.ones_like(zeros),
        torch.zeros(1, 2, dtype=torch.bool),
        torch.zeros(1, 2, dtype=torch.bool),
    )
    recorder = Recorder(2)
    denoising_loss(recorder, examples, SCHEDULE, LossConfig(), torch.Generator().manual_seed(0))
    counts = np.bincount(recorder.k.numpy(), minlength=12)
    assert counts[0] == 0 and counts[11] == 0
    np.testing.assert_allclose(counts[1:11] / size, 0.1, atol=0.01)
    assert torch.equal(recorder.present[:, 0], recorder.present[:, 1])  # all or nothing
    assert 1 - recorder.present[:, 0].mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("dropout", "present"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_its_ends_is_certain(dropout: float, present: float) -> None:
    recorder = Recorder()
    config = LossConfig(condition_dropout=dropout)
    examples = assemble(batch(), ["goal"])
    denoising_loss(recorder, examples, SCHEDULE, config, torch.Generator().manual_seed(0))
    assert (recorder.present == present).all()


def test_equal_generators_give_equal_losses() -> None:
    examples, model = assemble(batch(), ["return", "goal"]), network().float()
    first, second, other = (
        denoising_loss(
            model, examples, SCHEDULE, LossConfig(), torch.Generator().manual_seed(seed)
        ).item()
        for seed in (0, 0, 1)
    )
    assert first == second != other


def test_a_loss_needs_to_know_what_is_predicted() -> None:
    unsettled = LossConfig("auto")
    with pytest.raises(ConfigError, match="prediction"):
        denoising_loss(
            network().float(), assemble(batch(), ["return", "goal"]), SCHEDULE, unsettled,
            torch.Generator().manual_seed(0),
        )  # fmt: skip


def test_padding_can_be_left_out() -> None:
    windows = batch()
    garbage = dataclasses.replace(
        windows, observations=windows.observations + 100 * (1 - windows.mask[..., None])
    )
    config = LossConfig("x0", padding_weight=0.0)
    losses = [
        denoising_loss(
            Recorder(), assemble(data, []), SCHEDULE, config, torch.Generator().manual_seed(0)
        )
        for data in (windows, garbage)
    ]
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "nois"}, "Did you mean 'noise'"),
        ({"condition_dropout": 1.2}, "condition_dropout.*got 1.2"),
        ({"first_action_weight": -1.0}, "first_action_weight.*got -1"),
        ({"padding_weight": math.nan}, "padding_weight.*got nan"),
    ],
)
def test_wrong_loss_configurations_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossConfig(**changes)


def test_a_loss_configuration_survives_json() -> None:
    config = LossConfig("x0", 5.0, 0.1, 0.0)
    assert LossConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_the_loss_falls_on_toy_data(prediction: Any) -> None:
    rng = np.random.default_rng(0)
    model = network(conditions=(("goal", 2),), unet=UnetConfig(16, (1, 2), groups=4)).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    times = np.linspace(0, 1, 5)[None, :, None]
    losses = []
    for _ in range(50):
        start, goal = rng.uniform(-1, 1, (2, 16, 1, 2)).astype(np.float32)
        line = (start + times * (goal - start)).astype(np.float32)
        windows = dataclasses.replace(
            batch(16),
            initial=line[:, 0],
            observations=line[:, 1:],
            actions=np.diff(line, axis=1)[..., :1],
            conditions={"goal": goal[:, 0]},
        )
        loss = denoising_loss(
            model, assemble(windows, ["goal"]), SCHEDULE, LossConfig(prediction), generator
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
