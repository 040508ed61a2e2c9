"""What every backend is: the parts of `TrajectoryDenoiser`, which is one itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from mpd_gym.models.temporal_unet import Modulation

__all__ = ["InferenceNetwork", "TrainingForward"]

# `TrajectoryDenoiser.forward`: (τ^k [B, H, D], k [B], initial, conditions, present) -> [B, H, D'],
# with gradients of its parameters.
TrainingForward: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class InferenceNetwork(Protocol):
    """What a reverse pass calls; see `TrajectoryDenoiser` for shapes."""

    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory; once for each reverse pass."""
        ...

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Compute what `denoise` needs of an embedding; once for each reverse pass."""
        ...

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict from noisy trajectories and modulations of this network."""
        ...
