"""What the CPU at hand is, and what it is good at."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

__all__ = ["computes_bf16", "description", "multiplies_slowly"]


def computes_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    try:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False
    return supported


@functools.cache
def multiplies_slowly() -> bool:
    """Whether PyTorch's float32 products of matrices take twice as long as its convolutions.

    The former are MKL's, which holds back on CPUs that are not Intel's (AMD EPYC with AVX-512: 90
    of 250 GFLOP/s on a core); the latter are oneDNN's.
    """
    uses_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return uses_mkl and "GenuineIntel" not in description()


@functools.cache
def description() -> str:
    """Text that names the CPU's maker and what its instructions are."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if "MHz" not in line)
