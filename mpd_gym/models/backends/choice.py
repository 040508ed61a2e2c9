"""Which backend computes a denoiser: the one place that decides, and why.

For sampling on a CPU, C: for few rows it takes a small part of the time of PyTorch, ONNX Runtime
or OpenVINO, as ``benchmarks/backends.py`` shows. On a GPU, the plain network as a CUDA graph, as
two hundred kernels of a few microseconds cannot be started one by one in the time that they run.
For training on a CPU, C as well. Where C was not built or has no form of a network, plain PyTorch.
"""

from __future__ import annotations

import math
import operator
import warnings
from typing import final

import torch
from torch import Tensor

from mpd_gym.errors import ConfigError, check_choice
from mpd_gym.models.backends.compiled import CompiledDenoiser
from mpd_gym.models.backends.compiled_training import compiled_forward
from mpd_gym.models.backends.cuda_graph import GraphedDenoiser
from mpd_gym.models.backends.interface import InferenceNetwork, TrainingForward
from mpd_gym.models.backends.library import compiled
from mpd_gym.models.backends.rounded import RoundedDenoiser
from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.device import computes_bf16

__all__ = ["PRECISIONS", "InferenceNetworks", "max_relative_error", "training_forward"]

PRECISIONS = ("plain", "fp32", "bf16")
# Difference from the plain network, relative to its largest output, up to which C in float32 is
# used. Rounding to bfloat16 costs about 1e-2, and is done where it is asked for.
TOLERANCE = 1e-4
COMPARED_ROWS = 4


def inference_network(network: TrajectoryDenoiser, precision: str) -> InferenceNetwork:
    """Return what computes a denoiser, without gradients, where it is.

    Args:
        network: The trained network.
        precision: ``"plain"``: the network itself. ``"fp32"``: the same function in float32.
            ``"bf16"``: the factors of convolutions rounded to bfloat16, all else in float32.

    Raises:
        ConfigError: If `precision` is unknown, or is bfloat16 where the CPU lacks it.
    """
    check_choice("precision", precision, PRECISIONS)
    weight, rounded = next(network.parameters()), precision == "bf16"
    if precision == "plain" or weight.dtype != torch.float32:
        return network
    if weight.device.type != "cpu":
        return GraphedDenoiser(RoundedDenoiser(network) if rounded else network)
    level = compiled()
    if level is not None and (level.pairs or not rounded):
        return CompiledDenoiser(network, level, paired=rounded)
    if not rounded:
        return network
    if not computes_bf16():
        raise ConfigError(
            "precision: this CPU does not compute in bfloat16; ask for 'fp32' instead of 'bf16'"
        )
    return RoundedDenoiser(network)


@final
class InferenceNetworks:
    """What `inference_network` gives, by network and precision; copies and files of it are empty.

    It is made at its first use, and again once a weight was changed in place, as optimisers and
    ``load_state_dict`` do, or was replaced. C in float32 is compared with the plain network before
    its first use, and used where they agree to 1e-4 of the largest output.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[TrajectoryDenoiser, str], tuple[_Weights, InferenceNetwork]] = {}

    def get(self, network: TrajectoryDenoiser, precision: str) -> InferenceNetwork:
        """Return what a reverse pass should call; see `inference_network`.

        Warns:
            RuntimeWarning: If C departs from the plain network, which is then used.
        """
        weights, found = self._found.get((network, precision), (None, network))
        if weights is None or not weights.are_current():
            found = inference_network(network, precision)
            if precision == "fp32" and isinstance(found, CompiledDenoiser):
                found = _verified(network, found)
            self._found[network, precision] = _Weights(network), found
        return found

    def __reduce__(self) -> tuple[type[InferenceNetworks], tuple[()]]:
        return InferenceNetworks, ()


def training_forward(network: TrajectoryDenoiser) -> TrainingForward:
    """Return what computes ``network.forward`` in a training, with gradients of its parameters.

    Args:
        network: Its parameters are read at every call.
    """
    weight, level = next(network.parameters()), None
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        level = compiled()
    if level is None or network.config.unet.causal:  # whose normalisations have no backward pass
        return network
    return compiled_forward(network, level)


def max_relative_error(network: TrajectoryDenoiser, other: InferenceNetwork, rows: int) -> float:
    """Largest difference of two networks for noise, relative to the first one's largest output.

    Args:
        network: The plain network.
        other: The same function, computed otherwise.
        rows: Trajectories in the batch.

    Returns:
        The difference; NaN if the plain network's output is not finite, infinite if only the
        other's is not.
    """
    config = network.config
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
            for part in (network, other)
        )
    if not expected.isfinite().all():
        return math.nan
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def _verified(network: TrajectoryDenoiser, found: InferenceNetwork) -> InferenceNetwork:
    """What agrees with a network: `found`, or else the network itself."""
    error = max_relative_error(network, found, COMPARED_ROWS)
    if error <= TOLERANCE:
        return found
    if error > TOLERANCE:  # not NaN, for which the agent has an error of its own
        warnings.warn(
            f"the network in C departs from the plain one by {error:.1e} of its largest output on "
            f"this machine, more than {TOLERANCE:.0e}; the plain one is used",
            RuntimeWarning,
            stacklevel=3,
        )
    return network


@final
class _Weights:
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

    def are_current(self) -> bool:
        """Whether each weight is the same tensor in the same memory, not written to since."""
        weights = map(dict.get, self._holders, self._names)
        return all(map(operator.is_, weights, self._weights)) and self._seen() == self._state

    def _seen(self) -> tuple[list[int], list[int]]:
        writes = list(map(operator.attrgetter("_version"), self._counted))
        return writes, list(map(Tensor.data_ptr, self._weights))
