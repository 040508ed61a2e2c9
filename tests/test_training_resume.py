"""Trainings that go on where they were: the same bits, and which settings may change."""

from __future__ import annotations

import dataclasses
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

from mpd_gym.checkpoint import load_file
from mpd_gym.errors import CheckpointError, ConfigError
from mpd_gym.training import Record, TrainingConfig, TrainingResult, fit


class StoppedError(Exception):
    """Raised by a test in the middle of a training."""


def stop_at(step: int) -> Callable[[Record], None]:
    def callback(record: Record) -> None:
        if record.step >= step:
            raise StoppedError

    return callback


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


@pytest.mark.cuda
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
    go_on(path, CONFIG)
    return path


def go_on(path: Path, config: TrainingConfig) -> None:
    fit(network(), noisy_loss, sampler, config, directory=path, identity={"data": "a"}, **QUICK)


@pytest.mark.fault("Training", "a resumed training with a changed setting", "refused by name")
@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_changed_setting_is_refused_by_name(done: Path, name: str) -> None:
    config = differs(CONFIG, **{name: CHANGED[name]})
    with pytest.raises(ConfigError, match=rf"TrainingConfig\.{name} is .*resume=False"):
        go_on(done, config)


def test_free_settings_may_change(tmp_path: Path) -> None:
    fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    config = differs(CONFIG, **FREE)
    assert fit(network(), noisy_loss, sampler, config, directory=tmp_path, **QUICK).step == 50


@pytest.mark.fault("Training", "fewer steps than are done", "refused")
def test_fewer_steps_than_done_are_refused(done: Path) -> None:
    config = differs(CONFIG, steps=30)
    with pytest.raises(ConfigError, match=r"TrainingConfig\.steps is 30, but .* has done 40"):
        go_on(done, config)


def test_a_cosine_cannot_be_extended(tmp_path: Path) -> None:
    config = differs(CONFIG, schedule="cosine")
    fit(network(), noisy_loss, sampler, config, directory=tmp_path, **QUICK)
    longer = differs(config, steps=80)
    with pytest.raises(ConfigError, match=r"TrainingConfig\.steps is 80, but .* with 40"):
        fit(network(), noisy_loss, sampler, longer, directory=tmp_path, **QUICK)


@pytest.mark.fault("Training", "a resumed training with another network or data", "refused")
def test_other_data_or_module_are_refused(done: Path) -> None:
    run: Callable[..., TrainingResult] = partial(
        fit, loss_fn=noisy_loss, sampler=sampler, config=CONFIG, directory=done, **QUICK
    )
    with pytest.raises(ConfigError, match=r"identity.data is 'b', but .* with 'a'"):
        run(network(), identity={"data": "b"})
    with pytest.raises(CheckpointError, match=r"'weights/weight' is missing"):
        run(nn.Linear(3, 1), identity={"data": "a"})
