"""A small file of tensors, for the tests of the file format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpd_gym.checkpoint import save_file

HEADER = {"name": "mpdiffuser", "budget": 0.1, "spaces": {"low": [-1.0, 1.0]}, "goal": None}


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(2, 3, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "table": np.linspace(-1, 1, 4),
        "count": torch.tensor(7),
        "mask": np.array([True, False, True]),
    }


def written(folder: Path) -> Path:
    path = folder / "small.safetensors"
    save_file(path, tensors(), HEADER, kind="agent")
    return path
