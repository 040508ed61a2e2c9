"""Convolutions along time of series ``[L, M, C]``, forward and backward, for training on a CPU.

In float32 a convolution is one product of matrices for each of its taps, from which steps outside
of the series are left out. In bfloat16, where such products would round each term, and where the
CPU `multiplies_slowly`, it is one of images of height L and width M.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpd_gym.models.backends.cpu import multiplies_slowly

__all__ = ["Geometry", "kernel", "read"]


def kernel(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights ``[C, C_in, k]`` as ``[C, k, C_in]``; no copy of those in float32 after `lay_out`."""
    return weight.to(dtype).transpose(1, 2).contiguous()


def read(module: nn.Module) -> tuple[Any, Geometry]:
    """Return the convolution in a module, and how it moves; a padding may stand before or after."""
    pads = [part for part in module.modules() if isinstance(part, nn.ConstantPad1d)]
    convolution: Any = next(part for part in module.modules() if hasattr(part, "kernel_size"))
    transposed = isinstance(convolution, nn.ConvTranspose1d)
    before, after = pads[0].padding if pads else 2 * convolution.padding
    if pads and transposed:  # cuts off
        before, after = -before, -after
    return convolution, Geometry(convolution.stride[0], (before, after), transposed)


@final
class Geometry(NamedTuple):
    """How a convolution moves along time; kernels are those of `kernel`.

    A transposed convolution is the transpose of the map that the same kernel's convolution is, so
    one of the two is forward and the other one backward; its padding is cut off at the end.
    """

    stride: int
    padding: tuple[int, int]
    transposed: bool

    def forward(self, series: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Convolve ``[L, M, C_in]`` to ``[L', M, C]``."""
        if _is_image(series):
            return self._forward_image(series, kernel, bias)
        size, length = kernel.shape[1], len(series)
        if self.transposed:
            length = (length - 1) * self.stride + size - sum(self.padding)
            return _scatter(series, kernel, _taps(self, size, length), length, bias)
        taps = _taps(self, size, length)
        return _gather(series, kernel, taps, taps.steps, bias)

    def backward(
        self, gradient: Tensor, series: Tensor, kernel: Tensor, wanted: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of `forward`: of series, if wanted, of weights ``[C, C_in, k]`` and of bias."""
        d_bias = gradient.sum((0, 1), dtype=torch.float32)
        gradient = gradient.to(series.dtype).contiguous()
        if _is_image(series):
            return *self._backward_image(gradient, series, kernel, wanted), d_bias
        taps = _taps(self, kernel.shape[1], len(gradient if self.transposed else series))
        transpose = _gather if self.transposed else _scatter
        d_series = transpose(gradient, kernel, taps, len(series), None) if wanted else None
        outer, inner = (series, gradient) if self.transposed else (gradient, series)
        d_kernel = torch.empty_like(kernel) if taps.all else torch.zeros_like(kernel)
        parts = d_kernel.unbind(1)
        for tap, steps, places in taps.moves:
            torch.mm(_rows(outer, steps).t(), _rows(inner, places), out=parts[tap])
        return d_series, d_kernel.transpose(1, 2), d_bias

    def _forward_image(self, series: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Convolve as images of height L and width M, whose kernels sum in float32."""
        image = _image(series if self.transposed else self._padded(series))
        function = functional.conv_transpose2d if self.transposed else functional.conv2d
        stride, padding = (self.stride, 1), (self._even, 0)
        output = function(image, _upright(kernel), bias.to(image.dtype), stride, padding)
        found = output[0].permute(1, 2, 0)
        return (self._cut(found) if self.transposed else found).contiguous()

    def _backward_image(
        self, gradient: Tensor, series: Tensor, kernel: Tensor, wanted: bool
    ) -> tuple[Tensor | None, Tensor]:
        if self.transposed:
            gradient = self._padded(gradient)
        else:
            series = self._padded(series)
        d_image, d_kernel, _ = torch.ops.aten.convolution_backward(
            _image(gradient),
            _image(series),
            _upright(kernel),
            None,
            (self.stride, 1),
            (self._even, 0),
            (1, 1),
            self.transposed,
            (0, 0),
            1,
            (wanted, True, False),
        )
        d_kernel = d_kernel.squeeze(3).float()
        if not wanted:
            return None, d_kernel
        d_series = d_image[0].permute(1, 2, 0)
        return (d_series if self.transposed else self._cut(d_series)).contiguous(), d_kernel

    @property
    def _even(self) -> int:
        """Padding that both ends have; images get the rest beforehand."""
        return min(self.padding)

    def _padded(self, series: Tensor) -> Tensor:
        before, after = (ends - self._even for ends in self.padding)
        if not before + after:
            return series
        return torch.constant_pad_nd(series, (0, 0, 0, 0, before, after))

    def _cut(self, series: Tensor) -> Tensor:
        """Undo `_padded`."""
        before, after = (ends - self._even for ends in self.padding)
        return series[before : len(series) - after]


@final
class _Taps(NamedTuple):
    """What the taps of a kernel move.

    Attributes:
        moves: (tap, steps of the convolution's output, places of its input that these read), the
            longest first.
        steps: Of the output.
        all: Whether every tap moves something.
    """

    moves: tuple[tuple[int, slice, slice], ...]
    steps: int
    all: bool


@functools.cache
def _taps(geometry: Geometry, size: int, length: int) -> _Taps:
    """Taps of a kernel of `size` on a convolution's input of `length`."""
    stride, (before, after) = geometry.stride, geometry.padding
    steps = (length + before + after - size) // stride + 1
    found = []
    for tap in range(size):
        offset = tap - before
        first = max(0, -(offset // stride))
        last = min(steps - 1, (length - 1 - offset) // stride)
        if first <= last:
            places = slice(first * stride + offset, last * stride + offset + 1, stride)
            found.append((tap, slice(first, last + 1, 1), places))
    found.sort(key=lambda move: move[1].start - move[1].stop)
    return _Taps(tuple(found), steps, len(found) == size)


def _gather(
    series: Tensor, kernel: Tensor, taps: _Taps, length: int, bias: Tensor | None
) -> Tensor:
    """Convolve ``[L, M, C_in]`` to ``[length, M, C]``."""
    matrices = kernel.permute(1, 2, 0).unbind()
    moves = [(steps, places, matrices[tap]) for tap, steps, places in taps.moves]
    return _sum_of_products(series, moves, length, bias)


def _scatter(
    series: Tensor, kernel: Tensor, taps: _Taps, length: int, bias: Tensor | None
) -> Tensor:
    """Transpose of the convolution, ``[L, M, C]`` to ``[length, M, C_in]``."""
    matrices = kernel.unbind(1)
    moves = [(places, steps, matrices[tap]) for tap, steps, places in taps.moves]
    return _sum_of_products(series, moves, length, bias)


def _sum_of_products(
    series: Tensor, moves: list[tuple[slice, slice, Tensor]], length: int, bias: Tensor | None
) -> Tensor:
    """Add `bias` and, for each move, what is at its second place times its matrix at its first."""
    (target, source, matrix), *others = moves
    rows, channels = series.shape[1], matrix.shape[1]
    if target == slice(0, length, 1):
        first = _rows(series, source)
        product = first @ matrix if bias is None else torch.addmm(bias, first, matrix)
        output = product.view(length, rows, channels)
    else:
        others = moves
        output = series.new_zeros(length, rows, channels)
        if bias is not None:
            output += bias
    for target, source, matrix in others:
        if target.step == 1:
            _rows(output, target).addmm_(_rows(series, source), matrix)
        else:
            part = output[target]
            part += (_rows(series, source) @ matrix).view(part.shape)
    return output


def _is_image(series: Tensor) -> bool:
    """Whether a series is convolved as images."""
    return series.dtype != torch.float32 or multiplies_slowly()


def _rows(series: Tensor, steps: slice) -> Tensor:
    """Some steps of ``[L, M, C]`` as rows ``[…, C]``: a view where they are consecutive."""
    return series[steps].reshape(-1, series.shape[-1])


def _image(series: Tensor) -> Tensor:
    """Show ``[L, M, C]`` as ``[1, C, L, M]``, channels last in memory."""
    length, rows, channels = series.shape
    strides = (series.numel(), 1, rows * channels, channels)
    return series.contiguous().as_strided((1, channels, length, rows), strides)


def _upright(kernel: Tensor) -> Tensor:
    """View contiguous ``[C, k, C_in]`` as ``[C, C_in, k, 1]``, channels last in memory."""
    outputs, size, inputs = kernel.shape
    strides = (size * inputs, 1, inputs, inputs)
    return kernel.as_strided((outputs, inputs, size, 1), strides)
