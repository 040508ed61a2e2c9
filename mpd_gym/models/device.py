"""Where networks run, and in what."""

from __future__ import annotations

import torch

from mpd_gym.errors import ConfigError

__all__ = ["computes_bf16", "find_device"]


def find_device(name: str) -> torch.device:
    """Return the device of that name; ``"auto"`` takes a GPU where there is one.

    Raises:
        ConfigError: If PyTorch knows no such device, or finds none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"device: expected 'auto', 'cpu', or 'cuda' where PyTorch finds a GPU; got {name!r}"
        ) from error
    return device


def computes_bf16() -> bool:
    """Whether PyTorch computes in bfloat16 on this CPU."""
    try:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False
    return supported
