"""Peak memory of a merge above the imported process, and what the plan predicted.

    python benchmarks/merge_memory.py [--experts 2 --repeats 5]

One row per way of merging, and models ten times as large for the ways that must not notice. Each merge runs in a
process of its own, which reports what is resident before it and the peak during it.
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


def upscaled(task_vectors: str) -> str:
    """A recipe's method and the rule that upscales its MLPs."""
    rule = f"{{match: mlp, merge_method: wemoe, parameters: {{task_vectors: {task_vectors}}}}}"
    return f"merge_method: task_arithmetic\nrules: [{rule}]"


WAYS = {
    "task arithmetic": ("merge_method: task_arithmetic", 8),
    "the same, ten times": ("merge_method: task_arithmetic", 80),
    "dense wemoe": ("merge_method: task_arithmetic\nrules: [{match: mlp, merge_method: wemoe}]", 8),
    "the same, ten times ": ("merge_method: task_arithmetic\nrules: [{match: mlp, merge_method: wemoe}]", 80),
    "low-rank wemoe": (upscaled("{form: low_rank, rank: 16}"), 8),
    "low-rank wemoe, r 256": (upscaled("{form: low_rank, rank: 256}"), 2),
    "low-rank wemoe, 95 %": (upscaled("{form: low_rank, energy: 0.95}"), 2),
    "low-rank wemoe, 1.3x": (upscaled("{form: low_rank, max_parameters: 1.3x}"), 2),
    "sparse wemoe, 10 %": (upscaled("{form: sparse, density: 0.1}"), 8),
    "sparse wemoe, 50 %": (upscaled("{form: sparse, density: 0.5}"), 2),
    "ties": ("merge_method: ties\nparameters: {density: 0.5}", 8),
    "dare_ties": ("merge_method: dare_ties\nparameters: {density: 0.5}", 8),
    "della": ("merge_method: della\nparameters: {density: 0.5}", 8),
    "breadcrumbs": ("merge_method: breadcrumbs\nparameters: {density: 0.5}", 8),
    "sce": ("merge_method: sce\nparameters: {select_topk: 0.5}", 8),
    "model_stock": ("merge_method: model_stock", 8),
    "multislerp": ("merge_method: multislerp", 8),
    "karcher": ("merge_method: karcher", 8),
    "ram": ("merge_method: ram", 8),
    "iso_c": ("merge_method: iso_c", 8),
    "tsv_m": ("merge_method: tsv_m", 8),
}


def model_shapes(layers: int) -> Shapes:
    """A tower of ViT-L-sized layers, about 25 MB each in bfloat16."""
    return dict(transformer_shapes("vision_model", layers, 1024, 4096))


def memory(key: str) -> int:
    """Bytes resident now (``VmRSS``) or at the peak (``VmHWM``); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run_merge(recipe: Path, out: Path) -> None:
    """In the child: merge and print the peaks in bytes."""
    from wemoe_plugin.merging.executor import execute_plan
    from wemoe_plugin.merging.memory import is_plain, peak_memory
    from wemoe_plugin.merging.operations import Delegate
    from wemoe_plugin.merging.planner import plan_merge
    from wemoe_plugin.merging.survey import settle, survey_memory
    from wemoe_plugin.recipe.loading import load_recipe

    source = load_recipe(recipe)
    plan = plan_merge(source)
    # What is imported belongs to the process, not to the merge.
    if not all(is_plain(operation, plan.dtype) for operation in plan.operations):
        import wemoe_plugin.merging.tensor_worker
    if any(isinstance(operation, Delegate) for operation in plan.operations):
        import wemoe_plugin.merging.mergekit_bridge  # noqa: F401
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    out.mkdir()
    settled = settle(source, plan, jobs=2)
    execute_plan(settled, out, jobs=2)
    after = memory("VmHWM")
    predicted = max(peak_memory(settled.operations, plan.dtype, 2), survey_memory(source, plan, 2))
    print(json.dumps({"imported": before, "merge": after - before, "predicted": predicted, "read": plan.bytes_read}))


def measure(way: str, experts: int, repeats: int) -> dict[str, float]:
    """Medians over processes, in bytes."""
    text, layers = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        names = ["base", *(f"expert{k}" for k in range(experts))]
        for seed, name in enumerate(names):
            (directory / name).mkdir()
            (directory / name / "config.json").write_text("{}")
            write_weights(directory / name / "model.safetensors", model_shapes(layers), "BF16", seed)
        models = "\n".join(f"  - model: {name}" for name in names[1:])
        recipe = directory / "recipe.yaml"
        recipe.write_text(f"base_model: base\nmodels:\n{models}\n{text}\n")
        command = [sys.executable, __file__, "--run", str(recipe), str(directory / "out")]
        runs = []
        for _ in range(repeats):
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(child.stdout))
            shutil.rmtree(directory / "out")
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, action="append", help="default all")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_merge(*options.run)
        return
    print(describe_machine())
    print(f"{options.experts} experts, bfloat16, 2 threads, medians of {options.repeats}; MB above the import\n")
    print(f"{'way':<22}{'read':>10}{'peak':>9}{'predicted':>11}{'ratio':>7}{'imported':>10}")
    for way in options.way or WAYS:
        seen = measure(way, options.experts, options.repeats)
        ratio = seen["predicted"] / seen["merge"]
        columns = (
            f"{seen['merge'] / 1e6:>9.1f}{seen['predicted'] / 1e6:>11.1f}{ratio:>7.2f}{seen['imported'] / 1e6:>10.0f}"
        )
        print(f"{way:<22}{seen['read'] / 1e9:>7.2f} GB{columns}", flush=True)


if __name__ == "__main__":
    main()
