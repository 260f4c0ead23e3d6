"""A Llama-shaped base and four experts of about 0.47 B bfloat16 parameters each: ours and mergekit's.

    python benchmarks/merge_speed.py [--method ties] [--repeats 3] [--max-memory 4GiB] [--folder DIR]

Alternating whole processes with a warm cache, and the time that plain copies of all inputs and one output take. Prints
ratios of medians, the time of the merge itself (without starting and planning), peak memory, and for task arithmetic
the root mean square error of both results against float64 and the peak for a model four times as large.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from synthetic import Shapes, write_weights

EXPERTS, SCALE = 4, 0.3


def llama_shapes(layers: int) -> Shapes:
    """Llama's tensors at width 1024: 24 layers are 0.47 B parameters."""
    width, hidden, vocabulary = 1024, 4096, 32000
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write_model(directory: Path, layers: int, seed: int | None) -> int:
    """A transformers directory; returns the size of its weights in bytes."""
    directory.mkdir()
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024},
        **{"intermediate_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False, "dtype": "bfloat16"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return write_weights(directory / "model.safetensors", llama_shapes(layers), "BF16", seed)


def run(command: list[str]) -> tuple[float, str]:
    """Wall seconds of one process, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return seconds, done.stdout


def peak_of(command: list[str]) -> float:
    """Peak resident bytes of one process, measured by a parent of its own."""
    code = (
        "import resource,subprocess,sys;"
        "subprocess.run(sys.argv[1:],check=True,stdout=subprocess.DEVNULL,stderr=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True).stdout)


def copy_seconds(directory: Path, names: list[str]) -> float:
    """Read every input and write one output with plain large reads and writes."""
    started = time.perf_counter()
    buffer = bytearray(1 << 24)
    with (directory / "copied").open("wb", buffering=0) as out:
        for name in names:
            with (directory / name / "model.safetensors").open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    if name == names[0]:
                        out.write(memoryview(buffer)[:count])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    (directory / "copied").unlink()
    return seconds


def recipe_for(directory: Path, names: list[str], method: str) -> Path:
    """Write the recipe: task arithmetic, or a method of mergekit's in float32 with half of each task vector kept."""
    models = "\n".join(f"  - model: {directory / n}\n    parameters: {{weight: 1.0}}" for n in names[1:])
    more = "" if method == "task_arithmetic" else ", density: 0.5}\ndtype: float32"
    path = directory / "recipe.yaml"
    path.write_text(
        f"base_model: {directory / 'base'}\nmodels:\n{models}\nmerge_method: {method}\n"
        f"parameters: {{lambda: {SCALE}{more or '}'}\nout_dtype: bfloat16\n"
    )
    return path


def peak_of_four_times(command: list[str], layers: int) -> float:
    """Peak resident bytes of our merge of a model four times as large; its files are holes, which read as zeros."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        names = ["base", *(f"expert{k}" for k in range(EXPERTS))]
        for name in names:
            write_model(directory / name, 4 * layers, None)
        return peak_of([command[0], str(recipe_for(directory, names, "task_arithmetic")), *command[2:]])


def rms_error(directory: Path, names: list[str], out: Path) -> float:
    """Root mean square difference of a merge from the same merge in float64, over some tensors."""
    import torch
    from safetensors.torch import load_file

    total, count = 0.0, 0
    inputs = [load_file(directory / name / "model.safetensors") for name in names]
    merged = load_file(next(out.glob("*.safetensors")))
    for key in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        base, *experts = (file[key].to(torch.float64) for file in inputs)
        exact = base + SCALE * sum(expert - base for expert in experts)
        total += float((merged[key].to(torch.float64) - exact).square().sum())
        count += exact.numel()
    return float((total / count) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="where to make the models; default a temporary folder")
    parser.add_argument("--method", default="task_arithmetic", choices=["task_arithmetic", "ties", "dare_ties"])
    parser.add_argument("--max-memory", help="for ours")
    options = parser.parse_args()
    plain = options.method == "task_arithmetic"
    binaries = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        directory = Path(folder)
        names = ["base", *(f"expert{k}" for k in range(EXPERTS))]
        size = sum(write_model(directory / name, options.layers, seed) for seed, name in enumerate(names))
        recipe = recipe_for(directory, names, options.method)
        outs = {"wemoe-merge": directory / "ours", "mergekit-yaml": directory / "theirs"}
        ours = [str(binaries / "wemoe-merge"), str(recipe), "--out", str(outs["wemoe-merge"]), "--json"]
        ours += ["--max-memory", options.max_memory] if options.max_memory else []
        commands = {
            "wemoe-merge": ours,
            "mergekit-yaml": [str(binaries / "mergekit-yaml"), str(recipe), str(outs["mergekit-yaml"])],
        }
        seconds: dict[str, list[float]] = {
            "plain copies": [],
            "the merge itself": [],
            **{name: [] for name in commands},
        }
        for _ in range(options.repeats + plain):  # where kernels take minutes, a cold cache does not matter
            seconds["plain copies"].append(copy_seconds(directory, names))
            for name, command in commands.items():
                shutil.rmtree(outs[name], ignore_errors=True)
                taken, printed = run(command)
                seconds[name].append(taken)
                if name == "wemoe-merge":
                    seconds["the merge itself"].append(json.loads(printed)["seconds"]["merge"])
        errors = {name: rms_error(directory, names, out) for name, out in outs.items()} if plain else {}
        peaks = {}
        for name, command in commands.items():
            shutil.rmtree(outs[name])
            peaks[name] = peak_of(command)
        shutil.rmtree(outs["wemoe-merge"])
        larger = peak_of_four_times(ours, options.layers) if plain else None
    medians = {name: statistics.median(values[plain:]) for name, values in seconds.items()}
    limit = f", --max-memory {options.max_memory}" if options.max_memory else ""
    print(describe_machine())
    print(f"{options.method}{limit}: {size / 1e9:.2f} GB read; medians of {options.repeats}\n")
    print(f"{'':<18}{'seconds':>9}{'/ mergekit':>12}{'/ copies':>10}{'peak MB':>9}{'rms error':>11}")
    for name, median in medians.items():
        more = f"{peaks[name] / 1e6:>9.0f}" if name in peaks else ""
        more += f"{errors[name]:>11.2e}" if name in errors else ""
        ratios = f"{median / medians['mergekit-yaml']:>12.3f}{median / medians['plain copies']:>10.2f}"
        print(f"{name:<18}{median:>9.2f}{ratios}{more}")
    if larger is not None:
        print(f"\npeak of wemoe-merge for a model four times as large: {larger / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
