"""Training an autoencoder on recorded frames."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from mpd_gym.checkpoint import weights_digest
from mpd_gym.datasets import EpisodeSource, load_episodes, split_episodes
from mpd_gym.errors import check_integer, check_number
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.latent.frames import FramePairs, StackPairs, stack_shape
from mpd_gym.models.autoencoder import Autoencoder, AutoencoderConfig, autoencoder_loss
from mpd_gym.models.device import computes_bf16, find_device
from mpd_gym.training import LossFunction, TrainingConfig, fit

__all__ = ["EncoderConfig", "encoder_preset", "fit_autoencoder"]


@final
@dataclass(frozen=True)
class EncoderConfig:
    """Configuration of an autoencoder and its training.

    Attributes:
        latent_dim: Size of a latent (the paper's is 32).
        channels: See `AutoencoderConfig`.
        dynamics_hidden: See `AutoencoderConfig`.
        dynamics_weight: Weight of the latent-dynamics loss, see `autoencoder_loss`.
        training: Settings of the training.
        validation_fraction: Share of held-out episodes, in (0, 1).
        seed: Seed of the weights and of the choice of held-out episodes.

    Raises:
        ConfigError: If a value is out of range.
    """

    latent_dim: int = 32
    channels: tuple[int, ...] = (16, 32, 64, 64)
    dynamics_hidden: tuple[int, ...] = (256, 256)
    dynamics_weight: float = 0.2
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=10_000,
            batch_size=32,
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=200,
            validation_every=500,
        )
    )
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self.network(4, 2**10, 1)  # refuses wrong sizes
        check_number("dynamics_weight", self.dynamics_weight, 0)
        check_number(
            "validation_fraction", self.validation_fraction, 0, math.nextafter(1, 0), above=True
        )
        check_integer("seed", self.seed, 0)

    def network(self, frames: int, size: int, action_dim: int) -> AutoencoderConfig:
        """Sizes of the network for stacks of `frames` square frames and `action_dim` actions."""
        sizes = (frames, size, self.latent_dim, action_dim)
        return AutoencoderConfig(*sizes, self.channels, self.dynamics_hidden)


def encoder_preset(
    *, steps: int | None = None, seed: int = 0, precision: str | None = None
) -> EncoderConfig:
    """Return a configuration that trains on a laptop.

    Args:
        steps: Optimisation steps; None for the default.
        seed: Seed of weights, held-out episodes and batches.
        precision: See `TrainingConfig`; None is ``"bf16"`` if the CPU computes in it, which takes
            0.6 times the time.

    Raises:
        ConfigError: If a value is out of range.
    """
    base = EncoderConfig()
    training = replace(
        base.training if steps is None else base.training.with_steps(steps),
        seed=seed,
        precision=precision or ("bf16" if computes_bf16() else "fp32"),
    )
    return replace(base, training=training, seed=seed)


def fit_autoencoder(
    dataset: Any,
    config: EncoderConfig | None = None,
    *,
    directory: str | os.PathLike[str] | None = None,
    name: str = "encoder",
    device: str = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> ImageEncoder:
    """Train an encoder of stacked frames on reconstruction and latent dynamics together.

    A call with the same arguments and `directory` resumes an interrupted training.

    Args:
        dataset: Minari id or data set, episodes, or an `EpisodeSource`, with stacked frames.
        config: Network and training.
        directory: Folder for checkpoints and TensorBoard files; None keeps nothing.
        name: Name of the training and its folder.
        device: Device of the network and the batches; ``"auto"`` takes a GPU if there is one.
        resume: Continue from a checkpoint in `directory`.
        progress: Show a progress bar.

    Returns:
        The encoder, on the CPU; its history holds data, steps, seconds and held-out losses.

    Raises:
        DataError: If the data is damaged or holds no stacked frames.
        ConfigError: If frames are too small for the network, or the device does not exist.
        TrainingError: If the loss becomes non-finite.
        KeyboardInterrupt: After Ctrl-C, with everything saved.
    """
    config = config or EncoderConfig()
    source = dataset if isinstance(dataset, EpisodeSource) else load_episodes(dataset)
    training, held_out = (
        FramePairs(part) for part in split_episodes(source, config.validation_fraction, config.seed)
    )
    model = _untrained(source, training, config)
    told = {"data": source.name, "seed": config.seed, "dynamics_weight": config.dynamics_weight}
    identity = {
        "data": source.identity,
        "validation_fraction": config.validation_fraction,
        "initial_weights": weights_digest(model),
    }
    result = fit(
        model,
        _loss(config.dynamics_weight),
        training.sample,
        config.training,
        name=name,
        validation=held_out.sample,
        directory=directory,
        device=find_device(device),
        resume=resume,
        identity={**told, **identity},
        progress=progress,
    )
    losses = {part: float(result.validation[part][-1]) for part in ("reconstruction", "dynamics")}
    effort = {"steps": result.step, "seconds": round(result.seconds, 1), "held_out": losses}
    history = {**told, "precision": config.training.precision, **effort}
    return ImageEncoder(model.cpu(), history)


def _untrained(source: EpisodeSource, training: FramePairs, config: EncoderConfig) -> Autoencoder:
    """Return a new network for the frames and actions of the data."""
    frames, size, _ = stack_shape(source)
    action_dim = source.metadata["action_space"].shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Autoencoder(config.network(frames, size, action_dim))
    # a sixth faster in fp32, a quarter in bf16
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    actions = torch.from_numpy(training.actions)
    model.set_action_statistics(actions.mean(0), actions.std(0, correction=0))
    return model


def _loss(dynamics_weight: float) -> LossFunction:
    """Return the loss function for `fit`."""

    def loss(module: nn.Module, batch: StackPairs, _: torch.Generator) -> Mapping[str, Tensor]:
        assert isinstance(module, Autoencoder)
        pairs: Any = batch  # arrays are tensors here
        return autoencoder_loss(module, pairs.frames, pairs.actions, dynamics_weight)

    return loss
