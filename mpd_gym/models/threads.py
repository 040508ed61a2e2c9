"""Threads by the size of a network's calls.

A network call is some hundred operators, between which all threads meet. Where an operator is
small, meeting costs more than a second thread saves, and far more where other programs use the
cores: each meeting then waits until a thread gets its core back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpd_gym.models.denoisers import TrajectoryDenoiser

__all__ = ["enough_threads", "threads"]

# Multiplications of a call that keep one more thread busy; see docs/results/sampling-speed.md.
MULTIPLICATIONS_PER_THREAD = 2**28


def enough_threads(network: TrajectoryDenoiser, rows: int) -> int:
    """Threads that calls of a network are worth, at least 1; PyTorch's own number on a GPU.

    Args:
        network: Denoiser. Nearly all of its weights belong to the lowest level, so that their
            number times the length of the series there tells how much a call computes.
        rows: Trajectories in a call, those of an unconditional half included.
    """
    weights = list(network.unet.parameters())
    if weights[0].device.type != "cpu":
        return torch.get_num_threads()
    length = network.config.horizon // network.config.unet.downsampling
    multiplications = sum(weight.numel() for weight in weights) * length * rows
    return max(int(multiplications // MULTIPLICATIONS_PER_THREAD), 1)


@contextmanager
def threads(most: int) -> Iterator[None]:
    """Compute with no more than so many threads, and with as many as before afterwards.

    Args:
        most: At least 1. A caller's lower number stands.
    """
    before = torch.get_num_threads()
    if before <= most:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)
