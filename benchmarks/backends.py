"""Processor time of one network call, one thread: PyTorch, ONNX Runtime, OpenVINO and C.

The answer to "why is there C?". A call is `denoise`, what a plan repeats for every step; scales and
shifts are given. Each runtime's output is compared with plain PyTorch's before the clock starts.
Runtimes take turns in bursts, and medians are printed. ONNX Runtime and OpenVINO come with
``pip install 'mpd_gym[dev]'``; one that is missing is named and left out.

Usage: ``python benchmarks/backends.py [--cases laptop:1 laptop:8 laptop:64 paper:2] [--seconds 4]``
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sampling import HORIZON, NU, NX, PRESETS, networks
from torch import Tensor, nn

from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.models.backends.compiled import CompiledDenoiser
from mpd_gym.models.backends.library import compiled

CASES = ("laptop:1", "laptop:8", "laptop:64", "paper:2")
TOLERANCE = 1e-4  # of the largest output
BURST = 0.1  # seconds of one runtime before the next one's turn
Call = Callable[[], np.ndarray]


class Case:
    """A network, its inputs, and its graph in ONNX.

    Args:
        name: Key of `PRESETS` and number of rows, such as ``"laptop:8"``.
        folder: Where the graph is kept.
    """

    def __init__(self, name: str, folder: Path) -> None:
        size, rows = name.split(":")
        self.network, _ = networks(PRESETS[size])
        groups = min(int(rows), 2)  # conditional and unconditional
        inputs = torch.randn(groups, NX), torch.ones(groups, 1), torch.ones(groups, 1)
        with torch.no_grad():
            self.embedding = self.network.embed(torch.arange(1, groups + 1), *inputs)
            self.modulations = self.network.modulations(self.embedding)
        self.trajectory = torch.randn(int(rows), HORIZON, NX + NU)
        self.graph = folder / f"{size}-{rows}.onnx"

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Trajectory, and all scales and all shifts side by side."""
        scales, shifts = (torch.cat(parts, 1) for parts in zip(*self.modulations, strict=True))
        return self.trajectory, scales, shifts

    def export(self) -> Path:
        """Path of the graph, written once."""
        if not self.graph.exists():
            graph = _Graph(self.network, [len(scale[0]) for scale, _ in self.modulations]).eval()
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                torch.onnx.export(graph, self.inputs, self.graph, dynamo=True, verbose=False)
        return self.graph


class _Graph(nn.Module):
    def __init__(self, network: TrajectoryDenoiser, sizes: list[int]) -> None:
        super().__init__()
        self.network, self.sizes = network, sizes

    def forward(self, trajectory: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
        """`denoise`, with the modulations in two tensors."""
        parts = (part.split(self.sizes, 1) for part in (scales, shifts))
        return self.network.denoise(trajectory, list(zip(*parts, strict=True)))


def plain(case: Case) -> Call:
    """PyTorch's operators."""

    def call() -> np.ndarray:
        with torch.inference_mode():
            return case.network.denoise(case.trajectory, case.modulations).numpy()

    return call


def onnx_runtime(case: Case) -> Call:
    """ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        case.export(), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]
    inputs = {name: part.numpy() for name, part in zip(names, case.inputs, strict=True)}
    return lambda: session.run(None, inputs)[0]


def openvino(case: Case) -> Call:
    """OpenVINO."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(case.export(), "CPU", options).create_infer_request()
    inputs = [part.numpy() for part in case.inputs]
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]


def compiled_c(case: Case) -> Call:
    """The package's C code."""
    level = compiled()
    if level is None:
        raise ImportError("it was not built")
    network = CompiledDenoiser(case.network, level)
    modulations = network.modulations(case.embedding)
    return lambda: network.denoise(case.trajectory, modulations).numpy()


RUNTIMES = {
    "PyTorch": plain,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "C": compiled_c,
}


def prepare(case: Case) -> dict[str, Call]:
    """Calls of all runtimes that are there, which agree with PyTorch.

    Raises:
        SystemExit: If one does not.
    """
    calls: dict[str, Call] = {}
    for name, make in RUNTIMES.items():
        try:
            calls[name] = make(case)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        expected, found = calls["PyTorch"](), calls[name]()
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if not error <= TOLERANCE:
            raise SystemExit(
                f"{name}: expected PyTorch's output within {TOLERANCE:.0e} of its largest entry; "
                f"got {error:.1e}"
            )
    return calls


def medians(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median processor time of each call, in turn, for so many seconds each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    while min(sum(part) for part in times.values()) < seconds:
        for name, call in calls.items():
            call()  # so that what follows has its weights in the cache
            end = time.process_time() + BURST
            while (start := time.process_time()) < end:
                call()
                times[name].append(time.process_time() - start)
    return {name: statistics.median(part) for name, part in times.items()}


def main() -> None:
    """Print one row per case and runtime."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each runtime and case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    print("size    rows  runtime        ms/call  × PyTorch  C is faster by")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            found = medians(prepare(Case(name, Path(folder))), options.seconds)
            size, rows = name.split(":")
            for runtime, taken in found.items():
                factor = f"{taken / found['C']:.2f}" if "C" in found else ""
                print(
                    f"{size:7s} {rows:>4s}  {runtime:12s} {1e3 * taken:9.2f} "
                    f"{found['PyTorch'] / taken:10.2f} {factor:>15s}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
