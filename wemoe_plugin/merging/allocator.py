"""The C library's allocator, told to give large buffers back when they are freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def return_large_buffers() -> None:
    """Keep freed buffers from staying with the process, so that the memory in use is the memory that is needed.

    glibc keeps freed blocks of up to 32 MB on its heap once it has seen such, and tensors of different sizes leave
    holes there: a merge of whole tensors would take up to half as much again. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
