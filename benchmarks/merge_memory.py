"""Peak memory of a merge above the imported process, for models of about 0.2 GB and 2 GB.

    python benchmarks/merge_memory.py [--experts 2 --repeats 5]

Each merge runs in a process of its own, which reports what is resident before it and the peak during it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine
from synthetic import Shapes, transformer_shapes, write_weights


def model_shapes(layers: int) -> Shapes:
    """A tower of ViT-L-sized layers, about 25 MB each in bfloat16."""
    return dict(transformer_shapes("vision_model", layers, 1024, 4096))


def memory(key: str) -> int:
    """Bytes resident now (``VmRSS``) or at the peak (``VmHWM``); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run_merge(recipe: Path, out: Path) -> None:
    """In the child: merge and print the peaks in bytes."""
    import torch  # noqa: F401 (what is imported belongs to the process, not to the merge)

    from wemoe_plugin.merging.executor import execute_plan
    from wemoe_plugin.merging.memory import peak_memory
    from wemoe_plugin.merging.plan import plan_merge
    from wemoe_plugin.recipe.loading import load_recipe

    plan = plan_merge(load_recipe(recipe))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    out.mkdir()
    execute_plan(plan, out, jobs=2)
    after = memory("VmHWM")
    predicted = peak_memory(plan.operations, plan.dtype, 2)
    print(json.dumps({"imported": before, "merge": after - before, "predicted": predicted, "read": plan.bytes_read}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_merge(*options.run)
        return
    print(describe_machine())
    print(
        f"task arithmetic and dense WEMoE MLPs, {options.experts} experts, bfloat16, 2 threads; MB above the import\n"
    )
    print(f"{'model':>8}{'read':>10}{'peak':>9}{'min - max':>16}{'predicted':>11}{'imported':>10}")
    peaks = []
    for layers in (8, 80):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            names = ["base", *(f"expert{k}" for k in range(options.experts))]
            for seed, name in enumerate(names):
                (directory / name).mkdir()
                (directory / name / "config.json").write_text("{}")
                size = write_weights(directory / name / "model.safetensors", model_shapes(layers), "BF16", seed)
            models = "\n".join(f"  - model: {name}" for name in names[1:])
            recipe = directory / "recipe.yaml"
            recipe.write_text(
                f"base_model: base\nmodels:\n{models}\n"
                "merge_method: task_arithmetic\nparameters: {lambda: 0.3}\n"
                "rules: [{match: mlp, merge_method: wemoe}]\n"
            )
            command = [sys.executable, __file__, "--run", str(recipe), str(directory / "out")]
            runs = []
            for _ in range(options.repeats):
                child = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(child.stdout))
                shutil.rmtree(directory / "out")
        seen = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        low, high = (f(run["merge"] for run in runs) / 1e6 for f in (min, max))
        peaks.append(seen["merge"])
        columns = (seen["read"] / 1e9, seen["merge"] / 1e6, low, high, seen["predicted"] / 1e6, seen["imported"] / 1e6)
        row = "{:>5.2f} GB{:>7.2f} GB{:>9.1f}{:>8.1f} -{:>6.1f}{:>11.1f}{:>10.0f}"
        print(row.format(size / 1e9, *columns))
    print(f"\nratio of the median peaks: {peaks[1] / peaks[0]:.2f}")


if __name__ == "__main__":
    main()
