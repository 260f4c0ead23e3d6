"""What the C library's allocator does with the pages of freed tensors, and how many pages a piece of work takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from merge_memory import memory

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let the process keep all it frees, so that no timing holds the system's work of handing out zeroed pages.

    By default glibc moves its thresholds while a program runs: whether a freed tensor of 10 MB goes back to the system
    depends on the tensors freed before it, and so on the run. Programs that compose whole weights spend up to four
    fifths of their time on fresh pages where it does, and none where it does not. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_above(run: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak above what is resident before it, what it returns included; Linux.

    Only in a process that has called `wemoe_plugin.merging.allocator.return_large_buffers`: elsewhere what was freed
    before is still resident, and a call that uses it again seems to take nothing.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    result = run()
    peak = memory("VmHWM") - before
    del result
    return peak
