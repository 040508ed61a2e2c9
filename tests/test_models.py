from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mpd_gym.errors import ConfigError, InputError
from mpd_gym.models import (
    DenoiserConfig,
    Regressor,
    RegressorConfig,
    TrajectoryDenoiser,
    UnetConfig,
    regression_loss,
)
from mpd_gym.models.temporal_unet import ResidualBlock

SMALL = UnetConfig(width=8, multipliers=(1, 2), groups=4)


def small_config(**changes: Any) -> DenoiserConfig:
    values: dict[str, Any] = {
        "observation_dim": 3,
        "action_dim": 2,
        "horizon": 8,
        "conditions": (("return", 1), ("goal", 2)),
        "unet": SMALL,
    }
    return DenoiserConfig(**(values | changes))


def build(config: DenoiserConfig) -> TrajectoryDenoiser:
    torch.manual_seed(0)
    return TrajectoryDenoiser(config).double()


def inputs(config: DenoiserConfig, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(rows, config.horizon, config.trajectory_dim),
        torch.randint(1, 101, (rows,), generator=generator),
        normal(rows, config.observation_dim),
        normal(rows, config.condition_dim),
        torch.ones(rows, len(config.conditions), dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("output", "count"), [("trajectory", 71_829_518), ("observations", 71_829_131)]
)
def test_the_paper_preset_has_the_published_parameter_counts(output: Any, count: int) -> None:
    config = DenoiserConfig(11, 3, 32, output=output, conditions=(("return", 1),), null="zeros")
    with torch.device("meta"):
        network = TrajectoryDenoiser(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("output", ["trajectory", "observations"])
@pytest.mark.parametrize("null", ["flag", "learned", "zeros"])
@pytest.mark.parametrize("initial_state", ["film", "inpaint"])
@pytest.mark.parametrize("conditions", [(), (("return", 1),), (("return", 1), ("goal", 2))])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 4)])
def test_forward_is_embed_modulations_denoise(
    output: Any, null: Any, initial_state: Any, conditions: Any, multipliers: Any
) -> None:
    config = small_config(
        output=output,
        null=null,
        initial_state=initial_state,
        conditions=conditions,
        unet=UnetConfig(8, multipliers, groups=4),
    )
    network = build(config)
    trajectory, *conditioning = inputs(config, 4)
    whole = network(trajectory, *conditioning)
    apart = network.denoise(trajectory, network.modulations(network.embed(*conditioning)))
    assert whole.shape == (4, 8, 3 if output == "observations" else 5)
    assert torch.equal(whole, apart)


def test_candidates_share_a_row_of_modulations() -> None:
    config = small_config()
    network = build(config)
    _, *conditioning = inputs(config, 2)
    trajectory = inputs(config, 6, seed=1)[0]
    shared = network.denoise(trajectory, network.modulations(network.embed(*conditioning)))
    repeated = [value.repeat_interleave(3, dim=0) for value in conditioning]
    torch.testing.assert_close(shared, network(trajectory, *repeated), rtol=1e-10, atol=1e-12)


def test_batched_rows_equal_single_rows() -> None:
    config = small_config()
    network = build(config).float()
    values = [value if value.dtype == torch.int64 else value.float() for value in inputs(config, 5)]
    batched = network(*values)
    single = torch.cat([network(*(value[i : i + 1] for value in values)) for i in range(5)])
    torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-5)


def test_a_residual_block_follows_its_formula() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 8, 5, UnetConfig(8, (1,), groups=2)).double()
    hidden = torch.randn(2, 3, 6, dtype=torch.float64)
    modulations = block.modulations(torch.randn(2, 5, dtype=torch.float64))

    def normalised(value: Tensor) -> Tensor:
        groups = value.reshape(2, 2, 4 * 6)
        mean = groups.mean(-1, keepdim=True)
        variance = groups.var(-1, unbiased=False, keepdim=True)
        return ((groups - mean) / (variance + 1e-6).sqrt()).reshape(2, 8, 6)

    branch = hidden
    for convolution, (scale, bias) in zip(block.convolutions, modulations, strict=True):
        branch = normalised(convolution(branch)) * scale[:, :, None] + bias[:, :, None]
    total = branch + block.projection(hidden)
    torch.testing.assert_close(block(hidden, modulations), total * torch.sigmoid(total))


def test_the_network_depends_on_everything_it_is_told() -> None:
    config = small_config()
    network = build(config)
    values = list(inputs(config, 2))
    reference = network(*values)
    for index in range(5):
        changed = list(values)
        changed[index] = values[index] + 1 if index < 4 else torch.zeros_like(values[index])
        assert not torch.allclose(network(*changed), reference), index


@pytest.mark.parametrize(("null", "told"), [("flag", True), ("learned", True), ("zeros", False)])
def test_absence_differs_from_a_condition_of_zeros(null: Any, told: bool) -> None:
    config = small_config(null=null)
    network = build(config)
    trajectory, k, initial, conditions, present = inputs(config, 2)
    zeros = network(trajectory, k, initial, torch.zeros_like(conditions), present)
    absent = network(trajectory, k, initial, conditions, torch.zeros_like(present))
    assert torch.allclose(zeros, absent) is not told
    one = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    assert torch.allclose(network(trajectory, k, initial, conditions * 0, one), zeros) is not told


@pytest.mark.parametrize("null", ["flag", "learned", "zeros"])
def test_values_of_absent_conditions_are_ignored(null: Any) -> None:
    config = small_config(null=null)
    network = build(config)
    trajectory, k, initial, conditions, present = inputs(config, 2)
    absent = torch.zeros_like(present)
    outputs = [
        network(trajectory, k, initial, values, absent)
        for values in (conditions, torch.full_like(conditions, float("nan")))
    ]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("initial_state", ["film", "inpaint"])
@pytest.mark.parametrize("null", ["flag", "learned", "zeros"])
def test_every_parameter_receives_gradient(initial_state: Any, null: Any) -> None:
    config = small_config(null=null, initial_state=initial_state)
    network = build(config)
    *values, present = inputs(config, 4)
    present[2:] = 0
    torch.autograd.backward(network(*values, present).square().mean())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_learned_null_vector_serves_absent_conditions_only() -> None:
    config = small_config(null="learned")
    network = build(config)
    *values, present = inputs(config, 2)
    present[:, 1] = 0  # the goal is missing
    torch.autograd.backward(network(*values, present).sum())
    assert network.null is not None and network.null.grad is not None
    assert network.null.grad[0].abs().sum() == 0
    assert network.null.grad[1].abs().sum() > 0


def test_a_denoiser_configuration_survives_json() -> None:
    config = small_config(output="observations", null="learned", initial_state="inpaint")
    text = json.dumps(dataclasses.asdict(config))
    assert DenoiserConfig(**json.loads(text)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 30, "unet": UnetConfig(8, (1, 2, 4))}, r"divisible by 4 .*got 30; .*32"),
        ({"horizon": 0}, "horizon: expected an integer >= 1; got 0"),
        ({"output": "trajectry"}, "Did you mean 'trajectory'"),
        ({"null": "flags"}, "Did you mean 'flag'"),
        ({"initial_state": "inpainted"}, "Did you mean 'inpaint'"),
        ({"conditions": (("goal", 1), ("goal", 2))}, "conditions: names must differ"),
        ({"conditions": (("goal", 0),)}, "size of condition 'goal'.*>= 1; got 0"),
        ({"observation_dim": 0}, "observation_dim.*got 0"),
        ({"action_dim": 1.5}, "action_dim.*got 1.5"),
    ],
)
def test_wrong_denoiser_configurations_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 20}, "width.*groups.*8.*got 20"),
        ({"width": 9, "groups": 9}, "even number"),
        ({"kernel_size": 4}, "kernel_size: expected an odd number; got 4"),
        ({"multipliers": ()}, "at least one level"),
        ({"multipliers": (1, 0)}, "multipliers.*got 0"),
        ({"groups": 0}, "groups.*got 0"),
    ],
)
def test_wrong_unet_configurations_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnetConfig(**changes)


@pytest.mark.parametrize(
    ("index", "name"), [(0, "trajectory"), (2, "initial"), (3, "conditions"), (4, "present")]
)
def test_wrong_shapes_are_named(index: int, name: str) -> None:
    config = small_config()
    values = list(inputs(config, 4))
    values[index] = values[index][..., :-1]
    with pytest.raises(InputError, match=f"{name}: expected shape"):
        build(config)(*values)


def test_rows_that_cannot_share_modulations_are_refused() -> None:
    config = small_config()
    network = build(config)
    modulations = network.modulations(network.embed(*inputs(config, 2)[1:]))
    with pytest.raises(InputError, match="multiple of 2 rows; got 3"):
        network.denoise(inputs(config, 3)[0], modulations)


def regressor(target: Any, inputs: Any = "state_action", goal_dim: int = 0) -> Regressor:
    torch.manual_seed(0)
    return Regressor(RegressorConfig(3, 2, target, inputs, (16, 16), goal_dim))


@pytest.mark.parametrize("target", ["violation", "termination"])
def test_regression_losses_follow_their_formulas_on_recorded_steps(target: str) -> None:
    states, actions = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    reward = regressor("reward")
    reward.set_target_statistics(3.0, 2.0)
    targets = torch.randn(2, 4)
    padded = torch.where(mask > 0, targets, torch.full_like(targets, 1e3))
    expected = (reward(states, actions) - (targets - 3) / 2).square()[mask > 0].mean()
    torch.testing.assert_close(regression_loss(reward, (states, actions), padded, mask), expected)

    termination = regressor(target)
    ended = (torch.rand(2, 4) < 0.5).float()
    probability = termination.predict(states, actions)
    likelihood = torch.where(ended > 0, probability, 1 - probability)
    expected = -likelihood.log()[mask > 0].mean()
    loss = regression_loss(termination, (states, actions), ended, mask)
    torch.testing.assert_close(loss, expected)
    assert regression_loss(reward, (states, actions), targets, torch.zeros(2, 4)) == 0


def test_predictions_are_in_environment_units_and_costs_never_negative() -> None:
    states, actions = torch.randn(64, 3), torch.randn(64, 2)
    reward, cost = regressor("reward"), regressor("cost")
    raw = reward(states, actions)
    mean = -5 * float(raw.detach().median())  # half of the predictions are below zero
    for model in (reward, cost):
        model.set_target_statistics(mean, 5.0)
    torch.testing.assert_close(reward.predict(states, actions), raw * 5 + mean)
    torch.testing.assert_close(cost.predict(states, actions), (raw * 5 + mean).clamp(min=0))
    assert (cost.predict(states, actions) == 0).sum() >= 30


@pytest.mark.parametrize("kind", ["state_action", "transition"])
def test_regressors_learn_their_inputs(kind: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    states, actions, reached = (torch.randn(256, size, generator=generator) for size in (3, 2, 3))
    targets = 10 + 4 * (states[:, 0] if kind == "state_action" else reached[:, 0])
    model = regressor("reward", kind)
    model.set_target_statistics(float(targets.mean()), float(targets.std()))
    arguments = (states, actions, reached)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = regression_loss(model, arguments, targets, torch.ones(256))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert (model.predict(*arguments) - targets).abs().mean() < 0.5


def test_violations_of_a_limit_are_learned_sharply() -> None:
    generator = torch.Generator().manual_seed(1)
    states = 2 * torch.rand(4096, 3, generator=generator) - 1
    actions = torch.zeros(4096, 2)
    beyond = (states[:, 0] > 0.8).float()
    model = regressor("violation")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        loss = regression_loss(model, (states, actions), beyond, torch.ones(4096))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    probability = model.predict(states, actions)
    assert ((probability >= 0) & (probability <= 1)).all()
    clear = (states[:, 0] - 0.8).abs() > 0.05
    assert ((probability > 0.5) == (beyond > 0))[clear].all()


def test_regressor_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="finite"):
        regressor("reward").set_target_statistics(float("nan"), 1.0)
    with pytest.raises(ConfigError, match="Did you mean 'reward'"):
        regressor("rewards")
    with pytest.raises(ConfigError, match="Did you mean 'transition'"):
        regressor("reward", "transitions")
    with pytest.raises(ConfigError, match="hidden"):
        RegressorConfig(3, 2, "reward", hidden=(0,))


def test_regressor_statistics_are_saved_and_constant_targets_do_not_divide_by_zero() -> None:
    model = regressor("cost")
    model.set_target_statistics(2.5, 0.0)
    other = regressor("cost")
    other.load_state_dict(model.state_dict())
    assert other.mean == 2.5 and other.std == 1.0


def test_a_regressor_configuration_survives_json() -> None:
    config = RegressorConfig(3, 2, "termination", "transition", (16,))
    assert RegressorConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
