"""Jobs in processes that outlive them, each with a time limit: one that overruns it, or dies, costs itself alone."""

import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar, final

from corollary.base.errors import CorollaryError

Job = TypeVar("Job")
Answer = TypeVar("Answer")
STARTING = 300.0
"""Seconds that a process may take to import what it needs; on a busy machine torch alone takes many."""

ENDING = 10.0
"""Seconds that a process which has let go may take to say why and to end, before it is killed."""


@final
@dataclass(frozen=True)
class Ended(Generic[Answer]):
    """How a job ended.

    Args:
        index: of the job.
        how: "done", with its answer; "overran": it was killed; "died": its process ended by itself.
        seconds: from when it was handed out.
        exit_code: of the process, where it died; -N for the signal N.
    """

    index: int
    how: Literal["done", "overran", "died"]
    seconds: float
    answer: Answer | None = None
    exit_code: int | None = None


def run_in_processes(
    work: Callable[[Job], Answer], jobs: Sequence[Job], limits: Sequence[float], *, processes: int
) -> Generator[Ended[Answer], None, None]:
    """Run `work(job)` for every job, and give what became of each as soon as it is known.

    A process does one job after the other. One that is killed or dies is replaced. Closing the iterator kills them all.

    Args:
        work: a function of a module (it is sent by name); what it raises ends its process.
        limits: seconds for each job, from when a process that is ready gets it; then the process is killed.
        processes: how many at once, started afresh ("spawn").
    Raises: CorollaryError, if a process ends before it is ready for work.
    """
    waiting = deque(range(len(jobs)))
    workers = [_Worker(work) for _ in range(min(processes, len(jobs)))]
    try:
        while workers:
            timeout = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
            ready = wait([worker.connection for worker in workers], timeout)
            for worker in list(workers):
                if worker.connection in ready:
                    ended = worker.receive()
                elif time.monotonic() > worker.deadline:
                    ended = worker.overrun()
                else:
                    continue
                if ended is not None:
                    yield ended
                if worker.usable and waiting:
                    index = waiting.popleft()
                    worker.give(index, jobs[index], limits[index])
                    continue
                workers.remove(worker)
                worker.kill()
                if waiting:
                    workers.append(_Worker(work))
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process, and the job that it is at; none while it starts."""

    def __init__(self, work: Callable[[Any], Any]):
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        other.close()
        self.index: int | None = None
        self.begun = time.monotonic()
        self.deadline = self.begun + STARTING
        self.usable = True

    def give(self, index: int, job: Any, limit: float) -> None:
        """Hand a job out."""
        self.index, self.begun = index, time.monotonic()
        self.deadline = self.begun + limit
        with suppress(OSError):  # it has just died: what it sends next, nothing, says so
            self.connection.send(job)

    def receive(self) -> Ended | None:
        """What it sent: an answer; that it is ready (None); or the end of its process."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(ENDING)
            self.kill()
            if self.index is None:
                raise CorollaryError(
                    f"a process for verification ended as it started (exit code {self.process.exitcode}). In a script, "
                    'call from under `if __name__ == "__main__":`, since a new process imports the script'
                ) from None
            return Ended(self.index, "died", self._seconds(), exit_code=self.process.exitcode)
        return None if self.index is None else Ended(self.index, "done", self._seconds(), answer)

    def overrun(self) -> Ended | None:
        """End it, past its deadline."""
        self.kill()
        if self.index is None:
            raise CorollaryError(f"a process for verification was not ready after {STARTING:g} s: is the machine busy?")
        return Ended(self.index, "overran", self._seconds())

    def kill(self) -> None:
        """End the process, whatever it is at."""
        if not self.usable:
            return
        self.usable = False
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _seconds(self) -> float:
        return time.monotonic() - self.begun


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """In the process: answer jobs until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's: it kills this process
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(work(job))
