"""Trainings that fail, and what is refused: the error names it, and what was saved stays."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import CONFIG, QUICK, assert_same_result, differs, network, noisy_loss, sampler

from mpd_gym import types
from mpd_gym.checkpoint import load_file, save_file
from mpd_gym.errors import CheckpointError, ConfigError, FileError, InputError, TrainingError
from mpd_gym.training import Record, TrainingConfig, TrainingResult, fit


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


@pytest.mark.fault(
    "Training",
    "a loss, gradient or weight that is not finite",
    "a typed error at its step; checkpoints are kept",
)
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
    with pytest.raises(TrainingError, match="nothing was saved without a directory"):
        fit(network(), poisoned, sampler, CONFIG, **QUICK)


@pytest.mark.fault("Training", "weights that overflow without a sign in the loss", "a typed error")
def test_weights_that_overflow_without_a_sign_in_the_loss_are_named() -> None:
    def loss(module: nn.Module, batch: Any, noise: torch.Generator) -> dict[str, Tensor]:
        return {"loss": sum(p.sum() for p in module.parameters()) * 1e-3}  # type: ignore[dict-item]

    module = nn.Linear(1, 1)
    config = differs(CONFIG, steps=1, ema_every=1, learning_rate=1e39)
    with pytest.raises(TrainingError, match="the average of 'weight' is not finite at step 1"):
        fit(module, loss, sampler, config, **QUICK)


@pytest.mark.fault("Training", "validation data that are not finite", "a typed error")
def test_non_finite_validation_data_are_named() -> None:
    def broken(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
        return {k: v * np.float32(np.nan) for k, v in sampler(batch_size, rng).items()}

    with pytest.raises(TrainingError, match="validation loss is nan at step 20"):
        fit(network(), noisy_loss, sampler, CONFIG, validation=broken, **QUICK)


@pytest.mark.fault(
    "Training",
    "a disk that fails during a checkpoint",
    "a typed error; the earlier checkpoints are whole",
)
def test_a_failing_disk_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(record: Record) -> None:
        if record.step == 21:
            monkeypatch.setattr(os, "fsync", full)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    kept = r"step 30: .*No space left.*the last checkpoint is .*checkpoint\.safetensors at step 20"
    with pytest.raises(CheckpointError, match=kept):
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[fill], **QUICK)
    monkeypatch.undo()
    steps = {p.name: load_file(p)[1]["step"] for p in tmp_path.glob("toy/*.safetensors")}
    assert steps == {"checkpoint.safetensors": 20, "previous.safetensors": 10}


@pytest.mark.fault(
    "Training",
    "a disk that is full during a training",
    "TensorBoard stops with a warning, a checkpoint with a typed error that names the last one; "
    "resumed, it ends bit-identical",
)
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(record: Record) -> None:
        size = {14: 10, 28: before[0]}.get(record.step)  # the disk is full from 14 to 28
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    run: Callable[..., TrainingResult] = partial(
        fit, loss_fn=noisy_loss, sampler=sampler, directory=tmp_path, callbacks=[limit], **QUICK
    )
    whole = fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    try:
        with pytest.warns(UserWarning, match="TensorBoard's file cannot be written .*goes on"):
            went_on = run(network(), config=differs(CONFIG, checkpoint_every=40))
        assert_same_result(whole, went_on)
        with (
            pytest.warns(UserWarning, match="TensorBoard's file"),
            pytest.raises(CheckpointError, match=r"step 20: .*too large.*at step 10"),
        ):
            run(network(), config=CONFIG, resume=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_file(tmp_path / "toy/checkpoint.safetensors")[1]["step"] == 10
    assert not list(tmp_path.glob("toy/.*"))
    assert_same_result(whole, run(network(1), config=CONFIG, callbacks=[]))


@pytest.mark.fault(
    "Training", "a folder without room for a checkpoint, or that is a file", "refused before a step"
)
def test_a_folder_that_takes_no_checkpoint_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(batch_size: int, rng: np.random.Generator) -> Any:
        raise AssertionError("a batch was drawn")

    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/toy/lock: cannot be locked.*another folder"):
        fit(network(), noisy_loss, never, CONFIG, directory=tmp_path / "file", **QUICK)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    with pytest.raises(FileError, match=r"0\.0 MB are needed, 0\.0 MB are free"):
        fit(network(), noisy_loss, never, CONFIG, directory=tmp_path, **QUICK)


@pytest.mark.fault("Training", "a checkpoint whose header was edited", "refused by name")
@pytest.mark.parametrize("name", ["config", "step", "seconds", "rng", "names"])
def test_an_edited_header_of_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
    path = tmp_path / "toy/checkpoint.safetensors"
    tensors, header = load_file(path)
    kept = {key: header[key] for key in ("config", "step", "seconds", "rng", "names")}
    kept |= {key: header[key] for key in ("identity", "device")}
    save_file(path, tensors, {**kept, name: [None]}, kind="training")
    with pytest.raises(CheckpointError, match=r"toy/checkpoint.safetensors.*resume=False"):
        fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)


@pytest.mark.fault("Training", "two trainings in one folder", "the second is refused by name")
def test_a_folder_holds_one_training_at_a_time(tmp_path: Path) -> None:
    refused = []

    def second(record: Record) -> None:
        with pytest.raises(ConfigError, match=r"toy: another training is in this folder; wait"):
            fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **QUICK)
        other = QUICK | {"name": "other"}
        refused.append(
            fit(network(), noisy_loss, sampler, CONFIG, directory=tmp_path, **other).step
        )

    whole = fit(network(), noisy_loss, sampler, CONFIG, **QUICK)
    first = fit(
        network(), noisy_loss, sampler, CONFIG, directory=tmp_path, callbacks=[second], **QUICK
    )
    assert_same_result(whole, first)
    assert set(refused) == {40}
    assert not (tmp_path / "toy/lock").exists()


@pytest.mark.fault(
    "Training", "a damaged checkpoint", "refused; the one before serves in its place"
)
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


@pytest.mark.fault("Training", "a name that leads out of the folder", "refused")
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


@pytest.mark.fault(
    "Training", "settings out of range or of the wrong type", "refused by name before any work"
)
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
