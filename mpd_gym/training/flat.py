"""All parameters of a module in one piece of memory, for one operation instead of many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import InputError

__all__ = ["FlatParameters"]

_ALIGNMENT = 16  # numbers; a cache line of float32


@final
class FlatParameters:
    """Parameters and their gradients as views of one vector each.

    The vectors hold the parameters in sequence, each in the order of its strides, with zeros in the
    gaps that align them.

    Args:
        parameters: Named, on one device and of one dtype. Until `release`, each is a view of
            `values` and its ``grad`` a view of `gradients`.

    Attributes:
        values: ``[P]``, a parameter for an optimiser; its ``grad`` is `gradients`.
        gradients: ``[P]``; 0 for parameters that the loss does not depend on.

    Raises:
        InputError: If the parameters are of several dtypes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        first, *others = self._parameters.values()
        if any(other.dtype != first.dtype for other in others):
            found = sorted({str(parameter.dtype) for parameter in self._parameters.values()})
            raise InputError(f"module: expected parameters of one dtype; got {found}")
        # empty_like keeps strides without gaps and makes others contiguous
        self._strides = {n: torch.empty_like(p).stride() for n, p in self._parameters.items()}
        self._offsets: dict[str, int] = {}
        total = 0
        for name, parameter in self._parameters.items():
            self._offsets[name] = total
            total += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.values = nn.Parameter(first.new_zeros(total))
        self.gradients = torch.zeros_like(self.values.data)
        self.values.grad = self.gradients
        places, gradients = self.views(self.values.data), self.views(self.gradients)
        for name, parameter in self._parameters.items():
            places[name].copy_(parameter.data)
            parameter.data = places[name]
            parameter.grad = gradients[name]
        self._views = list(gradients.values())

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """View parts of a vector ``[P]`` with the names and shapes of the parameters."""
        return {
            name: vector.as_strided(parameter.shape, self._strides[name], self._offsets[name])
            for name, parameter in self._parameters.items()
        }

    def gather(self, loss: Tensor) -> None:
        """Compute the gradients of a loss; zeros for parameters it does not depend on."""
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        views, gradients = [], []
        for view, gradient in zip(self._views, found, strict=True):
            if gradient is None:
                view.zero_()
            else:
                views.append(view)
                gradients.append(gradient)
        if views:
            torch._foreach_copy_(views, gradients)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy named tensors into a new vector ``[P]``; the inverse of `views`."""
        vector = torch.zeros_like(self.gradients)
        for name, view in self.views(vector).items():
            view.copy_(tensors[name])
        return vector

    def release(self) -> None:
        """Give every parameter its own contiguous memory, and no gradient."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            parameter.grad = None
