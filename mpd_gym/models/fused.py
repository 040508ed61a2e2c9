"""The denoisers with hand-written backward passes: what a training on a CPU computes with.

Where there is a C compiler, all layers of the U-Net are one node of the graph, in C
(`mpd_gym.models.backends.native_training`): in float32, and in bfloat16 where the CPU multiplies it
without AMX. What follows is for other CPUs, causal networks, and machines without a compiler.

`fused` gives the function that `TrajectoryDenoiser.forward` is, from the same parameters. Time
series are ``[L, M, C]``, time first: there a normalisation of each series with its modulation is
one of M · C channels of a single image. `fused_convolution` has the convolutions, `fused_norm` the
normalisations; a convolution, its normalisation, its modulation, the residual and the swish are one
node of the graph. All modulations of a network are computed together. In bfloat16 the series
between layers and the factors of all products are rounded; statistics, sums and weights stay
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpd_gym.models.backends.native_training import native_forward, trains_natively
from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.fused_convolution import Geometry, kernel, read
from mpd_gym.models.fused_norm import Norm, normalise, normalise_backward
from mpd_gym.models.temporal_unet import ResidualBlock, Stage, TemporalUnet, by_channels

__all__ = ["fused", "lay_out"]

# (τ^k [B, H, D], k [B], initial, conditions, present) -> [B, H, D_out]
Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Modulation = tuple[Tensor, Tensor]  # scale and shift of a normalised series, each [M, C]


def fused(network: TrajectoryDenoiser) -> Network:
    """Return a faster equivalent of `network.forward` where there is one, else `network` itself.

    The equivalent is for float32 parameters on a CPU, with or without autocast to bfloat16. It
    agrees with the plain one to 1e-4 of the largest entry, gradients included, and with autocast
    to 5 %, which is how far autocast itself departs.

    Args:
        network: Parameters are read at every call.
    """
    weight = next(network.parameters())
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
            if trains_natively(network.unet, trajectory, dtype):
                paired = dtype == torch.bfloat16
                return native_forward(network.unet, trajectory, embedding.float(), paired=paired)
            modulations = _modulations(network.unet, embedding.to(dtype))
            series = trajectory.to(dtype).transpose(0, 1).contiguous()
            return _unet(network.unet, series, modulations).transpose(0, 1).float()

    return forward


def lay_out(network: nn.Module) -> None:
    """Order the weights of all convolutions in memory as `fused` reads them; none changes."""
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            weight = module.weight
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def _modulations(unet: TemporalUnet, embedding: Tensor) -> Iterator[Modulation]:
    """Scale and shift of every layer of the stages, from FiLM and the affine normalisation.

    Layers of as many channels are computed together. Weights stand on the left of every product, so
    that their gradients come in their own layout.
    """
    stages = (*unet.encoder, unet.middle, *unet.decoder)
    blocks: list[Any] = [block for stage in stages for block in (stage.first, stage.second)]
    films = [film for block in blocks for film in block.films]
    norms = [norm for block in blocks for norm in block.norms]
    groups = by_channels(norms)
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
        scale, shift = (product + bias[:, None]).chunk(2, dim=-1)  # each [layers, M, C]
        shift = torch.addcmul(shift, scale, offset[:, None])
        scale = scale * gain[:, None]
        found |= dict(zip(group, zip(scale.unbind(), shift.unbind(), strict=True), strict=True))
    return iter([found[index] for index in range(len(found))])


def _affine(modules: list[Any]) -> tuple[Tensor, Tensor]:
    """Weights and biases of modules of one shape, stacked."""
    return (
        torch.stack([module.weight for module in modules]),
        torch.stack([module.bias for module in modules]),
    )


def _unet(unet: Any, series: Tensor, modulations: Iterator[Modulation]) -> Tensor:
    """`TemporalUnet.forward` on ``[L, M, C]``."""

    def stage(module: Stage, series: Tensor) -> Tensor:
        return _block(module.second, _block(module.first, series, modulations), modulations)

    skips = []
    for module, down in zip(unet.encoder, unet.downs, strict=True):
        series = stage(module, series)
        skips.append(series)
        if not isinstance(down, nn.Identity):
            series = _convolution(down, series)
    series = stage(unet.middle, series)
    for module, up in zip(unet.decoder, unet.ups, strict=True):
        series = _convolution(up, stage(module, torch.cat((series, skips.pop()), dim=-1)))
    if unet.causal:
        series = series + skips[0]
    first, norm, _, last = unet.head
    affine = norm.weight[None], norm.bias[None]
    return _convolution(last, _layer(first, norm, affine, series, None, swish=True))


def _block(block: ResidualBlock, series: Tensor, modulations: Iterator[Modulation]) -> Tensor:
    (first, second), (norm, other) = block.convolutions, block.norms
    branch = _layer(first, norm, next(modulations), series, None, swish=False)
    if not isinstance(block.projection, nn.Identity):
        series = _convolution(block.projection, series)
    return _layer(second, other, next(modulations), branch, series, swish=True)


def _convolution(module: nn.Module, series: Tensor) -> Tensor:
    convolution, geometry = read(module)
    arguments = series, convolution.weight, convolution.bias, geometry
    output: Tensor = _Convolution.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _layer(
    module: nn.Module,
    norm: Any,
    modulation: Modulation,
    series: Tensor,
    residual: Tensor | None,
    *,
    swish: bool,
) -> Tensor:
    convolution, geometry = read(module)
    tensors = (series, convolution.weight, convolution.bias, *modulation, residual)
    output: Tensor = _Layer.apply(*tensors, geometry, norm, swish)  # type: ignore[no-untyped-call]
    return output


@final
class _Convolution(torch.autograd.Function):
    """Convolution alone."""

    @staticmethod
    def forward(
        ctx: Any, series: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry
    ) -> Tensor:
        """Map ``[L, M, C_in]`` to ``[L', M, C]``."""
        weights = kernel(weight, series.dtype)
        ctx.save_for_backward(series, weights)
        ctx.geometry = geometry
        return geometry.forward(series, weights, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Map the gradient of the output to those of the tensors that `forward` takes."""
        wanted = ctx.needs_input_grad[0]
        return *ctx.geometry.backward(gradient, *ctx.saved_tensors, wanted), None


@final
class _Layer(torch.autograd.Function):
    """Convolution, group normalisation, modulation and, if wanted, residual and swish."""

    @staticmethod
    def forward(
        ctx: Any,
        series: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        geometry: Geometry,
        norm: Norm,
        swish: bool,
    ) -> Tensor:
        """Map ``[L, M, C_in]`` to ``[L, M, C]``; a modulation may have one row for all."""
        weights = kernel(weight, series.dtype)
        values = geometry.forward(series, weights, bias).float()
        output, kept = normalise(norm, values, scale, shift)
        if residual is not None:
            output += residual
        ctx.save_for_backward(series, weights, output if swish else None, *kept)
        ctx.geometry, ctx.norm, ctx.residual = geometry, norm, residual is not None
        ctx.modulated = len(scale) == values.shape[1]
        return (functional.silu(output) if swish else output).to(series.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Map the gradient of the output to those of the tensors that `forward` takes."""
        series, weights, output, *kept = ctx.saved_tensors
        gradient = gradient.float()
        if output is not None:
            gradient = torch.ops.aten.silu_backward(gradient, output)
        d_values, d_scale, d_shift = normalise_backward(ctx.norm, gradient, kept)
        if not ctx.modulated:
            d_scale, d_shift = d_scale.sum(0, keepdim=True), d_shift.sum(0, keepdim=True)
        wanted = ctx.needs_input_grad[0]
        gradients = ctx.geometry.backward(d_values, series, weights, wanted)
        d_residual = gradient.to(series.dtype) if ctx.residual else None
        return *gradients, d_scale, d_shift, d_residual, None, None, None
