"""Working memory of one upscaled layer beside its input and output: bounded by ``working_bytes`` whatever the batch.

    python benchmarks/working_memory.py [--width 768 --hidden 3072 --tokens 50 --experts 8 --density 0.1]

Every row is measured in processes of its own. Forward: the peak above the model and the input, less the output.
Backward, to the offsets and the input: the peak above the model, input, output and its gradient, less the gradients.

A CPU composes less at a time than it may, so that its caches hold it; other devices do not. What they would take is
measured on the CPU with that bound taken away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import torch
from machine import describe_machine
from pages import peak_above
from torch import Tensor

from wemoe_plugin.merging.allocator import return_large_buffers
from wemoe_plugin.modeling import composition
from wemoe_plugin.modeling.forms import DenseForm, SparseForm
from wemoe_plugin.task_vectors.sparse import largest

MIB = 2**20


def build(options: argparse.Namespace) -> DenseForm | SparseForm:
    """The layer."""
    shape = options.hidden, options.width
    weight, bias = torch.randn(shape), torch.randn(options.hidden)
    bias_vectors = torch.randn(options.experts, options.hidden)
    if options.form == "dense":
        vectors = torch.randn(options.experts, *shape)
        return DenseForm(weight, bias, vectors, bias_vectors, options.working_bytes)
    count = round(options.density * weight.numel())
    entries = [largest(torch.randn(shape), count) for _ in range(options.experts)]
    values, indices = torch.stack([v for v, _ in entries]), torch.stack([i for _, i in entries])
    return SparseForm(weight, bias, values, indices, bias_vectors, options.working_bytes)


def measure(options: argparse.Namespace) -> list[int]:
    """In the child: bytes of working memory, forward for every batch and then backward."""
    return_large_buffers()
    if options.uncapped:
        composition._CACHE_BYTES = composition._GROUP = 2**62
    torch.manual_seed(0)
    form = build(options)

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, options.tokens, options.width), torch.randn(batch, options.experts)

    def forward(batch: int) -> int:
        x, offsets = inputs(batch)
        with torch.no_grad():
            return peak_above(lambda: form(x, offsets)) - 4 * batch * int(options.tokens * options.hidden)

    def backward(batch: int) -> int:
        x, offsets = (each.requires_grad_() for each in inputs(batch))
        y = form(x, offsets)
        slope = torch.randn_like(y)
        return peak_above(lambda: torch.autograd.grad(y, (x, offsets), slope)) - 4 * x.numel()

    backward(1)  # what libraries set up and import at the first call is not the layer's
    return [run(batch) for run in (forward, backward) for batch in options.batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 768, "hidden": 3072, "tokens": 50, "experts": 8, "threads": 2, "processes": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--density", type=float, default=0.1, help="of the sparse form")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument("--mebibytes", type=int, nargs="*", default=[256, 4], help="the values of working_bytes")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--working-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--uncapped", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.form:
        print(json.dumps(measure(options)))
        return

    print(describe_machine(options.threads))
    print(
        f"one layer {options.width} -> {options.hidden}, {options.tokens} tokens, {options.experts} experts, float32, "
        f"sparse density {options.density:g}; MiB, medians of {options.processes} processes\n"
    )
    heads = [f"{way} {batch}" for way in ("forward", "backward") for batch in options.batches]
    print(f"{'form':<8}{'bound for caches':<18}{'working_bytes':>13}", *(f"{head:>14}" for head in heads), sep="")
    for form in ("dense", "sparse"):
        for uncapped in (False, True):
            for limit in options.mebibytes:
                command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
                command += ["--working-bytes", str(limit * MIB), *["--uncapped"] * uncapped]
                runs = []
                for _ in range(options.processes):
                    child = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                    runs.append(json.loads(child.stdout))
                taken = [statistics.median(column) / MIB for column in zip(*runs, strict=True)]
                print(f"{form:<8}{'no' if uncapped else 'yes':<18}{limit:>9} MiB", end="")
                print(*(f"{each:>14.1f}" for each in taken), sep="", flush=True)


if __name__ == "__main__":
    main()
