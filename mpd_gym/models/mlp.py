"""Multilayer MLPs from vectors to vectors: inverse dynamics, behaviour cloning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import check_integer, check_widths

__all__ = ["MLP", "MLPConfig", "mlp_layers"]


def mlp_layers(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers from ``sizes[0]`` columns to ``sizes[-1]``, with swish between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


@final
@dataclass(frozen=True)
class MLPConfig:
    """Sizes of a MLP.

    Attributes:
        inputs: Columns in.
        outputs: Columns out.
        hidden: Widths of the hidden layers; the default is that of the authors' inverse dynamics.

    Raises:
        ConfigError: If a size is below 1.
    """

    inputs: int
    outputs: int
    hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("inputs", "outputs"):
            check_integer(name, getattr(self, name), 1)
        check_widths("hidden", self.hidden)


@final
class MLP(nn.Module):
    """MLP on normalised vectors.

    Args:
        config: Sizes; kept as ``config``.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.network = mlp_layers((config.inputs, *config.hidden, config.outputs))

    def forward(self, *parts: Tensor) -> Tensor:
        """Map vectors, given in parts that are laid side by side, to ``[…, outputs]``."""
        output: Tensor = self.network(torch.cat(parts, dim=-1))
        return output
