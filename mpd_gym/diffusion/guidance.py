"""Classifier-free guidance: binds a network to its conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpd_gym.diffusion.schedule import NoiseSchedule
from mpd_gym.errors import ConfigError, InputError, check_choice
from mpd_gym.types import Denoiser

__all__ = ["PREDICTIONS", "ConditionalNetwork", "clean_prediction", "guided"]

PREDICTIONS = ("noise", "x0")
FEW_ROWS = 32  # rows of the first preparation, before their size is known

Modulations = list[tuple[Tensor, Tensor]]


class ConditionalNetwork(Protocol):
    """A network with separate conditioning, such as `mpd_gym.models.TrajectoryDenoiser`."""

    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed levels ``[G]``, x_0 ``[G, nx]``, conditions ``[G, ny]``, presence ``[G, nc]``."""
        ...

    def modulations(self, embedding: Tensor) -> Modulations:
        """Turn an embedding of G rows into pairs of tensors of G rows."""
        ...

    def denoise(self, trajectory: Tensor, modulations: Modulations) -> Tensor:
        """Predict from ``[M, H, D]`` and modulations of G rows, each for M / G trajectories."""
        ...


def guided(
    network: ConditionalNetwork,
    schedule: NoiseSchedule,
    initial: Tensor,
    conditions: Tensor,
    present: Tensor,
    guidance_scale: float,
    *,
    levels: Sequence[int],
    prediction: str = "noise",
    clip: tuple[float | Tensor, float | Tensor] | None = (-1.0, 1.0),
    modulation_bytes: int = 2**28,
) -> Denoiser:
    """Bind a network to x_0 and conditions; the result predicts x̂_0 (Balim et al. 2025, eq. 1).

    ε = ε_∅ + ω (ε_y − ε_∅) with both halves in one batch. ω = 1 evaluates the conditional half,
    ω = 0 the unconditional half alone; so does a network without conditions. Noise and x̂_0 are
    affine in each other, so guiding one guides the other.

    The function prepares conditioning in batched products, for all `levels` at once or for as many
    as fit into `modulation_bytes`.

    Args:
        network: Planner or dynamics model.
        schedule: Noise schedule that the network was trained with.
        initial: x_0, normalised, ``[E, nx]``.
        conditions: ``[E, ny]``; ny may be 0.
        present: 1 if a condition is given, else 0, ``[E, number of conditions]``.
        guidance_scale: ω >= 0.
        levels: Levels of the denoiser's calls, in their order.
        prediction: Output of the network, ``"noise"`` or ``"x0"``.
        clip: Range of x̂_0, numbers or tensors that broadcast to ``[…, D]``; None does not clip.
        modulation_bytes: Memory for prepared conditioning; `FEW_ROWS` rows are always prepared.

    Returns:
        Denoiser of ``[M, H, D]``, M = E · N: each row of `initial` owns N consecutive candidates,
        which share its conditioning. The output has the network's columns. It raises `InputError`
        at a level outside `levels`.

    Raises:
        ConfigError: If `guidance_scale` is negative, `prediction` unknown or `levels` empty.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if not guidance_scale >= 0:
        raise ConfigError(f"guidance_scale: expected a value >= 0; got {guidance_scale}")
    if not levels:
        raise ConfigError("levels: expected at least one level; got none")
    halves = _halves(guidance_scale if present.shape[-1] else 1.0)
    bounds = None if clip is None else _bounds(clip, initial)
    modulations = _prepared(
        network,
        initial.repeat(len(halves), 1),
        conditions.repeat(len(halves), 1),
        torch.cat([half * present for half in halves]),
        levels,
        modulation_bytes,
    )

    def denoise(trajectory: Tensor, k: int) -> Tensor:
        inputs = torch.cat((trajectory,) * len(halves)) if len(halves) > 1 else trajectory
        output = network.denoise(inputs, modulations(k))
        if len(halves) == 2:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        clean = clean_prediction(trajectory, output, k, schedule, prediction)
        if bounds is None:
            return clean
        low, high = (bound[..., : clean.shape[-1]] for bound in bounds)
        return torch.clamp(clean, low, high)

    return denoise


def clean_prediction(
    noisy: Tensor, output: Tensor, k: int, schedule: NoiseSchedule, prediction: str
) -> Tensor:
    """Convert a network's output to x̂_0.

    Args:
        noisy: τ^k, ``[…, D]``; its first columns correspond to `output`.
        output: Noise or clean trajectory, ``[…, D_out]``.
        k: Level.
        schedule: Noise schedule.
        prediction: ``"noise"`` or ``"x0"``.
    """
    if prediction == "x0":
        return output
    return (noisy[..., : output.shape[-1]] - schedule.noise(k) * output) / schedule.signal(k)


def _halves(guidance_scale: float) -> tuple[int, ...]:
    """Presence factors of the batch halves: conditional 1, unconditional 0."""
    if guidance_scale in (0.0, 1.0):
        return (int(guidance_scale),)
    return (1, 0)


@torch.no_grad()
def _prepare(
    network: ConditionalNetwork,
    initial: Tensor,
    conditions: Tensor,
    present: Tensor,
    levels: Sequence[int],
) -> dict[int, Modulations]:
    """Return the modulations of each level, as views of one batched result."""
    rows, count = len(initial), len(levels)
    k = torch.tensor(levels, device=initial.device).repeat_interleave(rows)  # [count · rows]
    embedding = network.embed(
        k, initial.repeat(count, 1), conditions.repeat(count, 1), present.repeat(count, 1)
    )
    modulations = network.modulations(embedding)
    slices = (slice(start, start + rows) for start in range(0, rows * count, rows))
    return {
        level: [(scale[part], bias[part]) for scale, bias in modulations]
        for level, part in zip(levels, slices, strict=True)
    }


def _prepared(
    network: ConditionalNetwork,
    initial: Tensor,
    conditions: Tensor,
    present: Tensor,
    levels: Sequence[int],
    limit: int,
) -> Callable[[int], Modulations]:
    """Return a function from level to modulations; it prepares ahead up to `limit` bytes."""
    order = {level: index for index, level in enumerate(levels)}
    first = max(FEW_ROWS // len(initial), 1)
    ready = _prepare(network, initial, conditions, present, levels[:first])
    size = sum(part.nbytes for pair in ready[levels[0]] for part in pair)
    chunk = max(limit // size, 1)
    if first < min(chunk, len(levels)):
        ready |= _prepare(network, initial, conditions, present, levels[first:chunk])

    def at(k: int) -> Modulations:
        nonlocal ready
        if k not in order:
            raise InputError(f"k: expected one of the levels {list(levels)}; got {k}")
        if k not in ready:
            ahead = levels[order[k] : order[k] + chunk]
            ready.clear()
            ready = _prepare(network, initial, conditions, present, ahead)
        return ready[k]

    return at


def _bounds(clip: tuple[float | Tensor, float | Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clip range as tensors, made once before the loop."""
    low, high = (torch.as_tensor(bound, dtype=like.dtype, device=like.device) for bound in clip)
    return low[None, None], high[None, None]
