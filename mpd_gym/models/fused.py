"""The denoisers with hand-written backward passes: what a training on a CPU computes with.

`fused` gives the function that `TrajectoryDenoiser.forward` is, from the same parameters. Time
series are images ``[M, C, 1, L]`` of height 1 in channels-last layout throughout, for which
convolutions have the best kernels. A convolution, its normalisation, its modulation, the residual
and the swish are one node of the graph. All modulations of a network are computed together. In
bfloat16 the series between layers and the factors of all products are rounded; statistics, sums and
weights stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.temporal_unet import ResidualBlock, Stage, TemporalUnet

__all__ = ["fused", "lay_out"]

# (τ^k [B, H, D], k [B], initial, conditions, present) -> [B, H, D_out]
Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Modulation = tuple[Tensor, Tensor]  # scale and shift of a normalised series, each [M, C, 1, 1]


def fused(network: TrajectoryDenoiser) -> Network:
    """Return a faster equivalent of `network.forward` where there is one, else `network` itself.

    The equivalent is for float32 parameters on a CPU, with or without autocast to bfloat16. It
    agrees with the plain one to 1e-4 of the largest entry, gradients included, and with autocast
    to 5 %, which is how far autocast itself departs.

    Args:
        network: Parameters are read at every call.
    """
    weight = network.unet.head[0].weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return network

    def forward(
        trajectory: Tensor, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor
    ) -> Tensor:
        dtype = torch.float32
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        embedding = network.embed(k, initial, conditions, present)
        with torch.autocast("cpu", enabled=False):
            modulations = _modulations(network.unet, embedding.to(dtype))
            image = trajectory.to(dtype).transpose(1, 2).unsqueeze(2)
            return _unet(network.unet, image, modulations).squeeze(2).transpose(1, 2).float()

    return forward


def lay_out(network: nn.Module) -> None:
    """Order the weights of all convolutions in memory as `fused` reads them; none changes."""
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            weight = module.weight
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def _modulations(unet: TemporalUnet, embedding: Tensor) -> Iterator[Modulation]:
    """Scale and shift of every layer of the stages, from FiLM and the affine normalisation.

    Weights stand on the left of every product, so that their gradients come in their own layout.
    """
    stages = (*unet.encoder, unet.middle, *unet.decoder)
    blocks: list[Any] = [block for stage in stages for block in (stage.first, stage.second)]
    films = [film for block in blocks for film in block.films]
    norms = [norm for block in blocks for norm in block.norms]
    groups: dict[int, list[int]] = {}  # layers by their number of channels
    for index, norm in enumerate(norms):
        groups.setdefault(norm.num_channels, []).append(index)
    order = [index for group in groups.values() for index in group]
    dtype, (rows, size) = embedding.dtype, embedding.shape
    weight, bias = _affine([films[index][0] for index in order])
    hidden = functional.silu(weight.flatten(0, 1).to(dtype) @ embedding.t() + bias.reshape(-1, 1))
    parts = torch.split(hidden.view(-1, size, rows), [len(group) for group in groups.values()])
    found: dict[int, Modulation] = {}
    for part, group in zip(parts, groups.values(), strict=True):
        weight, bias = _affine([films[index][2] for index in group])
        gain, offset = _affine([norms[index] for index in group])
        product = torch.bmm(weight.to(dtype), part.to(dtype)).float().transpose(1, 2)
        # Each [layers, M, C]; what is computed from images takes their layout.
        scale, shift = (product.contiguous() + bias[:, None]).chunk(2, dim=-1)
        shift = torch.addcmul(shift, scale, offset[:, None])
        pairs = zip(_unbound(scale * gain[:, None]), _unbound(shift), strict=True)
        found |= dict(zip(group, pairs, strict=True))
    return iter([found[index] for index in range(len(norms))])


def _unbound(rows: Tensor) -> tuple[Tensor, ...]:
    """Split ``[layers, M, C]`` into ``[M, C, 1, 1]``."""
    return rows[..., None, None].unbind()


def _affine(modules: list[Any]) -> tuple[Tensor, Tensor]:
    """Weights and biases of modules of one shape, stacked."""
    return (
        torch.stack([module.weight for module in modules]),
        torch.stack([module.bias for module in modules]),
    )


def _unet(unet: Any, image: Tensor, modulations: Iterator[Modulation]) -> Tensor:
    """`TemporalUnet.forward` on images."""

    def stage(module: Stage, image: Tensor) -> Tensor:
        return _block(module.second, _block(module.first, image, modulations), modulations)

    skips = []
    for module, down in zip(unet.encoder, unet.downs, strict=True):
        image = stage(module, image)
        skips.append(image)
        if not isinstance(down, nn.Identity):
            pad, convolution = down
            image = _convolution(convolution, functional.pad(image, pad.padding))
    image = stage(unet.middle, image)
    for module, up in zip(unet.decoder, unet.ups, strict=True):
        image = _convolution(up, stage(module, torch.cat((image, skips.pop()), dim=1)))
    first, norm, _, last = unet.head
    affine = norm.weight[None, :, None, None], norm.bias[None, :, None, None]
    return _convolution(last, _layer(first, norm, affine, image, None, swish=True))


def _block(block: ResidualBlock, image: Tensor, modulations: Iterator[Modulation]) -> Tensor:
    (first, second), (norm, other) = block.convolutions, block.norms
    branch = _layer(first, norm, next(modulations), image, None, swish=False)
    if not isinstance(block.projection, nn.Identity):
        image = _convolution(block.projection, image)
    return _layer(second, other, next(modulations), branch, image, swish=True)


def _convolution(module: Any, image: Tensor) -> Tensor:
    output: Tensor = _Convolution.apply(image, module.weight, module.bias, _Geometry.of(module))  # type: ignore[no-untyped-call]
    return output


def _layer(
    convolution: Any,
    norm: nn.Module,
    modulation: Modulation,
    image: Tensor,
    residual: Tensor | None,
    *,
    swish: bool,
) -> Tensor:
    tensors = (image, convolution.weight, convolution.bias, *modulation, residual)
    output: Tensor = _Layer.apply(*tensors, _Geometry.of(convolution), norm, swish)  # type: ignore[no-untyped-call]
    return output


@final
class _Geometry(NamedTuple):
    """How a convolution moves along time."""

    stride: int
    padding: int
    transposed: bool

    @classmethod
    def of(cls, module: Any) -> _Geometry:
        return cls(module.stride[0], module.padding[0], isinstance(module, nn.ConvTranspose1d))

    def forward(self, image: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Convolve ``[M, C_in, 1, L]`` with ``[C, C_in, 1, k]``, or transposed."""
        function = functional.conv_transpose2d if self.transposed else functional.conv2d
        return function(image, kernel, bias.to(image.dtype), (1, self.stride), (0, self.padding))

    def backward(
        self, gradient: Tensor, image: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `forward`: of image, of weights without the height, and of bias."""
        by_product = (
            image.dtype == torch.bfloat16 and self.stride == 1 and not self.transposed
        )  # twice as fast there
        d_bias = gradient.sum((0, 2, 3), dtype=torch.float32)
        gradient = gradient.to(image.dtype)
        d_image, d_kernel, _ = torch.ops.aten.convolution_backward(
            gradient,
            image,
            kernel,
            None,
            (1, self.stride),
            (0, self.padding),
            (1, 1),
            self.transposed,
            (0, 0),
            1,
            (True, not by_product, False),
        )
        if by_product:
            return d_image, _weight_gradient(gradient, image, kernel.shape[-1]), d_bias
        return d_image, d_kernel.squeeze(2).float(), d_bias


def _weight_gradient(gradient: Tensor, image: Tensor, length: int) -> Tensor:
    """``[C, C_in, k]`` for a convolution that keeps the length, as one product."""
    half = length // 2
    rows = functional.pad(image.squeeze(2).transpose(1, 2), (0, 0, half, half))  # [M, L + k - 1, C]
    size, _, channels = rows.shape
    steps = gradient.shape[-1]
    windows = rows.as_strided((size, steps, length * channels), (rows.stride(0), channels, 1))
    columns = gradient.permute(1, 0, 2, 3).reshape(len(gradient[0]), -1)  # [C, M L]
    product = columns @ windows.reshape(size * steps, -1)
    return product.float().view(-1, length, channels).transpose(1, 2)


@final
class _Convolution(torch.autograd.Function):
    """Convolution alone."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, weight: Tensor, bias: Tensor, geometry: _Geometry
    ) -> Tensor:
        """Map ``[M, C_in, 1, L]`` to ``[M, C, 1, L']``."""
        kernel = weight.to(image.dtype).unsqueeze(2)
        ctx.save_for_backward(image, kernel)
        ctx.geometry = geometry
        return geometry.forward(image, kernel, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Map the gradient of the output to those of the tensors that `forward` takes."""
        return *ctx.geometry.backward(gradient, *ctx.saved_tensors), None


@final
class _Layer(torch.autograd.Function):
    """Convolution, group normalisation, modulation and, if wanted, residual and swish."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        geometry: _Geometry,
        norm: nn.GroupNorm,
        swish: bool,
    ) -> Tensor:
        """Map ``[M, C_in, 1, L]`` to ``[M, C, 1, L]``; a modulation may have one row for all."""
        kernel = weight.to(image.dtype).unsqueeze(2)
        series = geometry.forward(image, kernel, bias).float()
        size, channels, _, length = series.shape
        shape = (size, channels, length, norm.num_groups)
        series, _, rate = torch.native_group_norm(series, None, None, *shape, norm.eps)
        series = series.contiguous(memory_format=torch.channels_last)
        output = torch.addcmul(shift, series, scale)
        if residual is not None:
            output += residual
        # From here on, series is what has mean 0 and standard deviation 1.
        ctx.save_for_backward(image, kernel, series, rate, scale, output if swish else None)
        ctx.geometry, ctx.shape, ctx.residual = geometry, shape, residual is not None
        return (functional.silu(output) if swish else output).to(image.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Map the gradient of the output to those of the tensors that `forward` takes."""
        image, kernel, series, rate, scale, output = ctx.saved_tensors
        size, channels, _, groups = ctx.shape
        gradient = gradient.float()
        if output is not None:
            gradient = torch.ops.aten.silu_backward(gradient, output)
        d_scale = (gradient * series).sum((2, 3), keepdim=True)
        d_shift = gradient.sum((2, 3), keepdim=True)
        # The derivative of a normalisation, taken at its result: there mean is 0 and rate is 1.
        factor = (scale.view(len(scale), groups, -1) * rate[..., None]).view(size, channels, 1, 1)
        statistics = torch.zeros_like(rate), torch.ones_like(rate)
        scaled = (gradient * factor).contiguous(memory_format=torch.channels_last)
        d_series, _, _ = torch.ops.aten.native_group_norm_backward(
            scaled, series, *statistics, None, *ctx.shape, (True, False, False)
        )
        gradients = ctx.geometry.backward(d_series, image, kernel)
        d_residual = gradient.to(image.dtype) if ctx.residual else None
        if len(scale) < size:
            d_scale, d_shift = d_scale.sum(0, keepdim=True), d_shift.sum(0, keepdim=True)
        return *gradients, d_scale, d_shift, d_residual, None, None, None
