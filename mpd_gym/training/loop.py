"""The only optimisation loop."""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpd_gym.atomic import user_path
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
    """Result of `fit`.

    Attributes:
        name: Name of the training.
        step: Optimisation steps done.
        seconds: Duration of these steps, without interruptions.
        weights: Copy of the module's ``state_dict`` with averaged weights.
        training: Training loss every `log_every` steps.
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

    A call with the same arguments resumes an interrupted training, also after kill −9, from the
    last checkpoint. On a CPU it ends with the same bits as without the interruption, if `loss_fn`
    and `sampler` draw only from the given generators. To fine-tune, call it with trained weights
    and another `name`.

    Args:
        module: Trained in place from its present weights. Parameters that require no gradient keep
            every bit. At the end it is in evaluation mode.
        loss_fn: ``(module, batch, noise generator)`` to named scalars; ``"loss"`` is minimised
            and all are logged.
        sampler: ``(batch size, random numbers)`` to a batch of NumPy arrays in a dataclass or
            mapping, which `loss_fn` receives as tensors.
        config: All settings.
        name: Name of the training's folder, progress bar and TensorBoard run.
        validation: Sampler of held-out data. The averaged weights see the same batches and noise
            every time; the training does not change.
        directory: Parent of the folder `name` for checkpoints and TensorBoard files; None keeps
            nothing.
        device: Device of module, batches and noise generator.
        resume: Continue from a checkpoint, if there is one; False deletes it.
        identity: JSON values that a resumed training must share, such as the data set's name.
        callbacks: Called with every record.
        progress: Show a progress bar with rate, loss and remaining time on stderr.

    Returns:
        Averaged weights and the history of the losses.

    Raises:
        InputError: If an argument, or the result of a callable, is unusable.
        ConfigError: If the checkpoint belongs to another training; names the difference. If another
            training is in the folder.
        CheckpointError: If the checkpoint is damaged, of another module, or cannot be written.
        FileError: If the folder cannot be written to, or has no room for a checkpoint.
        TrainingError: If loss or gradient is not finite. Names the step and the last checkpoint,
            which does not change.
        KeyboardInterrupt: On SIGINT or SIGTERM, in the main thread: after the current step and
            its checkpoint, with a hint how to continue. The module then holds the raw weights.
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
            checkpoints = Checkpoints(user_path(directory) / name)
            stack.enter_context(checkpoints.exclusive())
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
    """Take steps, log, validate and save, until all steps are done or `request` is set."""
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
    return "nothing was saved without a directory" if checkpoints is None else checkpoints.summary


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
        self._writer: Any = None
        if directory is not None:
            from torch.utils.tensorboard import SummaryWriter  # half a second, so only if used

            purge = step + 1 if step else None  # hides what a killed session wrote beyond `step`
            with self._without_writer_on_errors():
                self._writer = SummaryWriter(str(user_path(directory) / name), purge_step=purge)
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
            with self._without_writer_on_errors():
                for name, value in record.values.items():
                    self._writer.add_scalar(f"{record.split}/{name}", value, record.step)
        for callback in self._callbacks:
            callback(record)

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            with self._without_writer_on_errors():
                self._writer.close()

    @contextmanager
    def _without_writer_on_errors(self) -> Iterator[None]:
        """Go on without TensorBoard where its file cannot be written: it is no reason to stop."""
        try:
            yield
        except OSError as error:
            self._writer = None
            warnings.warn(
                f"TensorBoard's file cannot be written ({error}); the training goes on without it. "
                "Free space",
                stacklevel=2,
            )


def _keep_memory() -> None:
    """Make the C library keep the memory that one step frees for the next.

    By default glibc returns free memory at the end of the heap to the system and requests it again
    in every step, page by page: a tenth of the time of a width-64 network. It stops this below
    twice the size of the largest block freed so far, if that is at most 32 MiB (``mallopt(3)``,
    M_MMAP_THRESHOLD). The block is never touched; other allocators are not affected.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use `count` torch threads inside the block; None does not change them."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
