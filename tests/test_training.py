"""The optimisation loop: its mathematics, then exact resume, interruption and failure."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpd_gym import types
from mpd_gym.checkpoint import load_file
from mpd_gym.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    TrainingError,
    WorkerError,
)
from mpd_gym.training import (
    Record,
    TrainingConfig,
    TrainingResult,
    averaging_rate,
    fit,
    fit_parallel,
    learning_rate_factor,
    to_tensors,
)

CONFIG = TrainingConfig(
    steps=40,
    batch_size=8,
    learning_rate=1e-2,
    ema_every=5,
    validation_every=20,
    validation_batches=2,
    checkpoint_every=10,
    log_every=7,
    threads=1,
)
QUICK: dict[str, Any] = {"name": "toy", "progress": False}


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))


def sampler(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
    x = rng.normal(size=(batch_size, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x).sum(1, keepdims=True)}


def noisy_loss(
    module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
) -> dict[str, Tensor]:
    """Squared error with a drop-out of inputs, drawn from `noise`."""
    kept = torch.rand(batch["x"].shape, generator=noise) > 0.2
    error = (module(batch["x"] * kept) - batch["y"]).square()
    return {"loss": error.mean(), "largest": error.max()}


def plain_loss(
    module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
) -> dict[str, Tensor]:
    return {"loss": (module(batch["x"]) - batch["y"]).square().mean()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same_result(first: TrainingResult, second: TrainingResult) -> None:
    assert_same(first.weights, second.weights)
    for one, other in (
        (first.training, second.training),
        (first.validation, second.validation),
    ):
        assert one.names == other.names
        assert np.array_equal(one.steps, other.steps)
        assert np.array_equal(one.values, other.values)


def differs(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return dataclasses.replace(config, **changes)


class StoppedError(Exception):
    """Raised by a test in the middle of a training."""


def stop_at(step: int) -> Callable[[Record], None]:
    def callback(record: Record) -> None:
        if record.step >= step:
            raise StoppedError

    return callback


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


# Resume


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.1, "gradient_clip": None},
        {"precision": "bf16", "ema_warmup": False},
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = differs(CONFIG, **options)
    whole = fit(network(), noisy_loss, sampler, config, validation=sampler, **QUICK)
    run: Callable[..., TrainingResult] = partial(
        fit, validation=sampler, directory=tmp_path, **QUICK
    )
    for start, step in enumerate((12, 25, 35)):  # checkpoints at 10, 20, 30; records at 7, 14, …
        with pytest.raises(StoppedError):  # after the first time, the weights given do not matter
            run(network(start), noisy_loss, sampler, config, callbacks=[stop_at(step)])
    module = network(9)
    resumed = run(module, noisy_loss, sampler, config)
    assert_same_result(whole, resumed)
    assert_same(dict(module.state_dict()), resumed.weights)
    assert not module.training


def test_half_and_half_is_the_whole(tmp_path: Path) -> None:
    whole = fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path / "a", **QUICK)
    half = differs(CONFIG, steps=20)
    first = fit(network(), noisy_loss, sampler, half, directory=tmp_path / "b", **QUICK)
    second = fit(network(1), noisy_loss, sampler, CONFIG, directory=tmp_path / "b", **QUICK)
    assert (first.step, second.step) == (20, 40)
    assert_same(whole.weights, second.weights)
    states = [load_file(tmp_path / part / "toy/checkpoint.safetensors") for part in "ab"]
    raw = [{k: v for k, v in tensors.items() if not k.startswith("log/")} for tensors, _ in states]
    assert_same(raw[0], raw[1])  # raw weights, average, moments, noise
    assert states[0][1]["rng"] == states[1][1]["rng"]
    assert second.seconds > 0


def test_a_finished_training_returns_at_once(tmp_path: Path) -> None:
    def never(batch_size: int, rng: np.random.Generator) -> Any:
        raise AssertionError("a batch was drawn")

    first = fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    again = fit(network(1), noisy_loss, never, CONFIG, directory=tmp_path, **QUICK)
    assert_same_result(first, again)


def test_resume_false_starts_again(tmp_path: Path) -> None:
    first = fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    with pytest.raises(StoppedError):
        fit(
            network(),
            noisy_loss,
            sampler,
            CONFIG,
            directory=tmp_path,
            resume=False,
            callbacks=[stop_at(1)],
            **QUICK,
        )
    assert not list(tmp_path.glob("toy/*.safetensors"))
    again = fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    assert_same_result(first, again)


CHANGED = {
    "batch_size": 9,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "gradient_clip": None,
    "schedule": "cosine",
    "warmup_steps": 3,
    "ema_rate": 0.01,
    "ema_every": 4,
    "ema_warmup": False,
    "seed": 1,
    "precision": "bf16",
}
FREE = {
    "steps": 50,
    "validation_every": 3,
    "validation_batches": 1,
    "checkpoint_every": None,
    "checkpoint_seconds": 5.0,
    "log_every": 2,
    "threads": None,
}


def test_every_setting_is_either_fixed_or_free() -> None:
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert names == CHANGED.keys() | FREE.keys()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("done")
    fit(network(), noisy_loss, sampler, CONFIG, directory=path, identity={"data": "a"}, **QUICK)
    return path


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_changed_setting_is_refused_by_name(done: Path, name: str) -> None:
    config = differs(CONFIG, **{name: CHANGED[name]})
    with pytest.raises(ConfigError, match=rf"TrainingConfig\.{name} is .*resume=False"):
        fit(
            network(),
            noisy_loss,
            sampler,
            config,
            directory=done,
            identity={"data": "a"},
            **QUICK,
        )


def test_free_settings_may_change(tmp_path: Path) -> None:
    fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    config = differs(CONFIG, **FREE)
    assert fit(network(), noisy_loss, sampler, config, directory=tmp_path, **QUICK).step == 50


def test_fewer_steps_than_done_are_refused(done: Path) -> None:
    config = differs(CONFIG, steps=30)
    with pytest.raises(ConfigError, match=r"TrainingConfig\.steps is 30, but .* has done 40"):
        fit(
            network(),
            noisy_loss,
            sampler,
            config,
            directory=done,
            identity={"data": "a"},
            **QUICK,
        )


def test_a_cosine_cannot_be_extended(tmp_path: Path) -> None:
    config = differs(CONFIG, schedule="cosine")
    fit(network(), noisy_loss, sampler, config, directory=tmp_path, **QUICK)
    longer = differs(config, steps=80)
    with pytest.raises(ConfigError, match=r"TrainingConfig\.steps is 80, but .* with 40"):
        fit(network(), noisy_loss, sampler, longer, directory=tmp_path, **QUICK)


def test_other_data_or_module_are_refused(done: Path) -> None:
    run: Callable[..., TrainingResult] = partial(
        fit, loss_fn=noisy_loss, sampler=sampler, config=CONFIG, directory=done, **QUICK
    )
    with pytest.raises(ConfigError, match=r"identity is \{'data': 'b'\}"):
        run(network(), identity={"data": "b"})
    with pytest.raises(CheckpointError, match=r"'weights/weight' is missing"):
        run(nn.Linear(3, 1), identity={"data": "a"})


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


# Failures


class FailsAt:
    """A loss that is not finite at one step."""

    def __init__(self, step: int, poison: Callable[[Tensor], Tensor]) -> None:
        self.calls, self.step, self.poison = 0, step, poison

    def __call__(
        self, module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
    ) -> dict[str, Tensor]:
        self.calls += 1
        parts = noisy_loss(module, batch, noise)
        if self.calls == self.step:
            parts["loss"] = self.poison(parts["loss"])
        return parts


@pytest.mark.parametrize(
    ("poison", "match"),
    [
        (lambda loss: loss * torch.nan, "training loss is nan at step 23"),
        (lambda loss: loss / 0, "training loss is inf at step 23"),
        (lambda loss: (loss * 0).sqrt(), "training gradient_norm is nan at step 23"),
    ],
)
def test_a_non_finite_step_is_named_and_overwrites_nothing(
    tmp_path: Path, poison: Callable[[Tensor], Tensor], match: str
) -> None:
    with pytest.raises(TrainingError, match=rf"'toy' cannot go on: {match}.*at step 20\. Lower"):
        fit(network(), FailsAt(23, poison), sampler, CONFIG, directory=tmp_path, **QUICK)
    whole = fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    resumed = fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    assert_same_result(whole, resumed)


def test_a_non_finite_loss_without_a_directory() -> None:
    poisoned = FailsAt(3, lambda loss: loss * torch.nan)
    with pytest.raises(TrainingError, match="without a directory nothing was kept"):
        fit(network(), poisoned, sampler, CONFIG, **QUICK)


def test_weights_that_overflow_without_a_sign_in_the_loss_are_named() -> None:
    def loss(module: nn.Module, batch: Any, noise: torch.Generator) -> dict[str, Tensor]:
        return {"loss": sum(p.sum() for p in module.parameters()) * 1e-3}  # type: ignore[dict-item]

    module = nn.Linear(1, 1)
    config = differs(CONFIG, steps=1, ema_every=1, learning_rate=1e39)
    with pytest.raises(TrainingError, match="the average of 'weight' is not finite at step 1"):
        fit(module, loss, sampler, config, **QUICK)


def test_non_finite_validation_data_are_named() -> None:
    def broken(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
        return {k: v * np.float32(np.nan) for k, v in sampler(batch_size, rng).items()}

    with pytest.raises(TrainingError, match="validation loss is nan at step 20"):
        fit(network(), noisy_loss, sampler, CONFIG, validation=broken, **QUICK)


def test_a_failing_disk_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(record: Record) -> None:
        if record.step == 21:
            monkeypatch.setattr(os, "fsync", full)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[fill], **QUICK)
    monkeypatch.undo()
    steps = {p.name: load_file(p)[1]["step"] for p in tmp_path.glob("toy/*.safetensors")}
    assert steps == {"checkpoint.safetensors": 20, "previous.safetensors": 10}


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_serves_in_its_place(
    tmp_path: Path,
) -> None:
    run: Callable[..., TrainingResult] = partial(
        fit, loss_fn=noisy_loss, sampler=sampler, config=CONFIG, **QUICK
    )
    whole = run(network(), directory=tmp_path)
    newest = tmp_path / "toy/checkpoint.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*remove it.*previous\.safetensors"):
        run(network(), directory=tmp_path)
    newest.unlink()
    assert_same_result(whole, run(network(), directory=tmp_path))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"error": torch.ones((), requires_grad=True)}, r"'loss' to minimise; got \['error'\]"),
        ({"loss": torch.ones(2, requires_grad=True)}, r"'loss' must be a scalar tensor; got \[2\]"),
        (
            {"loss": torch.ones((), requires_grad=True), "more": 1.0},
            "'more' must be a scalar tensor; got float",
        ),
    ],
)
def test_unusable_losses_are_refused(parts: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        fit(network(), lambda *_: parts, sampler, CONFIG, **QUICK)


def test_parts_must_keep_their_names() -> None:
    calls = []

    def loss(*given: Any) -> dict[str, Tensor]:
        calls.append(1)
        parts = noisy_loss(*given)
        return parts if len(calls) < 3 else {"loss": parts["loss"]}

    with pytest.raises(InputError, match="before it was"):
        fit(network(), loss, sampler, CONFIG, **QUICK)


@pytest.mark.parametrize("name", ["", "../toy", "a/b", ".hidden"])
def test_a_name_must_be_a_folder_s(name: str) -> None:
    with pytest.raises(InputError, match="folder's name"):
        fit(network(), noisy_loss, sampler, CONFIG, name=name)


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        fit(network().requires_grad_(False), noisy_loss, sampler, CONFIG, **QUICK)


def test_identity_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="identity must hold finite JSON"):
        fit(network(), noisy_loss, sampler, CONFIG, identity={"a": {1}}, **QUICK)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, value)
            for name in ("steps", "batch_size", "log_every")
            for value in (0, 1.0, True)
        ],
        *[(name, -1) for name in ("warmup_steps", "seed", "threads", "checkpoint_every")],
        *[("learning_rate", value) for value in (0, -1e-3, math.nan, math.inf, "1e-3", None)],
        *[("gradient_clip", value) for value in (0, -1.0, math.inf)],
        *[("ema_rate", value) for value in (0, 1.1, None)],
        ("ema_every", 1_000_001),
        ("ema_warmup", 1),
        ("weight_decay", -0.1),
        ("warmup_steps", 1_000_000),
        ("schedule", "linear"),
        ("precision", "fp16"),
        ("checkpoint_seconds", 0),
        ("validation_batches", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"TrainingConfig\.{field} must .*; got"):
        TrainingConfig(**{field: value})


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resume_on_a_gpu(tmp_path: Path) -> None:
    def loss(
        module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
    ) -> dict[str, Tensor]:
        kept = torch.rand(batch["x"].shape, generator=noise, device="cuda") > 0.2
        return {"loss": (module(batch["x"] * kept) - batch["y"]).square().mean()}

    run: Callable[..., TrainingResult] = partial(
        fit, loss_fn=loss, sampler=sampler, config=CONFIG, device="cuda", **QUICK
    )
    whole = run(network())
    with pytest.raises(StoppedError):
        run(network(), directory=tmp_path, callbacks=[stop_at(25)])
    assert_same(whole.weights, run(network(1), directory=tmp_path).weights)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    def send(record: Record) -> None:
        if record.step == 14:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[send], **QUICK)
    text = str(caught.value)
    assert f"stopped by {number.name} at step 14 of 40" in text
    assert "checkpoint.safetensors at step 14. The same call continues" in text
    assert signal.getsignal(number) == before
    whole = fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    resumed = fit(network(1), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    assert_same_result(whole, resumed)


def test_a_second_signal_of_the_same_kind_does_not_wait(tmp_path: Path) -> None:
    def send(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not interrupt")

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[send], **QUICK)
    assert str(caught.value) == ""


LONG = TrainingConfig(
    steps=2_500, batch_size=8, checkpoint_every=20, log_every=10, ema_every=5, threads=1
)


def slow_sampler(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
    time.sleep(0.0005)
    return sampler(batch_size, rng)


def session(directory: str) -> TrainingResult:
    """A training in a process that is killed."""
    return fit(network(), noisy_loss, slow_sampler, LONG, directory=directory, **QUICK)


def started(directory: str | Path, name: str) -> Path:
    return Path(directory) / f"{name}.started"


def saving_at_the_end_only(directory: str, name: str) -> TrainingResult:
    """A training that says when it runs, and has a checkpoint only if it is asked to end."""

    def tell(record: Record) -> None:
        started(directory, name).touch()

    config = differs(LONG, steps=10**6, checkpoint_every=None, checkpoint_seconds=1e6)
    options: dict[str, Any] = {"directory": directory, "name": name, "progress": False}
    return fit(network(), noisy_loss, slow_sampler, config, callbacks=[tell], **options)


def session_of_two(directory: str) -> None:
    fit_parallel({n: partial(saving_at_the_end_only, directory, n) for n in ("one", "two")})


@contextmanager
def process_of(call: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", f"import test_training; test_training.{call}({str(path)!r})"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def steps_done(path: Path) -> int:
    """Of the newest checkpoint, also at the moment when another one takes its place."""
    for name in ("checkpoint", "previous", "checkpoint"):
        try:
            return int(load_file(path / f"{name}.safetensors", kind="training")[1]["step"])
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return 0


def wait_for(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_training_that_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    chance = random.Random(0)
    reached = [0]
    for _ in range(10):
        with process_of("session", tmp_path) as process:
            wait_for(lambda: steps_done(tmp_path / "toy") > reached[-1])
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
        reached.append(steps_done(tmp_path / "toy"))
    assert reached == sorted(reached)
    assert reached[-1] < LONG.steps, "the kills must have hit a running training"
    resumed = session(str(tmp_path))
    whole = fit(network(), noisy_loss, sampler, LONG, **QUICK)
    assert_same_result(whole, resumed)
    assert not list((tmp_path / "toy").glob(".*"))  # what the kills left behind


@pytest.mark.slow
def test_ctrl_c_ends_a_process_with_a_message(tmp_path: Path) -> None:
    with process_of("session", tmp_path) as process:
        wait_for(lambda: steps_done(tmp_path / "toy") > 0)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=100)[1]
    assert process.returncode != 0
    assert "KeyboardInterrupt: training 'toy' stopped by SIGINT at step" in errors
    done = steps_done(tmp_path / "toy")
    assert f"checkpoint.safetensors at step {done:,}" in errors


# Side by side


def job(seed: int, directory: str | None = None) -> TrainingResult:
    return fit(
        network(seed),
        noisy_loss,
        sampler,
        CONFIG,
        directory=directory,
        **QUICK | {"name": str(seed)},
    )


def broken_job(directory: str) -> TrainingResult:
    wait_for(started(directory, "good").exists)
    raise TrainingError("this job fails")


def dying_job(directory: str) -> TrainingResult:
    wait_for(started(directory, "good").exists)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def interrupted_job(directory: str) -> TrainingResult:
    wait_for(started(directory, "good").exists)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError


@pytest.mark.slow
def test_side_by_side_equals_one_after_the_other() -> None:
    results = fit_parallel({"one": partial(job, 1), "two": partial(job, 2)})
    assert list(results) == ["one", "two"]
    assert_same_result(results["one"], job(1))
    assert_same_result(results["two"], job(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "error", "match"),
    [
        (broken_job, TrainingError, "this job fails"),
        (dying_job, WorkerError, r"training 'bad' died \(killed by SIGKILL\)"),
        (interrupted_job, KeyboardInterrupt, "in interrupted_job"),
    ],
)
def test_a_failing_job_ends_the_others_with_a_checkpoint(
    tmp_path: Path,
    failing: Callable[[str], TrainingResult],
    error: type[BaseException],
    match: str,
) -> None:
    directory = str(tmp_path)
    good = partial(saving_at_the_end_only, directory, "good")
    with pytest.raises(error, match=match) as caught:
        fit_parallel({"good": good, "bad": partial(failing, directory)})
    assert steps_done(tmp_path / "good") > 0
    if error is TrainingError:
        assert "in broken_job" in "".join(caught.value.__notes__)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_parent_saves_every_training(
    tmp_path: Path, number: signal.Signals
) -> None:
    with process_of("session_of_two", tmp_path) as process:
        wait_for(lambda: all(started(tmp_path, name).exists() for name in ("one", "two")))
        process.send_signal(number)
        errors = process.communicate(timeout=100)[1]  # the pipe closes when the last process ends
    assert process.returncode != 0
    if number != signal.SIGKILL:  # then the others notice by themselves
        assert f"trainings ['one', 'two'] stopped by {number.name}" in errors
    assert all(steps_done(tmp_path / name) > 0 for name in ("one", "two"))


def test_a_job_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(InputError, match=r"job 'one' cannot be sent.*functools\.partial"):
        fit_parallel({"one": lambda: None})


@pytest.mark.slow
def test_a_script_without_a_guard_ends_with_a_hint(tmp_path: Path) -> None:
    """The job is larger than a pipe, into which a write to a dead process would wait for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from mpd_gym.training import fit_parallel\n"
        "fit_parallel({'one': partial(len, bytes(2**20))})\n"
    )
    found = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 1
    assert "'one' died before it began (exit code 1)" in found.stderr
    assert "under if __name__ == '__main__':" in found.stderr.splitlines()[-1]
