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

__all__ = ["enough_threads", "multiplications", "threads"]

# Multiplications of a call that keep one more thread busy; see docs/speed.md.
MULTIPLICATIONS_PER_THREAD = 2**28


def enough_threads(multiplications: int) -> int:
    """Threads that a call of so many multiplications is worth; at least 1."""
    return max(multiplications // MULTIPLICATIONS_PER_THREAD, 1)


def multiplications(network: TrajectoryDenoiser, rows: int) -> int:
    """Of a denoiser's call, roughly.

    Nearly all weights belong to the lowest level, so that their number times the length of the
    series there tells how much is computed.

    Args:
        network: Denoiser.
        rows: Trajectories in a call, those of an unconditional half included.
    """
    length = network.config.horizon // network.config.unet.downsampling
    return network.unet_weights * length * rows


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
