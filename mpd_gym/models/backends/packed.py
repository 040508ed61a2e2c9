"""Denoisers for inference: the same function as a trained network, laid out for the machine.

`PackedDenoiser` has the three parts of `TrajectoryDenoiser` (embed, modulations, denoise), so that
`mpd_gym.diffusion.guided` takes either. Everything that a reverse pass does not change is out of
its loop: the affine part of a normalisation and its modulation are one scale and one shift, for
which the network's weights are multiplied out once. The loop itself is C where the machine has a
compiler (`mpd_gym.models.backends.native`), and PyTorch's operators elsewhere. `PackedNetworks`
makes packed networks, keeps them, and makes them anew when weights have changed.
"""

from __future__ import annotations

import ctypes
import math
import operator
import warnings
from collections.abc import Sequence
from typing import TypeAlias, final

import torch
from torch import Tensor

from mpd_gym.errors import ConfigError, InputError, check_choice
from mpd_gym.models.backends.cpu import computes_bf16
from mpd_gym.models.backends.native import library
from mpd_gym.models.backends.native_unet import NativeUnet, pairs_up
from mpd_gym.models.backends.packed_cuda import GraphedDenoiser
from mpd_gym.models.backends.packed_ops import PRODUCT_ROWS, packs
from mpd_gym.models.backends.packed_unet import Films, Unet
from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.temporal_unet import Modulation

__all__ = [
    "PRECISIONS",
    "InferenceNetwork",
    "PackedDenoiser",
    "PackedNetworks",
    "max_relative_error",
]

PRECISIONS = ("plain", "fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Departure from the plain network, relative to its largest output, up to which a packed one is used
# unasked. Rounding series and weights to bfloat16 costs about 1e-2, and is done where asked for.
TOLERANCE = 1e-4

InferenceNetwork: TypeAlias = "TrajectoryDenoiser | PackedDenoiser | GraphedDenoiser"


@final
class PackedNetworks:
    """Packed networks by network and precision; copies and files of it are empty.

    A packed network holds a second copy of the weights. It is made at its first use, and again once
    a weight was changed in place, as optimisers and ``load_state_dict`` do, or was replaced.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[TrajectoryDenoiser, str], _Entry] = {}

    def get(self, network: TrajectoryDenoiser, precision: str, rows: int) -> InferenceNetwork:
        """Return what a reverse pass should call.

        In float32 on a CPU, the packed network is compared with the plain one before its first use,
        and used where they agree to 1e-4 of the largest output.

        Args:
            network: The trained network.
            precision: ``"plain"``: the network itself. ``"fp32"``: on a CPU its packed equivalent,
                on a GPU itself. ``"bf16"``: its packed equivalent with series and weights rounded
                to bfloat16, statistics and sums in float32; on a GPU as a CUDA graph. A causal
                network has a packed equivalent where there is compiled code, and is itself
                otherwise.
            rows: Trajectories in a call, without those of the unconditional half.

        Raises:
            ConfigError: If `precision` is unknown, or is bfloat16 where the CPU lacks it.
        """
        check_choice("precision", precision, PRECISIONS)
        weight = next(network.parameters())
        on_cpu = weight.device.type == "cpu"
        exact = precision == "fp32"
        if network.config.unet.causal and not (on_cpu and _compiled(network, precision)):
            return network  # PyTorch's operators have no packed form of it
        if precision == "plain" or weight.dtype != torch.float32 or (exact and not on_cpu):
            return network
        key = (network, precision)
        entry = self._found.get(key)
        if entry is None or not entry.packed.is_current():
            packed = PackedDenoiser(network, precision)
            entry = self._found[key] = _Entry(packed, packed if on_cpu else GraphedDenoiser(packed))
        if exact and not (entry.agrees(rows) and entry.agrees(2 * rows)):
            return network
        return entry.used

    def __reduce__(self) -> tuple[type[PackedNetworks], tuple[()]]:
        return PackedNetworks, ()


@final
class _Entry:
    """A packed network, how it is called, and whether it was found to agree."""

    def __init__(self, packed: PackedDenoiser, used: PackedDenoiser | GraphedDenoiser) -> None:
        self.packed, self.used = packed, used
        self._agrees: dict[bool, bool] = {}  # for small batches, and for large ones

    def agrees(self, rows: int) -> bool:
        """Whether plain and packed network agree on batches of the kind of `rows`."""
        small = rows <= PRODUCT_ROWS
        if small not in self._agrees:
            error = max_relative_error(self.packed, min(rows, 2 * PRODUCT_ROWS))
            self._agrees[small] = error <= TOLERANCE
            if error > TOLERANCE:
                warnings.warn(
                    f"the packed network departs from the plain one by {error:.1e} of its largest "
                    f"output on this machine, more than {TOLERANCE:.0e}; the plain one is used",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._agrees[small]


def _compiled(network: TrajectoryDenoiser, precision: str) -> ctypes.CDLL | None:
    """Compiled code that serves a network on this CPU."""
    found = library()
    if found is not None and precision == "bf16" and not pairs_up(network.unet, found):
        return None
    return found


def max_relative_error(packed: PackedDenoiser, rows: int) -> float:
    """Largest difference from the plain network for noise, relative to its largest output.

    Args:
        packed: Packed network.
        rows: Trajectories in the batch.

    Returns:
        The difference; NaN if the plain network's output is not finite, infinite if only the
        packed one's is not.
    """
    network, config = packed.network, packed.config
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    inputs = (
        torch.arange(1, rows + 1, device=device),
        normal(rows, config.observation_dim),
        normal(rows, config.condition_dim),
        torch.ones(rows, len(config.conditions), device=device),
    )
    trajectory = normal(rows, config.horizon, config.trajectory_dim)
    with torch.no_grad():
        expected, found = (
            part.denoise(trajectory, part.modulations(part.embed(*inputs)))
            for part in (network, packed)
        )
    if not expected.isfinite().all():
        return math.nan
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


@final
class PackedDenoiser:
    """A `TrajectoryDenoiser` for inference, without gradients; see there for shapes.

    Args:
        network: Weights in float32. They are copied; `is_current` tells whether they have changed
            since.
        precision: ``"fp32"`` or ``"bf16"``.
        native: Whether a CPU may run compiled code; see `mpd_gym.models.backends.native`. In
            bfloat16 it rounds what is multiplied; PyTorch's operators round the series, too.

    Raises:
        ConfigError: If `precision` is unknown, or is bfloat16 where the CPU lacks it.
    """

    def __init__(
        self, network: TrajectoryDenoiser, precision: str = "fp32", native: bool = True
    ) -> None:
        check_choice("precision", precision, DTYPES)
        on_cpu = next(network.parameters()).device.type == "cpu"
        if precision == "bf16" and on_cpu and not computes_bf16():
            raise ConfigError(
                "precision: this CPU does not compute in bfloat16; ask for 'fp32' instead of 'bf16'"
            )
        self.config = network.config
        self.precision = precision
        self.network = network
        self._origin = _Origin(network)
        dtype = DTYPES[precision]
        compiled = _compiled(network, precision) if native and on_cpu else None
        self._native: NativeUnet | None = None
        with torch.no_grad():
            self._films = Films(network.unet, on_cpu and packs(torch.float32))
            if compiled is None:
                self._unet = Unet(network.unet, dtype, on_cpu and packs(dtype))
            else:
                self._native = NativeUnet(
                    network.unet, self._films.offsets, compiled, paired=precision == "bf16"
                )

    def is_current(self) -> bool:
        """Whether the network's weights are those that were packed."""
        return self._origin.is_current()

    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory, as `TrajectoryDenoiser.embed`."""
        with torch.no_grad():
            return self.network.embed(k, initial, conditions, present)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return scales and shifts of all normalisations side by side: one pair, ``[G, ΣC]``."""
        with torch.no_grad():
            return [self._films(embedding)]

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as `TrajectoryDenoiser.denoise` does, from `modulations` of this object.

        Raises:
            InputError: If a shape is wrong.
        """
        config, rows = self.config, len(trajectory)
        expected = (rows, config.horizon, config.trajectory_dim)
        if tuple(trajectory.shape) != expected:
            raise InputError(
                f"trajectory: expected shape {list(expected)}; got {list(trajectory.shape)}"
            )
        scale, shift = modulations[0]
        if rows % len(scale):
            raise InputError(f"trajectory: expected a multiple of {len(scale)} rows; got {rows}")
        if self._native is not None:
            found = self._native(trajectory.float(), scale, shift)
            return found.to(trajectory.dtype)
        with torch.inference_mode():
            parts = (self._films.split(part, rows) for part in (scale, shift))
            output = self._unet(trajectory, zip(*parts, strict=True))
        # A new tensor, which outside of inference mode is like any other.
        return output.transpose(0, 1).to(trajectory.dtype, copy=True)


@final
class _Origin:
    """Weights of a network as they are now; asked before every plan, hence the loops in C."""

    def __init__(self, network: TrajectoryDenoiser) -> None:
        found = [
            (module._parameters, name, weight)
            for module in network.modules()
            for name, weight in module.named_parameters(recurse=False)
        ]
        self._holders, self._names, self._weights = zip(*found, strict=True)
        # PyTorch counts no writes to tensors of inference mode.
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._state = self._seen()

    def is_current(self) -> bool:
        """Whether each weight is the same tensor in the same memory, not written to since."""
        weights = map(dict.get, self._holders, self._names)
        return all(map(operator.is_, weights, self._weights)) and self._seen() == self._state

    def _seen(self) -> tuple[list[int], list[int]]:
        writes = list(map(operator.attrgetter("_version"), self._counted))
        return writes, list(map(Tensor.data_ptr, self._weights))
