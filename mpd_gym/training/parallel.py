"""Several trainings at once, each in its own process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar, final

import torch
from tqdm import tqdm

from mpd_gym.errors import InputError, WorkerError
from mpd_gym.training.interrupts import StopRequest, catch_interrupts
from mpd_gym.training.loop import BAR_POSITION

__all__ = ["fit_parallel"]

R = TypeVar("R")

_GRACE_SECONDS = 120.0  # for the last step and checkpoint of a large network
_POLL_SECONDS = 0.2


def fit_parallel(jobs: Mapping[str, Callable[[], R]], *, threads: int = 1) -> dict[str, R]:
    """Run jobs that call `fit`, each in its own process.

    Processes are new (``spawn``), so a script must call this under
    ``if __name__ == "__main__":``. Jobs and results are copied: modules in this process do not
    change, so a job returns the weights, as in `TrainingResult`. Progress bars stack. If the
    parent dies, its processes save and end.

    Args:
        jobs: Named functions without arguments that pickle can send: functions at the top of a
            module, or `functools.partial` of them.
        threads: torch threads of each process.

    Returns:
        Results of the jobs, in the order of `jobs`.

    Raises:
        InputError: If pickle cannot send a job.
        WorkerError: If a process dies; the others save and end first.
        KeyboardInterrupt: On SIGINT or SIGTERM, after every process has saved and ended.
        Exception: What a job raised, with its traceback as a note; the others save and end first.
    """
    payloads = {name: _pickled(name, job) for name, job in jobs.items()}
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()  # for the terminal
    workers: list[_Worker] = []
    with catch_interrupts() as request:
        try:
            for position, name in enumerate(payloads):
                here, there = context.Pipe()
                arguments = (there, position, threads, lock)
                process = context.Process(target=_work, args=arguments, name=name, daemon=True)
                with _interrupts_later():
                    process.start()
                there.close()  # now the end of the process closes the pipe
                workers.append(_Worker(name, process, here))
            for worker in workers:
                _send(worker, payloads[worker.name])
            return _collect(workers, request)
        finally:
            _stop(workers)


@final
@dataclass(frozen=True)
class _Worker:
    name: str
    process: SpawnProcess
    connection: Connection


def _pickled(name: str, job: Callable[[], Any]) -> bytes:
    # multiprocessing itself would share the memory of tensors instead of copying it
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"job '{name}' cannot be sent to a process: {error}. Use a function at the top of a "
            "module, or functools.partial of one, with arguments that pickle accepts"
        ) from error


def _collect(workers: list[_Worker], request: StopRequest) -> dict[str, Any]:
    results: dict[str, Any] = dict.fromkeys(worker.name for worker in workers)
    running = {worker.connection: worker for worker in workers}
    while running:
        if request.signal is not None:
            raise KeyboardInterrupt(
                f"trainings {list(results)} stopped by {request.signal}; each with a directory "
                "saved its state, and the same call continues from there"
            )
        for connection in wait(list(running), _POLL_SECONDS):
            assert isinstance(connection, Connection)
            worker = running.pop(connection)
            result, error = _receive(worker)
            if error is not None:
                raise error
            results[worker.name] = result
    return results


def _send(worker: _Worker, payload: bytes) -> None:
    """Send a process its job; as an argument it would block forever if the process dies."""
    try:
        worker.connection.send_bytes(payload)
    except OSError:
        raise WorkerError(
            f"the process of training '{worker.name}' died before it began ({_cause(worker)}). A "
            "script that trains in parallel does so under if __name__ == '__main__':"
        ) from None


def _receive(worker: _Worker) -> tuple[Any, BaseException | None]:
    try:
        outcome: tuple[Any, BaseException | None] = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None, WorkerError(
            f"the process of training '{worker.name}' died ({_cause(worker)}); its last checkpoint "
            "is kept, and the same call continues from there"
        )
    return outcome


def _cause(worker: _Worker) -> str:
    worker.process.join()
    code = worker.process.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _stop(workers: list[_Worker]) -> None:
    """Ask running processes to save and end; kill the rest after the grace time."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Start a process with SIGINT blocked, so that Ctrl-C does not interrupt its imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, position: int, threads: int, lock: Any) -> None:
    """Body of a worker process."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(lock)
    BAR_POSITION.set(position)
    connection.send_bytes(_outcome(connection.recv_bytes()))


def _outcome(job: bytes) -> bytes:
    """Run the job; return its result or exception, pickled."""
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pickle.dumps((pickle.loads(job)(), None))
    except BaseException as error:  # KeyboardInterrupt too: the parent raises it
        error.add_note("".join(traceback.format_exception(error)))
        try:
            message = pickle.dumps((None, error))
            pickle.loads(message)
        except Exception:
            summary = WorkerError(f"{type(error).__name__}: {error}")
            message = pickle.dumps((None, summary))
        return message


def _follow_parent() -> None:
    """When the parent ends, stop this process by the signal that makes `fit` save."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
