"""The only optimisation loop."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpd_gym.errors import InputError, TrainingError
from mpd_gym.training.config import TrainingConfig
from mpd_gym.training.interrupts import StopRequest, catch_interrupts
from mpd_gym.training.log import History, Record
from mpd_gym.training.state import Checkpoints, LossFunction, Sampler, TrainingState

__all__ = ["BAR_POSITION", "TrainingResult", "fit", "torch_threads"]

_LARGEST_BLOCK = 31 * 2**20

BAR_POSITION: ContextVar[int] = ContextVar("BAR_POSITION", default=0)
"""Line of the progress bar in this process, below the first."""


@final
@dataclass(frozen=True)
class TrainingResult:
    """Outcome of `fit`.

    Attributes:
        name: Of the training.
        step: Optimisation steps done.
        seconds: Time that they took, interruptions left out.
        weights: The module's ``state_dict`` with averaged weights, a copy.
        training: Training loss at every `log_every` steps.
        validation: Validation loss; empty without validation data.
    """

    name: str
    step: int
    seconds: float
    weights: Mapping[str, Tensor]
    training: History
    validation: History


def fit(
    module: nn.Module,
    loss_fn: LossFunction,
    sampler: Sampler,
    config: TrainingConfig,
    *,
    name: str,
    validation: Sampler | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    identity: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callable[[Record], None]] = (),
    progress: bool = True,
) -> TrainingResult:
    """Train a module by Adam, and leave the moving average of its weights in it.

    Interrupted at any time, even by kill −9, and called again with the same arguments, it goes on
    from the last checkpoint and ends, on a CPU, with the same bits as without the interruption,
    provided that `loss_fn` and `sampler` draw from the generators that they are given only. To
    fine-tune, call it with trained weights and another `name`.

    Args:
        module: Trained in place: its present weights are the start. Parameters that require no
            gradient keep every bit. At the end it is in evaluation mode.
        loss_fn: ``(module, batch, noise generator)`` to named scalars; ``"loss"`` is minimised
            and all are logged.
        sampler: ``(batch size, random numbers)`` to a batch of NumPy arrays, a dataclass or
            mapping, which `loss_fn` receives as tensors.
        config: All settings.
        name: Names the training's folder, progress bar and TensorBoard run.
        validation: Sampler of held-out data. The averaged weights see the same batches and noise
            every time, and the training does not notice.
        directory: Checkpoints and TensorBoard files go to its sub-folder `name`; None keeps
            nothing.
        device: Of module, batches and noise generator.
        resume: Continue from a checkpoint, if there is one; False deletes it.
        identity: JSON values that a resumed training must share, such as the data set's name.
        callbacks: Called with every record.
        progress: Show a progress bar with rate, loss and remaining time on stderr.

    Returns:
        Averaged weights and the history of the losses.

    Raises:
        InputError: If an argument or what a callable returns is unusable.
        ConfigError: If the checkpoint belongs to another training; names what differs.
        CheckpointError: If the checkpoint is damaged, of another module, or cannot be written.
        TrainingError: If loss or gradient is not finite. Names the step and the last checkpoint,
            which stays as it was.
        KeyboardInterrupt: On SIGINT or SIGTERM, in the main thread: after the step at hand and
            its checkpoint, saying how to continue. The module then holds the raw weights.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"name must be usable as a folder's name; got '{name}'")
    with ExitStack() as stack:
        stack.enter_context(torch_threads(config.threads))
        _keep_memory()
        state = TrainingState(module, config, torch.device(device), identity or {})
        stack.callback(state.release)
        checkpoints = None
        if directory is not None:
            checkpoints = Checkpoints(Path(directory) / name)
            checkpoints.begin(state, resume=resume)
        report = _Report(name, config, state.step, directory, callbacks, progress)
        stack.callback(report.close)
        request = stack.enter_context(catch_interrupts())
        try:
            _run(state, config, loss_fn, sampler, validation, checkpoints, report, request)
            if request.signal is not None:
                raise KeyboardInterrupt(
                    f"training '{name}' stopped by {request.signal} at step {state.step:,} of "
                    f"{config.steps:,}; {_kept(checkpoints)}. The same call continues from there"
                )
            weights = state.finish()
        except TrainingError as error:
            raise TrainingError(
                f"training '{name}' cannot go on: {error}; {_kept(checkpoints)}. Lower "
                "learning_rate, or look for extreme values in the data"
            ) from None
    histories = state.log.history(), state.validation_log.history()
    return TrainingResult(name, state.step, state.seconds, weights, *histories)


def _run(
    state: TrainingState,
    config: TrainingConfig,
    loss_fn: LossFunction,
    sampler: Sampler,
    validation: Sampler | None,
    checkpoints: Checkpoints | None,
    report: _Report,
    request: StopRequest,
) -> None:
    """Take steps until all are done or `request` is set; keep the books in between."""
    saved = time.monotonic()
    started = saved - state.seconds
    while state.step < config.steps and request.signal is None:
        state.advance(loss_fn, sampler)
        report.step()
        step, last = state.step, state.step == config.steps
        if last or step % config.log_every == 0:
            report.record(state.log.close(step))
        if validation is not None and (last or step % config.validation_every == 0):
            state.validate(loss_fn, validation)
            report.record(state.validation_log.close(step))
        now = time.monotonic()
        state.seconds = now - started
        due = last or request.signal is not None or now - saved >= config.checkpoint_seconds
        due = due or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
        if checkpoints is not None and due:
            checkpoints.save(state)
            saved = time.monotonic()


def _kept(checkpoints: Checkpoints | None) -> str:
    return "without a directory nothing was kept" if checkpoints is None else checkpoints.summary


@final
class _Report:
    """Progress bar, TensorBoard and callbacks of one training."""

    def __init__(
        self,
        name: str,
        config: TrainingConfig,
        step: int,
        directory: str | os.PathLike[str] | None,
        callbacks: Sequence[Callable[[Record], None]],
        progress: bool,
    ) -> None:
        self._callbacks = callbacks
        self._writer = None
        if directory is not None:
            from torch.utils.tensorboard import SummaryWriter  # half a second, so only if used

            purge = step + 1 if step else None  # hides what a killed session wrote beyond `step`
            self._writer = SummaryWriter(str(Path(directory) / name), purge_step=purge)
        wait = 0.2 if sys.stderr.isatty() else 30.0  # a log file gets few lines
        self._bar = tqdm(
            total=config.steps,
            initial=step,
            desc=name,
            unit="step",
            position=BAR_POSITION.get(),
            mininterval=wait,
            maxinterval=max(wait, 10.0),
            dynamic_ncols=True,
            disable=not progress,
        )
        self._shown: dict[str, str] = {}

    def step(self) -> None:
        self._bar.update()

    def record(self, record: Record) -> None:
        loss = "loss" if record.split == "training" else "validation"
        self._shown[loss] = f"{record.values['loss']:.4g}"
        self._bar.set_postfix(self._shown, refresh=False)
        if self._writer is not None:
            for name, value in record.values.items():
                self._writer.add_scalar(f"{record.split}/{name}", value, record.step)
        for callback in self._callbacks:
            callback(record)

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _keep_memory() -> None:
    """Make the C library keep the memory that one step frees for the next.

    By default glibc gives free memory at the end of the heap back to the system and takes it again
    in every step, page by page: a tenth of the time of a width-64 network. It stops doing so below
    twice the size of the largest block freed so far, if that is at most 32 MiB (``mallopt(3)``,
    M_MMAP_THRESHOLD). The block is never touched; other allocators are not affected.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use `count` torch threads for the time being; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
