"""A wall-clock limit that long computations look at."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_deadline: ContextVar[float | None] = ContextVar("deadline of bounds", default=None)


class OutOfTime(Exception):
    """The limit was passed; what was being computed is void. Never leaves `certify`."""


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Let bounds computed inside the block stop with `OutOfTime` after `deadline`, by `time.monotonic`."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def check_time() -> None:
    """Raise OutOfTime after the deadline of the block, if there is one."""
    deadline = _deadline.get()
    if deadline is not None and time.monotonic() > deadline:
        raise OutOfTime
