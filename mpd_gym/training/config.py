"""Configuration of a training, and its schedules of learning rate and averaging."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from mpd_gym.errors import ConfigError, check_integer

__all__ = [
    "TrainingConfig",
    "averaging_rate",
    "check_continues",
    "check_equal",
    "learning_rate_factor",
]

_SCHEDULES = ("constant", "cosine")
_PRECISIONS = ("fp32", "bf16")
_AT_LEAST_ONE = (
    *("steps", "batch_size", "ema_every", "validation_every", "validation_batches", "log_every"),
    *("checkpoint_every", "threads"),
)
_REMEDY = "Restore it, choose another name or directory, or start again with resume=False"
_MAY_BE_NONE = {"gradient_clip", "checkpoint_every", "threads"}
# Fields that a resumed training may change.
_FREE = {
    *("validation_every", "validation_batches", "checkpoint_every", "checkpoint_seconds"),
    *("log_every", "threads"),
}


@final
@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `fit`; the defaults are the MPDiffuser authors', except `ema_warmup`.

    Attributes:
        steps: Total optimisation steps, also over interruptions.
        batch_size: B, windows in each step.
        learning_rate: Peak learning rate of Adam.
        weight_decay: Decoupled weight decay (AdamW); 0 is plain Adam.
        gradient_clip: Largest Euclidean norm of the gradient; None does not clip.
        schedule: ``"constant"``, or ``"cosine"`` decay to 0 at `steps`.
        warmup_steps: Steps of the initial linear rise of the learning rate.
        ema_rate: Share of the new weights in each update of the moving average, in (0, 1].
        ema_every: Steps between two updates of the moving average.
        ema_warmup: Start the average with larger shares, see `averaging_rate`; False keeps the
            authors' fixed share.
        validation_every: Steps between two validations; the last step always validates.
        validation_batches: Batches of each validation, always the same ones.
        checkpoint_every: Steps between two checkpoints; with None only `checkpoint_seconds` counts.
        checkpoint_seconds: Longest time between two checkpoints; the last step always writes one.
        log_every: Steps between two records of the training loss, each a mean over these steps.
        seed: Seed of batches and noise.
        precision: ``"fp32"``, or ``"bf16"`` for autocast of the loss; weights stay float32. On a
            CPU that does not multiply bfloat16, denoisers in C compute in float32 all the same.
        threads: torch threads of this process during training; None does not change them.

    Raises:
        ConfigError: If a value is out of range.
    """

    steps: int = 1_000_000
    batch_size: int = 64
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    gradient_clip: float | None = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    ema_rate: float = 0.005
    ema_every: int = 10
    ema_warmup: bool = True
    validation_every: int = 1_000
    validation_batches: int = 8
    checkpoint_every: int | None = None
    checkpoint_seconds: float = 120.0
    log_every: int = 50
    seed: int = 0
    precision: str = "fp32"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            self._check_integer(name, 1)
        for name in ("warmup_steps", "seed"):
            self._check_integer(name, 0)
        for name in ("learning_rate", "gradient_clip", "ema_rate", "checkpoint_seconds"):
            self._check_number(name, "above 0", math.ulp(0.0))
        self._check_number("weight_decay", "of at least 0", 0.0)
        self._check("ema_rate", self.ema_rate <= 1, "be at most 1")
        self._check("ema_warmup", isinstance(self.ema_warmup, bool), "be True or False")
        self._check("schedule", self.schedule in _SCHEDULES, f"be one of {_SCHEDULES}")
        self._check("precision", self.precision in _PRECISIONS, f"be one of {_PRECISIONS}")
        short = f"less than steps={self.steps}"
        self._check("warmup_steps", self.warmup_steps < self.steps, f"be {short}")
        reason = f"be at most steps={self.steps}, or the average never leaves the initial weights"
        self._check("ema_every", self.ema_every <= self.steps, reason)

    def with_steps(self, steps: int) -> TrainingConfig:
        """Return the settings for another number of steps, with a warm-up that fits.

        Raises:
            ConfigError: If `steps` is not a whole number of at least 1.
        """
        check_integer("steps", steps, 1)
        warmup, every = min(self.warmup_steps, steps - 1), min(self.ema_every, steps)
        return dataclasses.replace(self, steps=steps, warmup_steps=warmup, ema_every=every)

    def _check_integer(self, name: str, lowest: int) -> None:
        value = getattr(self, name)
        valid = (type(value) is int and lowest <= value < 2**63) or (
            value is None and name in _MAY_BE_NONE
        )
        self._check(name, valid, f"be an integer of at least {lowest}")

    def _check_number(self, name: str, words: str, lowest: float) -> None:
        value = getattr(self, name)
        valid = type(value) in (int, float) and lowest <= value <= sys.float_info.max
        valid = valid or (value is None and name in _MAY_BE_NONE)
        self._check(name, valid, f"be a finite number {words}")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ConfigError(f"TrainingConfig.{name} must {expected}; got {getattr(self, name)!r}")


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the peak learning rate in optimisation step `step`, counted from 0.

    It rises linearly over `warmup_steps`, then stays 1, or falls along half a cosine wave to 0 at
    `steps` (Loshchilov and Hutter 2017, without restarts).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def averaging_rate(config: TrainingConfig, update: int) -> float:
    """Share of the new weights in update `update` (from 0) of the moving average.

    With the fixed rate r, the random initialisation still has weight (1 - r)^n after n updates: 8 %
    at r = 0.005 after 5,000 steps. With `ema_warmup` the share is max(r, 9 / (10 + n)). It forgets
    the initialisation like n^-9 and averages over about the last tenth of the training (a
    power-function average with exponent 8, relative width 0.09; Karras et al. 2024, section 3.1),
    until the fixed rate takes over at n = 9 / r - 10.
    """
    if not config.ema_warmup:
        return config.ema_rate
    return max(config.ema_rate, 9 / (10 + update))


def check_continues(
    config: TrainingConfig, saved: Mapping[str, Any], step: int, source: str
) -> None:
    """Check that `config` continues a saved training.

    `steps` may change if the learning rate is constant; a cosine with another end would jump.

    Args:
        config: Present configuration.
        saved: Fields of the saved configuration.
        step: Steps done.
        source: File of the training, for messages.

    Raises:
        ConfigError: Naming the first field that differs.
    """
    free = _FREE if config.schedule == "cosine" else {*_FREE, "steps"}
    for name, value in dataclasses.asdict(config).items():
        if name not in free and saved.get(name) != value:
            check_equal(f"TrainingConfig.{name}", value, saved.get(name), source)
    if config.steps < step:
        raise ConfigError(
            f"TrainingConfig.steps is {config.steps}, but {source} has done {step}. {_REMEDY}"
        )


def check_equal(name: str, now: Any, then: Any, source: str) -> None:
    """Check that JSON values are those of a saved training.

    Args:
        name: Of the values, for messages.
        now: Present values.
        then: Saved values.
        source: File of the training, for messages.

    Raises:
        ConfigError: Naming the first value that differs, in mappings and lists of any depth.
    """
    if isinstance(now, dict) and isinstance(then, dict):
        for key in {**now, **then}:
            if key in now and key not in then:
                raise ConfigError(
                    f"{source} does not tell its {name}.{key}: an earlier version of mpd_gym, or "
                    f"another call, wrote it, so it may be of another training. {_REMEDY}"
                )
            check_equal(f"{name}.{key}", now.get(key), then[key], source)
    elif isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for index, (one, other) in enumerate(zip(now, then, strict=True)):
            check_equal(f"{name}[{index}]", one, other, source)
    elif now != then:
        raise ConfigError(f"{name} is {now!r}, but {source} was trained with {then!r}. {_REMEDY}")
