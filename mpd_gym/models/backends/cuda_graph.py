"""Denoisers for inference on a GPU: one CUDA graph for each shape of a call.

A network call is some two hundred kernels of a few microseconds, which a CPU cannot start as fast
as a GPU runs them. Recorded once as a graph, they are started together; nothing in a call waits for
the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mpd_gym.models.backends.interface import InferenceNetwork
from mpd_gym.models.temporal_unet import Modulation

__all__ = ["GraphedDenoiser"]

MAX_GRAPHS = 8  # each holds memory for all activations of a call
WARM_UP = 3  # calls before recording, in which libraries choose and load their kernels


@dataclass(frozen=True)
class _Recording:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # trajectory, scales and biases
    output: Tensor


@final
class GraphedDenoiser:
    """A denoiser whose `denoise` replays CUDA graphs.

    Args:
        network: Denoiser on a GPU. Its weights must stay where they are in memory.
    """

    def __init__(self, network: InferenceNetwork) -> None:
        self._network = network
        self._channels: list[int] = []  # of each modulation
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    @torch.no_grad()
    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory; once for each reverse pass, without a graph."""
        return self._network.embed(k, initial, conditions, present)

    @torch.no_grad()
    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Compute all modulations side by side, so that a call copies two tensors into a graph."""
        scales, biases = zip(*self._network.modulations(embedding), strict=True)
        self._channels = [part.shape[-1] for part in scales]
        return [(torch.cat(scales, dim=-1), torch.cat(biases, dim=-1))]

    @torch.no_grad()
    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as the network does, from `modulations` of this object."""
        inputs = [trajectory, *modulations[0]]
        shapes = tuple(part.shape for part in inputs)
        recording = self._recordings.get(shapes)
        if recording is None:
            while len(self._recordings) >= MAX_GRAPHS:
                self._recordings.pop(next(iter(self._recordings)))
            recording = self._recordings[shapes] = self._record(inputs)
        torch._foreach_copy_(recording.inputs, inputs)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, given: Sequence[Tensor]) -> _Recording:
        inputs = [value.clone() for value in given]
        trajectory, *joined = inputs
        scales, biases = (torch.split(part, self._channels, dim=-1) for part in joined)
        modulations = list(zip(scales, biases, strict=True))
        aside = torch.cuda.Stream(trajectory.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(trajectory.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._network.denoise(trajectory, modulations)
        torch.cuda.current_stream(trajectory.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._network.denoise(trajectory, modulations)
        return _Recording(graph, inputs, output)
