"""One line about where and when a figure was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path


def describe_machine(threads: int | None = None, device: str = "cpu") -> str:
    """Date, processor (and card), cores, load and versions; figures are not to be quoted without it."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    used = f", {threads} threads" if threads else ""
    card = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{datetime.date.today()}: {model}, {os.cpu_count()} cores{used}{card}{load}, {versions}"
