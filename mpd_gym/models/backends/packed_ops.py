"""Layers of the inference networks: weights packed once, time series with time first.

A batch of time series is ``[L, M, C]``: a convolution along time then is one of an image of height
L and width M, which fills the machine's registers for any batch, and a normalisation of each series
is one of M · C channels of a single image, modulation included.

PyTorch packs the weights of a convolution anew at every call. The oneDNN operators that its own
compiler uses take packed ones, but are private: `packs` says whether they are there and work;
without them the public operators do the same, more slowly.
"""

from __future__ import annotations

import functools
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from mpd_gym.models.backends.cpu import multiplies_slowly

__all__ = ["PRODUCT_ROWS", "Convolution", "modulated_norm", "packs"]

# Up to so many series a convolution is one product with the windows of all steps, and above it an
# image convolution unless it is small; measured for 32 … 1024 channels in float32 and bfloat16.
PRODUCT_ROWS = 4
TYPICAL_ROWS = 16  # size that image kernels are packed for; they serve any other as well
# Up to so many multiplications a product with windows is faster than an image convolution, too: a
# call of the latter takes 30 to 40 µs whatever its size. Measured for 8 and 16 series of the laptop
# preset.
SMALL_PRODUCT = 2**23
# Up to so many a plain product is faster than one of packed weights in float32, whose call takes
# 10 µs more; `SMALL_PRODUCT` takes its place unless the CPU `multiplies_slowly`.
TINY_PRODUCT = 2**20
# Below so many channels per group the bfloat16 normalisation of a CPU is slower than in float32.
MIN_GROUP_BF16 = 16


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether the oneDNN operators with packed weights are there and compute what they should."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 16), (32, 16), (32,))
    )
    image, kernel = _image(rows[:, None]), weight[:, :, None, None]
    expected = functional.linear(rows, weight, bias)
    try:
        found = (
            _product(rows, _pack_product(weight, 3), bias),
            _convolve(image, _pack_image(kernel, image, (0, 0), 1), bias, (0, 0), 1)[
                0, :, :, 0
            ].t(),
        )
    except (AttributeError, RuntimeError):  # renamed, removed, or of another signature
        return False
    return all(torch.allclose(result, expected, atol=0.1, rtol=0.1) for result in found)


@final
class Convolution:
    """Convolution along time of series ``[L, M, C_in]``, zeros before and after.

    Args:
        weight: ``[C, C_in, k]``.
        bias: ``[C]``.
        padding: Zeros before and after.
        stride: Steps between two outputs.
        dtype: Of series and weights.
        packed: Whether to use packed weights; see `packs`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        padding: tuple[int, int],
        stride: int,
        dtype: torch.dtype,
        packed: bool,
    ) -> None:
        self._weight = weight.detach().to(dtype)
        self._bias = bias.detach().to(dtype)
        self._shape = self._weight.shape
        self._padding = padding
        self._stride = stride
        self._packed = packed
        self._tiny = TINY_PRODUCT if multiplies_slowly() else SMALL_PRODUCT

    def __call__(self, series: Tensor) -> Tensor:
        """Map ``[L, M, C_in]`` to ``[L', M, C]``."""
        outputs, channels, size = self._shape
        rows = series.shape[1]
        work = series.numel() // self._stride * size * outputs
        if size == 1 or rows <= PRODUCT_ROWS or work <= SMALL_PRODUCT:
            windows = series if size == 1 else self._windows(series)
            flat = windows.reshape(-1, size * channels)
            return self._product(flat).view(windows.shape[0], rows, outputs)
        return self._image(series)

    def _windows(self, series: Tensor) -> Tensor:
        """Overlapping windows, a view, ``[L', M, k, C_in]``."""
        padded = torch.constant_pad_nd(series, (0, 0, 0, 0, *self._padding))
        length, rows, channels = padded.shape
        size, step = self._shape[-1], rows * channels
        shape = ((length - size) // self._stride + 1, rows, size, channels)
        return padded.as_strided(shape, (self._stride * step, channels, step, 1))

    def _product(self, rows: Tensor) -> Tensor:
        tiny = rows.dtype == torch.float32 and rows.numel() * self._shape[0] <= self._tiny
        if tiny or not self._packed:
            return torch.addmm(self._bias, rows, self._matrix)
        return _product(rows, self._packed_matrix, self._bias)

    def _image(self, series: Tensor) -> Tensor:
        before, after = self._padding
        if before != after:
            series = torch.constant_pad_nd(series, (0, 0, 0, 0, before, after))
        padding = (before, 0) if before == after else (0, 0)
        if self._packed:
            weight = self._packed_kernel
            image = _convolve(_image(series), weight, self._bias, padding, self._stride)
        else:
            stride = (self._stride, 1)
            image = functional.conv2d(_image(series), self._kernel, self._bias, stride, padding)
        return _series(image)

    # Each is made at its first use: most networks see either small or large batches.

    @functools.cached_property
    def _matrix(self) -> Tensor:
        return self._weight.permute(2, 1, 0).reshape(-1, self._shape[0]).contiguous()

    @functools.cached_property
    def _packed_matrix(self) -> Tensor:
        weight = self._weight.transpose(1, 2).reshape(self._shape[0], -1).contiguous()
        return _pack_product(weight, PRODUCT_ROWS * 8)

    @functools.cached_property
    def _kernel(self) -> Tensor:
        return self._weight[..., None].contiguous(memory_format=torch.channels_last)

    @functools.cached_property
    def _packed_kernel(self) -> Tensor:
        weight = self._weight[..., None].contiguous(memory_format=torch.channels_last)
        before, after = self._padding
        padding = (before, 0) if before == after else (0, 0)
        length = 8 * self._stride + self._shape[-1]
        series = torch.empty(length, TYPICAL_ROWS, self._shape[1], dtype=weight.dtype)
        return _pack_image(weight, _image(series), padding, self._stride)


def modulated_norm(series: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalisation over time and groups of channels, then scale and shift of each channel.

    Args:
        series: ``[L, M, C]``, contiguous.
        scale: float32, ``[M · C]``.
        shift: float32, ``[M · C]``.
        groups: Of the C channels.
        eps: Added to each variance.
    """
    if series.is_cuda:
        return _norm_by_moments(series, scale, shift, groups, eps)
    length, rows, channels = series.shape
    wide = rows * channels
    narrow = series.dtype == torch.bfloat16 and channels // groups < MIN_GROUP_BF16
    values = series.float() if narrow else series
    # One image of M · C channels and height L, channels last in memory.
    image = values.as_strided((1, wide, length, 1), (values.numel(), 1, wide, wide))
    normal = torch.native_group_norm(image, scale, shift, 1, wide, length, rows * groups, eps)[0]
    output = normal.as_strided(series.shape, (wide, channels, 1))
    return output.to(series.dtype) if narrow else output


def _norm_by_moments(
    series: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
) -> Tensor:
    """`modulated_norm` for a GPU, which would reorder the image for a group normalisation."""
    length, rows, _ = series.shape
    grouped = series.view(length, rows, groups, -1).float()
    variance, mean = torch.var_mean(grouped, (0, 3), correction=0, keepdim=True)
    factor = scale.reshape(rows, groups, -1) * (variance[0] + eps).rsqrt()
    term = torch.addcmul(shift.reshape(rows, groups, -1), mean[0], factor, value=-1)
    output = torch.addcmul(term, grouped, factor).view(series.shape)
    return output.to(series.dtype)


def _image(series: Tensor) -> Tensor:
    """View contiguous ``[L, M, C]`` as ``[1, C, L, M]``, channels last in memory."""
    length, rows, channels = series.shape
    strides = (series.numel(), 1, rows * channels, channels)
    return series.as_strided((1, channels, length, rows), strides)


def _series(image: Tensor) -> Tensor:
    """Inverse of `_image`."""
    if not image.is_contiguous(memory_format=torch.channels_last):
        return image[0].permute(1, 2, 0).contiguous()
    _, channels, length, rows = image.shape
    return image.as_strided((length, rows, channels), (rows * channels, channels, 1))


# --- the private operators, one place for each ---------------------------------------------------


def _pack_product(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _product(rows: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output


def _pack_image(weight: Tensor, image: Tensor, padding: tuple[int, int], stride: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, (stride, 1), (1, 1), 1, tuple(image.shape)
    )
    return packed


def _convolve(
    image: Tensor, packed: Tensor, bias: Tensor, padding: tuple[int, int], stride: int
) -> Tensor:
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(
        image, packed, bias, padding, (stride, 1), (1, 1), 1, "none", [], ""
    )
    return output
