"""Value guidance against closed forms, and the value network."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpd_gym.agents.losses import DenoisingTask, ValueTask, states_only, with_conditions
from mpd_gym.diffusion import (
    LossConfig,
    Parts,
    ascend,
    compose,
    make_schedule,
    normal_noise,
    sample,
)
from mpd_gym.errors import ConfigError
from mpd_gym.models import (
    DenoiserConfig,
    TrajectoryDenoiser,
    UnetConfig,
    ValueConfig,
    ValueNetwork,
)
from mpd_gym.types import Batch

MEAN, STD, SLOPE = 0.3, 0.5, 0.8
UNET = UnetConfig(width=8, multipliers=(1, 2), groups=4)


def gaussian(schedule: Any) -> Any:
    """Exact denoiser of N(MEAN, STD²) data."""

    def denoise(noisy: Tensor, k: int) -> Tensor:
        signal, noise = schedule.signal(k), schedule.noise(k)
        gain = signal * STD**2 / (signal**2 * STD**2 + noise**2)
        return MEAN + gain * (noisy - signal * MEAN)

    return denoise


def guided_samples(levels: int, count: int, **options: Any) -> Tensor:
    """Samples guided by V = log E[exp(SLOPE x_0) | x_k], linear in x_k for Gaussian data."""
    schedule = make_schedule("cosine", levels)
    denoise = gaussian(schedule)

    def value(noisy: Tensor, k: Tensor) -> Tensor:
        return SLOPE * denoise(noisy, int(k)).sum((1, 2))

    step = compose("planner_only", Parts(denoise, None, schedule, 1))
    step = ascend(step, value, schedule, **{"num_ascents": 1, "free_levels": 0, **options})
    noise = normal_noise((count, 1, 1), torch.Generator().manual_seed(0), dtype=torch.float64)
    return sample(step, noise(), schedule.levels(), noise).flatten()


@pytest.mark.parametrize(("scale", "ascents"), [(0.0, 1), (1.0, 1), (0.5, 2), (1.0, 2)])
def test_gaussian_data_are_shifted_by_slope_times_variance(scale: float, ascents: int) -> None:
    found = guided_samples(200, 20_000, scale=scale, num_ascents=ascents)
    expected = MEAN + scale * ascents * SLOPE * STD**2
    standard_error = STD / 20_000**0.5
    assert float(found.mean()) == pytest.approx(expected, abs=5 * standard_error + 0.02)
    assert float(found.std()) == pytest.approx(STD, rel=0.03)


def test_the_error_falls_with_more_levels() -> None:
    expected = MEAN + SLOPE * STD**2
    coarse, fine = (guided_samples(n, 50_000, scale=1.0).mean() - expected for n in (8, 128))
    assert abs(float(fine)) < 0.5 * abs(float(coarse))


def test_one_step_is_gradient_times_posterior_variance() -> None:
    schedule = make_schedule("cosine", 10)
    seen: list[tuple[Tensor, int]] = []

    def step(trajectory: Tensor, k: int, k_next: int, noise: Any) -> Tensor:
        seen.append((trajectory, k))
        return trajectory

    def value(noisy: Tensor, k: Tensor) -> Tensor:  # gradient: centre − x
        return -0.5 * (noisy - 2.0).square().sum((1, 2))

    start = torch.tensor([[[0.5]], [[3.0]]], dtype=torch.float64)
    guide = ascend(step, value, schedule, scale=0.7, num_ascents=3, free_levels=2)
    for k in (9, 3):
        rate = 0.7 * schedule.posterior(k, k - 1).std ** 2
        guide(start, k, k - 1, lambda: start)
        expected = 2.0 + (start - 2.0) * (1 - rate) ** 3  # each ascent shrinks the gap
        torch.testing.assert_close(seen.pop()[0], expected)
    for k in (2, 1):
        guide(start, k, k - 1, lambda: start)
        assert torch.equal(seen.pop()[0], start), "the lowest levels are free"


def test_known_entries_stay_exact_during_the_ascent() -> None:
    schedule = make_schedule("cosine", 10)
    mask = torch.tensor([[True], [False]])

    def hold(trajectory: Tensor) -> Tensor:
        return torch.where(mask, torch.tensor(7.0), trajectory)

    def step(trajectory: Tensor, k: int, k_next: int, noise: Any) -> Tensor:
        return trajectory

    guide = ascend(step, lambda x, k: x.sum((1, 2)), schedule, scale=1.0, hold=hold)
    found = guide(torch.zeros(2, 2, 1), 8, 7, lambda: torch.zeros(1))
    assert (found[:, 0] == 7.0).all()
    assert (found[:, 1] > 0).all()


def test_gradients_exist_where_sampling_switches_them_off() -> None:
    network = ValueNetwork(ValueConfig(3, 4, UNET))
    schedule = make_schedule("cosine", 5)
    step = ascend(lambda x, k, j, noise: x, network, schedule, scale=1.0, free_levels=0)
    start = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    found = sample(step, start, (5, 3), lambda: start)
    assert not torch.equal(found, start)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": 1.0, "num_ascents": 0}, "num_ascents"),
        ({"scale": 1.0, "free_levels": -1}, "free_levels"),
    ],
)
def test_wrong_numbers_are_refused(option: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ascend(lambda *_: None, lambda *_: None, make_schedule("cosine", 5), **option)  # type: ignore[arg-type,return-value]


# --- the network and what it learns ---------------------------------------------------------------


def test_value_network_sees_trajectory_and_level() -> None:
    network = ValueNetwork(ValueConfig(3, 8, UNET)).eval()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, 3, generator=generator)
    values = network(rows, torch.tensor([4]))
    assert values.shape == (5,)
    torch.testing.assert_close(values, network(rows, torch.full((5,), 4)))
    assert not torch.allclose(values, network(rows, torch.tensor([3])))
    torch.testing.assert_close(values[2:3], network(rows[2:3], torch.tensor([4])))


def test_value_config_round_trips_and_refuses_horizons() -> None:
    config = ValueConfig(3, 8, UNET)
    values = json.loads(json.dumps(asdict(config)))
    assert ValueConfig(**{**values, "unet": UnetConfig(**values["unet"])}) == config
    with pytest.raises(ConfigError, match="horizon"):
        ValueConfig(3, 7, UNET)


def batch(rows: int = 6, horizon: int = 4) -> Batch:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    return Batch(
        initial=draw(rows, 2),
        observations=draw(rows, horizon, 2),
        actions=draw(rows, horizon, 1),
        conditions={"goal": draw(rows, 3), "return": draw(rows, 1)},
        rewards=draw(rows, horizon),
        costs=draw(rows, horizon),
        terminations=draw(rows, horizon),
        mask=np.ones((rows, horizon), np.float32),
    )


class Windows:
    """Stands in for a `WindowSampler`."""

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        return batch(batch_size)


def test_conditions_are_appended_to_every_state() -> None:
    before = batch()
    after = with_conditions(before, ("goal",))
    np.testing.assert_array_equal(after.initial[:, :2], before.initial)
    np.testing.assert_array_equal(after.observations[..., :2], before.observations)
    goal = before.conditions["goal"]
    np.testing.assert_array_equal(after.initial[:, 2:], goal)
    for t in range(4):
        np.testing.assert_array_equal(after.observations[:, t, 2:], goal)
    assert with_conditions(before, ()) is before


def test_value_examples_hold_the_first_row_clean_and_the_rest_noisy() -> None:
    schedule = make_schedule("cosine", 10)
    task = ValueTask(schedule, ("goal",), "return", torch.device("cpu"))
    examples = task.examples(Windows().sample(6, np.random.default_rng(0)))
    given = batch()
    np.testing.assert_array_equal(examples["value"], given.conditions["return"][:, 0])
    seen: dict[str, Tensor] = {}
    network = ValueNetwork(ValueConfig(6, 4, UNET))
    network.register_forward_pre_hook(lambda m, inputs: seen.update(x=inputs[0], k=inputs[1]))
    loss = task(network, examples, torch.Generator().manual_seed(0))["loss"]
    assert loss.requires_grad
    np.testing.assert_array_equal(seen["x"][:, 0, :2], given.initial)
    np.testing.assert_array_equal(seen["x"][:, 0, 2:5], given.conditions["goal"])
    assert (seen["x"][:, 1:] != examples["trajectory"][:, 1:]).all()
    assert ((seen["k"] >= 1) & (seen["k"] <= 10)).all()


def test_states_alone_have_no_action_columns_and_no_loss_on_x_0() -> None:
    config = DenoiserConfig(2, 0, 4, initial_state="inpaint", unet=UNET)
    assert config.trajectory_dim == config.output_dim == 2
    network = TrajectoryDenoiser(config)
    parts = make_schedule("cosine", 10), LossConfig("x0"), (), "inpaint", torch.device("cpu")
    task = DenoisingTask(*parts, rearrange=states_only)
    examples = task.examples(Windows().sample(6, np.random.default_rng(0)))
    given = batch()
    assert examples.trajectory.shape == (6, 4, 2)
    np.testing.assert_array_equal(examples.trajectory[:, 0], given.initial)
    np.testing.assert_array_equal(examples.trajectory[:, 1:], given.observations[:, :-1])
    assert examples.fixed[0].all() and not examples.fixed[1:].any()
    assert torch.isfinite(task(network, examples, torch.Generator().manual_seed(0))["loss"])
