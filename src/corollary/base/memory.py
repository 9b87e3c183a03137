"""How the process holds memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers in malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the process keep what it frees, instead of handing large blocks back to the system each time.

    With glibc every tensor of some megabytes is otherwise mapped, faulted in page by page and unmapped again, which
    takes longer than computing it. Elsewhere nothing is done. For a command's own process only: it is global.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
