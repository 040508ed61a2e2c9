"""Distributing candidates over one or several processes.

Any number of processes runs the same candidates, and so gives the same data set: a candidate is
handed out only if a single process, taking them in order, would run it too.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import final

from mpd_gym.collect.rollout import Assignment, Runner
from mpd_gym.collect.storage import Decision, Status
from mpd_gym.errors import InputError, WorkerError
from mpd_gym.processes import die_with_parent, is_stopped

__all__ = ["Schedule", "run_here", "run_in_processes"]

_SHARD_SECONDS = 0.5  # work that a kill may cost; shorter episodes share a file
_MOST_PER_SHARD = 500
_LOOK_SECONDS = 1.0  # between looks whether a worker is stopped
_STOPPED_SECONDS = 30.0  # after which a stopped worker is replaced
_STOP_SECONDS = 10.0  # for workers to finish their episode when the collection is stopped


@final
class Schedule:
    """Chooses the candidates to run, until `episodes` of them are stored.

    Args:
        decided: Decisions of an earlier, interrupted run.
        episodes: Number of episodes wanted.
    """

    def __init__(self, decided: Mapping[int, Decision], episodes: int) -> None:
        self._decided = dict(decided)
        self._episodes = episodes
        self._next = 0  # all candidates below are decided or handed out
        self._stored = 0  # how many of these are stored, or handed out and may yet be
        self._pending: set[int] = set()
        self.take(0)  # skips decided candidates

    def take(self, number: int) -> list[int]:
        """Hand out up to `number` candidates; none if those already handed out may suffice."""
        taken: list[int] = []
        while self._stored < self._episodes:
            decision = self._decided.get(self._next)
            if decision is None:
                if len(taken) == number:
                    break
                taken.append(self._next)
            self._stored += decision is None or decision.status is Status.STORED
            self._next += 1
        self._pending.update(taken)
        return taken

    def settle(self, decision: Decision) -> None:
        """Note the decision about a candidate that was handed out."""
        self._pending.remove(decision.candidate)
        self._decided[decision.candidate] = decision
        self._stored -= decision.status is not Status.STORED

    @property
    def missing(self) -> int:
        """Episodes that are not stored yet."""
        return self._episodes - self._stored + len(self._pending)

    def settled(self) -> list[Decision]:
        """Return the decisions that count, in the order of the candidates."""
        found = (self._decided.get(candidate) for candidate in range(self._next))
        return [decision for decision in found if decision is not None]


def run_here(job: Assignment, folder: Path, schedule: Schedule) -> Generator[list[Decision]]:
    """Run candidates in this process.

    Args:
        job: What to run.
        folder: Folder of the shards.
        schedule: Candidates; the caller settles the yielded decisions.

    Yields:
        Decisions, once they are on disk.
    """
    runner, number = Runner(job), 1
    try:
        while candidates := schedule.take(number):
            decisions, seconds = runner.store(candidates, folder, lambda: False)
            yield decisions
            number = _shard_size(seconds, len(candidates))
    finally:
        runner.close()


def run_in_processes(
    job: Assignment, folder: Path, schedule: Schedule, processes: int
) -> Generator[list[Decision]]:
    """Run candidates in several new processes (spawn: safe with threads).

    Args:
        job: What to run; it is pickled.
        folder: Folder of the shards.
        schedule: Candidates; the caller settles the yielded decisions.
        processes: At least 1.

    Yields:
        Decisions, once they are on disk.

    Raises:
        InputError: If the job cannot be pickled.
        WorkerError: If a process dies. One that is stopped (SIGSTOP) is replaced, with a warning.
    """
    try:
        payload = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"policy, accept, ...: several processes need arguments that can be pickled ({error}); "
            "pass a function at the top of a module that makes the policy, or processes=1"
        ) from error
    workers: list[_Worker] = []
    try:
        for _ in range(min(processes, schedule.missing)):
            workers.append(_Worker(payload, folder))
        yield from _share(workers, schedule)
    finally:
        _stop(workers)


def _share(workers: list[_Worker], schedule: Schedule) -> Iterator[list[Decision]]:
    while True:
        for worker in workers:
            fair = -(-schedule.missing // (2 * len(workers)))
            if not worker.busy and (candidates := schedule.take(min(worker.number, fair))):
                worker.send(candidates)
        busy = [worker for worker in workers if worker.busy]
        if not busy:
            return
        connections = [worker.connection for worker in busy]
        ends = (worker.process.sentinel for worker in workers)
        ready = connection.wait([*connections, *ends], _LOOK_SECONDS)
        answers = [worker for worker in busy if worker.connection in ready]
        for worker in answers:
            yield worker.receive()
        for worker in busy:
            worker.look()
        if ready and not answers:
            raise WorkerError(next(w for w in workers if w.process.sentinel in ready).epitaph())


@final
class _Worker:
    """Handle of a worker process."""

    def __init__(self, payload: bytes, folder: Path) -> None:
        self._task = payload, folder
        self._start()
        self.busy = False
        self.number = 1

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(*self._task, theirs), name="mpd_gym-collect", daemon=True
        )
        self.process.start()
        theirs.close()

    def send(self, candidates: list[int]) -> None:
        try:
            self.connection.send(candidates)
        except OSError as error:
            raise WorkerError(self.epitaph()) from error
        self.busy = True
        self._candidates, self._moved = candidates, time.monotonic()

    def look(self) -> None:
        """Replace the process, and repeat its candidates, if it has been stopped for long."""
        if not is_stopped(self.process.pid or 0):
            self._moved = time.monotonic()
        elif self.busy and time.monotonic() - self._moved > _STOPPED_SECONDS:
            warnings.warn(
                f"worker process {self.process.pid} has been stopped for {_STOPPED_SECONDS:.0f} s "
                "and is replaced; the data stay the same",
                RuntimeWarning,
                stacklevel=2,
            )
            self.kill()
            self._start()
            self.send(self._candidates)

    def receive(self) -> list[Decision]:
        """Return the decisions that the process stored.

        Raises:
            WorkerError: If it died, or raised an error that cannot be pickled.
            Exception: What the policy, the environment or a check raised.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self.epitaph()) from error
        if isinstance(answer, BaseException):
            raise answer
        decisions, seconds = answer
        self.number = _shard_size(seconds, self.number)
        self.busy = False
        return list(decisions)

    def kill(self) -> None:
        """End the process and free what belongs to it."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process.close()

    def epitaph(self) -> str:
        """Describe how the process ended."""
        self.process.join(timeout=1.0)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
        hint = "" if code and code < 0 else (
            "; a script that collects in several processes must start it under "
            "if __name__ == '__main__':"
        )  # fmt: skip
        return f"worker process {self.process.pid} {how}{hint}"


def _stop(workers: list[_Worker]) -> None:
    """Let the processes finish their episode, within limits."""
    for worker in workers:
        with suppress(OSError):  # it is gone already
            worker.connection.send(None)
    deadline = time.monotonic() + _STOP_SECONDS
    for worker in workers:
        worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        worker.kill()


def _shard_size(seconds: float, number: int) -> int:
    """Return how many episodes to store together, given the seconds that one takes."""
    return max(1, min(_MOST_PER_SHARD, 4 * number, int(_SHARD_SECONDS / max(seconds, 1e-6))))


def _work(payload: bytes, folder: Path, pipe: Connection) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    die_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores already
    try:
        runner = Runner(pickle.loads(payload))
        while (candidates := pipe.recv()) is not None:
            pipe.send(runner.store(candidates, folder, pipe.poll))
        runner.close()
    except EOFError:
        pass  # the parent is gone
    except Exception as error:
        error.add_note(f"in worker process {os.getpid()}:\n{traceback.format_exc()}")
        with suppress(OSError):  # the parent is gone
            pipe.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """Return the error, or a WorkerError with its text if pickle cannot send it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # __reduce__ and __init__ of foreign errors may raise anything
        return WorkerError(f"{type(error).__name__}: {error}\n{''.join(error.__notes__)}")
    return error
