"""Memory that each whole-tensor method's kernel takes beside its inputs, in tensors of the inputs' size.

    python benchmarks/method_memory.py [--elements 4194304]

For two, four and eight experts; `wemoe_plugin/merging/memory.py` predicts with the straight line above these figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import describe_machine
from merge_memory import memory

from wemoe_plugin.merging.allocator import return_large_buffers
from wemoe_plugin.merging.memory import KERNELS
from wemoe_plugin.merging.mergekit_bridge import merge_tensors
from wemoe_plugin.merging.operations import Delegate, OutputTensor
from wemoe_plugin.recipe.methods import METHODS, STREAMED


def kernel_tensors(name: str, experts: int, rows: int, columns: int) -> float:
    """Peak bytes of one call above its inputs, over the bytes of one input."""
    method = METHODS[name]
    has_base = method.base == "required"
    tensors = [torch.randn(rows, columns) * 0.02 for _ in range(experts + has_base)]
    special = {"density": 0.5, "select_topk": 0.5, "t": 0.5}
    values = {key: special.get(key, spec.default) for key, spec in method.parameters.items()}
    shared = {key: value for key, value in values.items() if method.parameters[key].scope == "all"}
    own = {key: value for key, value in values.items() if method.parameters[key].scope == "model"}
    operation = Delegate(
        OutputTensor("w", "F32", (rows, columns)),
        name,
        "F32",
        (),
        experts if has_base else None,
        {key: value for key, value in shared.items() if value is not None},
        (own,) * len(tensors),
        0 if method.random else None,
    )
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        merge_tensors(operation, tensors)
    return (memory("VmHWM") - before) / (4 * rows * columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    return_large_buffers()
    print(describe_machine(1))
    print(f"{options.rows} x {options.columns}, float32\n")
    print(f"{'method':<18}{'K = 2':>8}{'K = 4':>8}{'K = 8':>8}{'predicted for 2':>18}{'4':>8}{'8':>8}")
    for name, method in METHODS.items():
        if name in STREAMED:
            continue
        most = method.others[1] or (method.inputs[1] or 9) - (method.base == "required")
        counts = [k for k in (2, 4, 8) if k <= most] or [most]
        for k in counts:  # the first call of all takes what stays
            kernel_tensors(name, k, 64, 64)
        found = [kernel_tensors(name, k, options.rows, options.columns) for k in counts]
        shape = (options.rows, options.columns)
        row = "".join(f"{value:>8.2f}" for value in found).ljust(24)
        print(
            f"{name:<18}{row}{'':>10}" + "".join(f"{KERNELS[name].tensors(k, shape):>8.1f}" for k in counts), flush=True
        )


if __name__ == "__main__":
    main()
