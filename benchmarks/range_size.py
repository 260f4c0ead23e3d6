"""How many elements a range should have: the merge of a base and four experts, in process, at several range sizes.

    python benchmarks/range_size.py [--folder DIR]

Llama-shaped, about 0.47 B bfloat16 parameters each, task arithmetic, 2 threads, warm cache; sizes take turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from merge_speed import EXPERTS, SCALE, write_model

from wemoe_plugin.checkpoints.manifest import sha256_of
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.recipe.loading import load_recipe

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the models; default a temporary folder")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        directory = Path(folder)
        names = ["base", *(f"expert{k}" for k in range(EXPERTS))]
        for seed, name in enumerate(names):
            write_model(directory / name, 24, seed)
        models = ", ".join(f"{{model: {name}}}" for name in names[1:])
        (directory / "recipe.yaml").write_text(
            f"base_model: base\nmodels: [{models}]\nmerge_method: task_arithmetic\nparameters: {{lambda: {SCALE}}}\n"
        )
        plan = plan_merge(load_recipe(directory / "recipe.yaml"))
        out = directory / "out"
        for _ in range(REPEATS + 1):
            for power in range(16, 21):
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                started = time.perf_counter()
                execute_plan(plan, out, jobs=2, chunk_elements=1 << power)
                seconds.setdefault(f"2^{power} elements", []).append(time.perf_counter() - started)
            started = time.perf_counter()
            sha256_of(out / "model.safetensors")
            seconds.setdefault("SHA-256 of the output", []).append(time.perf_counter() - started)
    print(describe_machine(2))
    print(f"medians of {REPEATS} alternating runs")
    for name, values in seconds.items():
        print(f"{name:<24}{statistics.median(values[1:]):>7.2f} s")


if __name__ == "__main__":
    main()
