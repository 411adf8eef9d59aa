"""Memory of the process: what is freed is kept for the next step."""

import ctypes

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
