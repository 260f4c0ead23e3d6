"""How long the command answers: ``--help``, and ``plan`` of nine ViT-B/32-sized checkpoints.

    python benchmarks/plan_time.py

Whole processes; the checkpoints are files with true headers and holes for data, since no tensor is read.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from synthetic import write_clip_vit_b32

RUNS = 7


def median_seconds(command: list[str]) -> float:
    """Median wall time of some runs after one that warms the caches."""
    seconds = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    program = str(Path(sys.executable).with_name("wemoe-merge"))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        names = ["base", *(f"expert{k}" for k in range(8))]
        for name in names:
            write_clip_vit_b32(directory / name)
        models = "\n".join(f"  - model: {name}" for name in names[1:])
        (directory / "recipe.yaml").write_text(
            f"base_model: base\nmodels:\n{models}\nmerge_method: task_arithmetic\nparameters: {{lambda: 0.3}}\n"
            "rules: [{match: vision_model.**.mlp, merge_method: wemoe}]\n"
        )
        size = sum(path.stat().st_size for path in directory.glob("*/*.safetensors")) / 1e9
        print(describe_machine())
        print(f"medians of {RUNS} whole processes")
        print(f"wemoe-merge --help                                {median_seconds([program, '--help']):.2f} s")
        seconds = median_seconds([program, "plan", str(directory / "recipe.yaml")])
        print(f"wemoe-merge plan, nine checkpoints ({size:.1f} GB)     {seconds:.2f} s")
        seconds = median_seconds([sys.executable, "-c", "pass"])
        print(f"the interpreter alone                             {seconds:.2f} s")


if __name__ == "__main__":
    main()
