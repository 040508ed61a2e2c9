"""Denoisers for inference on a GPU: one CUDA graph for each shape of a call.

A network call is some two hundred kernels of a few microseconds, which a CPU cannot start as fast
as a GPU runs them. Recorded once as a graph, they are started together; nothing in a call waits for
the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mpd_gym.models.temporal_unet import Modulation

__all__ = ["GraphedDenoiser"]

MAX_GRAPHS = 8  # each holds memory for all activations of a call
WARM_UP = 3  # calls before recording, in which libraries choose and load their kernels


class _Network(Protocol):
    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor: ...

    def modulations(self, embedding: Tensor) -> list[Modulation]: ...

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor: ...


@dataclass(frozen=True)
class _Recording:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # trajectory, then scale and bias of each modulation
    output: Tensor


@final
class GraphedDenoiser:
    """A denoiser whose `denoise` replays CUDA graphs.

    Args:
        network: Denoiser on a GPU, such as a `PackedDenoiser`.
    """

    def __init__(self, network: _Network) -> None:
        self._network = network
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory; once for each reverse pass, without a graph."""
        return self._network.embed(k, initial, conditions, present)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Compute all modulations; once for each reverse pass, without a graph."""
        return self._network.modulations(embedding)

    @torch.no_grad()
    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as the network does."""
        inputs = (trajectory, *(part for pair in modulations for part in pair))
        shapes = tuple(part.shape for part in inputs)
        recording = self._recordings.get(shapes)
        if recording is None:
            while len(self._recordings) >= MAX_GRAPHS:
                self._recordings.pop(next(iter(self._recordings)))
            recording = self._recordings[shapes] = _record(self._network, inputs)
        for place, value in zip(recording.inputs, inputs, strict=True):
            place.copy_(value)
        recording.graph.replay()
        return recording.output.clone()


def _record(network: _Network, inputs: Sequence[Tensor]) -> _Recording:
    trajectory, *parts = (value.clone() for value in inputs)
    modulations = list(zip(parts[::2], parts[1::2], strict=True))
    aside = torch.cuda.Stream(trajectory.device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(trajectory.device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            network.denoise(trajectory, modulations)
    torch.cuda.current_stream(trajectory.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network.denoise(trajectory, modulations)
    return _Recording(graph, (trajectory, *parts), output)
