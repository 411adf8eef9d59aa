"""Memory of the process: what is freed is kept for the next step, and how much it ever held."""

import ctypes
import gc
import sys
from pathlib import Path

# glibc's parameters (malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of handing it back to the operating system.

    A training step allocates and frees the same gigabytes every time. By default each large tensor
    is mapped anew, and the kernel has to give and clear every page of it again: up to half of a
    step's time on a CPU. Elsewhere than on glibc nothing is done.
    """
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    set_option(_MMAP_MAX, 0)
    set_option(_ARENA_MAX, 1)
    set_option(_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory() -> int:
    """The most bytes that this process has held in main memory (resident) so far."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def forget_peak_memory() -> None:
    """Hand back what is free and let `peak_memory` begin anew, where Linux and glibc allow it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return
