"""The optimisation loop: its mathematics, validation, settings, and what it leaves as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import (
    CONFIG,
    QUICK,
    assert_same,
    assert_same_result,
    differs,
    network,
    noisy_loss,
    sampler,
)

from mpd_gym import types
from mpd_gym.errors import ConfigError
from mpd_gym.training import (
    Record,
    TrainingConfig,
    TrainingResult,
    averaging_rate,
    fit,
    learning_rate_factor,
    to_tensors,
)


def plain_loss(
    module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
) -> dict[str, Tensor]:
    return {"loss": (module(batch["x"]) - batch["y"]).square().mean()}


# Mathematics


def reference(config: TrainingConfig) -> tuple[list[list[Tensor]], list[Tensor], list[float]]:
    """Adam, clipping and schedule in plain words; weights after each step, start, and losses."""
    module = network()
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.Adam(module.parameters(), foreach=False, fused=False)
    batches, noise = np.random.SeedSequence([config.seed, 0]).spawn(2)
    rng = np.random.default_rng(batches)
    generator = torch.Generator().manual_seed(int(noise.generate_state(1, np.uint64)[0]))
    weights, losses = [], []
    for step in range(config.steps):
        batch = {k: torch.from_numpy(v) for k, v in sampler(config.batch_size, rng).items()}
        loss = noisy_loss(module, batch, generator)["loss"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient *= min(1.0, (config.gradient_clip or math.inf) / float(norm))
        rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        wave = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        fall = 0.5 + 0.5 * math.cos(math.pi * wave) if config.schedule == "cosine" else 1.0
        late = step >= config.warmup_steps
        optimizer.param_groups[0]["lr"] = config.learning_rate * (fall if late else rise)
        optimizer.step()
        weights.append([p.detach().clone() for p in module.parameters()])
        losses.append(loss.item())
    return weights, start, losses


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_fit_equals_adam_and_the_average_in_closed_form(warmup: bool, schedule: str) -> None:
    config = differs(
        CONFIG, ema_warmup=warmup, schedule=schedule, warmup_steps=6, gradient_clip=0.5, log_every=1
    )
    result = fit(network(), noisy_loss, sampler, config, **QUICK)
    weights, start, losses = reference(config)
    taken = weights[config.ema_every - 1 :: config.ema_every]
    rates = [max(0.005, 9 / (10 + n)) if warmup else 0.005 for n in range(len(taken))]
    left = [math.prod(1 - rate for rate in rates[n + 1 :]) for n in range(len(taken))]
    for index, tensor in enumerate(result.weights.values()):
        expected = math.prod(1 - rate for rate in rates) * start[index]
        for n, sample in enumerate(taken):
            expected = expected + left[n] * rates[n] * sample[index]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.training["loss"], losses, rtol=1e-4)


def test_the_fixed_rate_keeps_the_random_start_and_the_warm_up_forgets_it() -> None:
    for warmup, share in ((False, 0.995**500), (True, 0.0)):
        config = TrainingConfig(steps=5_000, ema_warmup=warmup)
        left = math.prod(1 - averaging_rate(config, n) for n in range(500))
        assert left == pytest.approx(share, abs=1e-9)
    assert averaging_rate(TrainingConfig(), 100_000) == 0.005


def test_schedule_is_torch_s_cosine_after_a_linear_rise() -> None:
    config = TrainingConfig(steps=50, warmup_steps=10, schedule="cosine")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(10, 50):
        assert learning_rate_factor(config, step) == pytest.approx(
            cosine.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        cosine.step()
    assert [learning_rate_factor(config, step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate_factor(config, 50) == pytest.approx(0.0)
    constant = differs(config, schedule="constant")
    assert {learning_rate_factor(constant, step) for step in (9, 30, 49)} == {1.0}


def test_a_linear_map_is_recovered() -> None:
    truth = torch.tensor([[1.0, -2.0, 0.5]])

    def batches(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
        x = rng.normal(size=(batch_size, 3)).astype(np.float32)
        return {"x": x, "y": x @ truth.numpy().T}

    module = nn.Linear(3, 1)
    config = differs(CONFIG, steps=800, learning_rate=0.05, schedule="cosine")
    result = fit(module, plain_loss, batches, config, **QUICK)
    torch.testing.assert_close(module.weight.detach(), truth, rtol=0, atol=1e-4)
    assert result.training["loss"][-1] < 1e-8


def test_weight_decay_is_decoupled() -> None:
    def loss(module: nn.Module, batch: Any, noise: torch.Generator) -> dict[str, Tensor]:
        return {"loss": 0.0 * sum(p.sum() for p in module.parameters())}  # type: ignore[dict-item]

    module = network()
    before = [p.detach().clone() for p in module.parameters()]
    config = differs(CONFIG, steps=1, ema_every=1, ema_rate=1.0, weight_decay=0.1)
    fit(module, loss, sampler, config, **QUICK)
    for p, start in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), start * (1 - 1e-2 * 0.1))


# Validation


def test_validation_is_the_same_every_time_and_disturbs_nothing() -> None:
    batches: list[types.Array] = []
    draws: list[Tensor] = []

    def held_out(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
        batch = sampler(batch_size, rng)
        batches.append(batch["x"])
        return batch

    def loss(
        module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
    ) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            draws.append(noise.get_state())
            assert not module.training
        else:
            assert module.training
        return noisy_loss(module, batch, noise)

    validated = fit(network(), loss, sampler, CONFIG, validation=held_out, **QUICK)
    without = fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    assert_same(validated.weights, without.weights)
    assert list(validated.validation.steps) == [20, 40]
    assert len(batches) == len(draws) == 4
    for first, again in ((0, 2), (1, 3)):
        assert np.array_equal(batches[first], batches[again])
        assert torch.equal(draws[first], draws[again])
    assert not np.array_equal(batches[0], batches[1])
    assert len(without.validation) == 0


def test_validation_sees_the_averaged_weights() -> None:
    batch = sampler(64, np.random.default_rng(5))
    module = network()
    config = differs(CONFIG, ema_warmup=False)
    result = fit(module, plain_loss, sampler, config, validation=lambda *_: batch, **QUICK)
    with torch.no_grad():
        expected = plain_loss(module, to_tensors(batch, torch.device("cpu")), torch.Generator())
    assert result.validation["loss"][-1] == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert result.training["loss"][-1] != pytest.approx(result.validation["loss"][-1], rel=1e-2)


# Settings


def test_another_number_of_steps_keeps_a_warm_up_that_fits() -> None:
    config = TrainingConfig(steps=500, warmup_steps=200, ema_every=10)
    assert config.with_steps(1_000) == dataclasses.replace(config, steps=1_000)
    assert config.with_steps(5) == dataclasses.replace(config, steps=5, warmup_steps=4, ema_every=5)
    with pytest.raises(ConfigError, match="steps"):
        config.with_steps(0)


def test_configuration_round_trips_through_json() -> None:
    text = json.dumps(dataclasses.asdict(CONFIG))
    assert TrainingConfig(**json.loads(text)) == CONFIG


# Surroundings


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    seen = set()

    def loss(
        module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
    ) -> dict[str, Tensor]:
        seen.add(module(batch["x"]).dtype)
        return noisy_loss(module, batch, noise)

    result = fit(network(), loss, sampler, differs(CONFIG, precision="bf16"), **QUICK)
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in result.weights.values()} == {torch.float32}


def test_threads_and_handlers_are_put_back() -> None:
    threads = torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def look(record: Record) -> None:
        seen.append((torch.get_num_threads(), signal.getsignal(signal.SIGTERM)))

    fit(network(), noisy_loss, sampler, differs(CONFIG, threads=2), callbacks=[look], **QUICK)
    assert seen[0][0] == 2
    assert seen[0][1] != handlers[1]
    assert torch.get_num_threads() == threads
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_frozen_parameters_and_buffers_keep_their_bits() -> None:
    module = network()
    module[0].requires_grad_(False)  # type: ignore[index]
    module.register_buffer("table", torch.tensor([0.1, 0.2]))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = fit(module, noisy_loss, sampler, differs(CONFIG, weight_decay=0.1), **QUICK)
    for name, tensor in result.weights.items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("2."))


def test_fine_tuning_starts_from_the_weights_given() -> None:
    modes = []

    def loss(module: nn.Module, batch: Any, noise: torch.Generator) -> dict[str, Tensor]:
        modes.append(module.training)
        return noisy_loss(module, batch, noise)

    module = network()
    first = fit(module, noisy_loss, sampler, CONFIG, **QUICK)
    assert not module.training
    tiny = differs(CONFIG, learning_rate=1e-12)
    second = fit(module, loss, sampler, tiny, name="tuned", progress=False)
    assert all(modes)
    for name, tensor in second.weights.items():
        torch.testing.assert_close(tensor, first.weights[name], rtol=1e-6, atol=1e-7)


def test_batches_of_the_package_become_tensors() -> None:
    array = np.ones((2, 3), np.float32)
    array.flags.writeable = False
    batch = types.Batch(array, array, array, {"return": array}, array, array, array, array)
    converted = to_tensors(batch, torch.device("cpu"))
    assert isinstance(converted, types.Batch)
    assert torch.equal(torch.as_tensor(converted.conditions["return"]), torch.ones(2, 3))
    assert isinstance(converted.mask, Tensor)
    writable = np.zeros(2, np.float32)
    shared = to_tensors({"a": writable, "name": "x"}, torch.device("cpu"))
    writable += 1
    assert torch.equal(shared["a"], torch.ones(2))
    assert shared["name"] == "x"


def test_records_bar_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    records: list[Record] = []
    result = fit(
        network(),
        noisy_loss,
        sampler,
        CONFIG,
        name="toy",
        validation=sampler,
        directory=tmp_path,
        callbacks=[records.append],
    )
    assert result.training.names == ("loss", "largest", "gradient_norm")
    assert list(result.training.steps) == [7, 14, 21, 28, 35, 40]
    assert [r.step for r in records if r.split == "validation"] == [20, 40]
    shown = capsys.readouterr().err
    assert "toy: 100%" in shown
    assert "40/40" in shown
    assert f"loss={records[-2].values['loss']:.4g}" in shown
    assert "validation=" in shown
    board = event_accumulator.EventAccumulator(str(tmp_path / "toy")).Reload()
    events = board.Scalars("training/loss")
    assert [event.step for event in events] == [7, 14, 21, 28, 35, 40]
    np.testing.assert_allclose([e.value for e in events], result.training["loss"], rtol=1e-6)
    with pytest.raises(KeyError, match="was not logged"):
        result.training["cost"]


def test_no_bar_without_progress(capsys: pytest.CaptureFixture[str]) -> None:
    fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    assert capsys.readouterr().err == ""


def test_it_runs_outside_the_main_thread() -> None:
    results: list[TrainingResult] = []
    run: Callable[..., TrainingResult] = partial(
        fit, network(), noisy_loss, sampler, CONFIG, **QUICK
    )
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    assert_same_result(results[0], fit(network(), noisy_loss, sampler, CONFIG, **QUICK))
