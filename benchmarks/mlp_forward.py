"""Forward pass of an upscaled MLP against the slow per-sample reference and the plain MLP, in one run.

    python benchmarks/mlp_forward.py [--width 768 --hidden 3072 --tokens 50 --experts 8 --batch 16 --rank 16]

Without --width, --hidden or --tokens both shapes are measured, the MLPs of ViT-B/32 and ViT-L/14.

Prints ratios of medians over rounds in which the variants take turns; rounds that other work disturbed are left out
(see rounds.py). Each shape is measured in several processes, and the least and largest of their ratios are printed
beside the median one.

The reference makes a new weight for every expert and sample, so its time depends on where the memory comes from. On a
CPU it is measured twice: with the allocator's defaults, where much of it may come in fresh pages, and with everything
kept that is freed (see pages.py), the kindest case. What is left of its spread is that of the machine's memory, whose
rate is printed too: on shared machines it depends on the neighbours.

On a card the process waits for it before and after every run. --compile and --cuda-graphs leave the reference alone:
it reads its weights on the host.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from machine import describe_machine
from pages import keep_freed_memory
from reference import wemoe_forward  # type: ignore[import-not-found]
from rounds import spread, time_rounds

from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear, Routing
from wemoe_plugin.modeling.forms import DenseForm, Form, LowRankForm, SparseForm
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE
from wemoe_plugin.task_vectors.low_rank import truncated_svd
from wemoe_plugin.task_vectors.sparse import largest

SHAPES = {"ViT-B/32": (768, 3072, 50), "ViT-L/14": (1024, 4096, 257)}
"""Width, hidden width and tokens."""

REFERENCE = "per-sample reference"
WANTED = {"WEMoE dense": "reference / >= 6, / plain <= 3.5", "WEMoE low_rank": "/ plain <= 1.35"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ALLOCATORS = {"default": "the allocator's defaults", "keep": "freed memory kept"}
_ADDING = "adding"

Run = Callable[[], object]


class Mlp(nn.Module):
    """The MLP of a ViT block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


def upscale(
    base: Mlp, experts: list[Mlp], rank: int | None = None, density: float | None = None
) -> WeightEnsemblingMoE:
    """The WEMoE module of these experts, its router at λ = 0.3; dense without a rank or density."""
    width = base.fc1.in_features
    static, routing, lambdas = Mlp(width, base.fc1.out_features), Routing(), [0.3] * len(experts)
    for name in ("fc1", "fc2"):
        layer, own = getattr(base, name), [getattr(expert, name) for expert in experts]
        vectors = torch.stack([e.weight - layer.weight for e in own]).detach()
        biases = torch.stack([e.bias - layer.bias for e in own]).detach()
        weight = layer.weight.detach() + 0.3 * vectors.sum(0)
        bias = layer.bias.detach() + 0.3 * biases.sum(0)
        form: Form
        if rank is not None:
            pairs = [truncated_svd(vector, rank) for vector in vectors]
            down, up = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
            form = LowRankForm(weight, bias, down, up, [rank] * len(own), biases)
        elif density is not None:
            entries = [largest(vector, round(density * vector.numel())) for vector in vectors]
            values, indices = torch.stack([v for v, _ in entries]), torch.stack([i for _, i in entries])
            form = SparseForm(weight, bias, values, indices, biases)
        else:
            form = DenseForm(weight, bias, vectors, biases)
        setattr(static, name, EnsembledLinear(form, routing))
    router = Router(width, len(experts), 2, lambdas)
    nn.init.normal_(router.output.weight, 0.0, 0.01)  # type: ignore[union-attr]
    return WeightEnsemblingMoE(static, router, lambdas, routing)


def graphed(run: Run) -> Run:
    """The same work recorded once on the card and played back."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at the first call must not be recorded
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()

    def replay() -> object:
        graph.replay()
        return y

    return replay


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In the child: median seconds per variant, and how far dense is from the reference."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = Mlp(options.width, options.hidden)
    experts = [Mlp(options.width, options.hidden) for _ in range(options.experts)]
    x = torch.randn(options.batch, options.tokens, options.width)
    ours = {"WEMoE dense": upscale(base, experts), "WEMoE low_rank": upscale(base, experts, rank=options.rank)}
    for density in options.densities:
        ours[f"WEMoE sparse {density:g}"] = upscale(base, experts, density=density)

    dtype = DTYPES[options.dtype]
    modules: dict[str, nn.Module] = {"plain MLP": base, **ours}
    for module in (*modules.values(), *experts):
        module.to(options.device, dtype)
    x = x.to(options.device, dtype)
    router = ours["WEMoE dense"].router

    def reference() -> Tensor:
        y: Tensor = wemoe_forward(base, experts, router(x), x)
        return y

    def variant(module: nn.Module) -> Run:
        called = torch.compile(module) if options.compile else module
        return graphed(lambda: called(x)) if options.cuda_graphs else lambda: called(x)

    with torch.inference_mode():
        expected = reference()
        error = (ours["WEMoE dense"](x) - expected).abs().max() / expected.abs().max()
        variants = {name: variant(module) for name, module in modules.items()}
        variants[REFERENCE] = reference
        wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
        large = [torch.empty_like(base.fc1.weight) for _ in range(3)]
        timings = time_rounds(
            {**variants, _ADDING: partial(torch.add, *large[:2], out=large[2])}, options.repeats, wait
        )
    rate = 3 * large[0].nbytes / timings.seconds.pop(_ADDING)
    return {"error": error.item(), "rate": rate, **timings._asdict()}


def report(name: str, allocator: str, options: argparse.Namespace) -> None:
    """Measure one shape in several processes and print its table."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", allocator]
    for key in ("width", "hidden", "tokens"):
        command += [f"--{key}", str(getattr(options, key))]
    runs = []
    for _ in range(options.processes):
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(child.stdout.splitlines()[-1]))
    ways = [options.dtype, options.device]
    ways += [way for way, on in (("compiled", options.compile), ("CUDA graphs", options.cuda_graphs)) if on]
    print(
        f"\n{name}: width {options.width}, hidden {options.hidden}, {options.tokens} tokens, "
        f"{options.experts} experts, batch {options.batch}, rank {options.rank}, {', '.join(ways)}"
    )
    kept = f"; {ALLOCATORS[allocator]}" if options.device == "cpu" else ""
    rounds = ", ".join(f"{run['quiet']} of {run['rounds']}" for run in runs)
    print(f"{options.processes} processes, alternating rounds, undisturbed: {rounds}{kept}; median (range)")
    rates = [run["rate"] / 1e9 for run in runs]
    print(f"adding two weights moves {spread(rates, 0)} GB/s, which bounds the reference")
    print(f"largest difference between dense and the reference: {max(run['error'] for run in runs):.1e} of the largest")
    print(f"{'':<22}{'ms':>20}{'/ plain':>22}{'reference /':>20}  wanted")
    seconds = [run["seconds"] for run in runs]
    for variant in seconds[0]:
        own = spread([1000 * run[variant] for run in seconds], 1)
        plain = spread([run[variant] / run["plain MLP"] for run in seconds], 2)
        reference = spread([run[REFERENCE] / run[variant] for run in seconds], 1)
        print(f"{variant:<22}{own:>20}{plain:>22}{reference:>20}  {WANTED.get(variant, '')}".rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("width", "hidden", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="measure this shape; what is left out is ViT-B/32's")
    for name, value in {"experts": 8, "batch": 16, "rank": 16, "threads": 2, "repeats": 21, "processes": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.1, 0.01], help="of the sparse form")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--allocators", choices=ALLOCATORS, nargs="*", default=list(ALLOCATORS), help="of a CPU's memory"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the plain MLP and ours")
    parser.add_argument("--cuda-graphs", action="store_true", help="play the plain MLP and ours back as CUDA graphs")
    parser.add_argument("--child", choices=ALLOCATORS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no card that torch can use")
    if options.cuda_graphs and not options.device.startswith("cuda"):
        parser.error("--cuda-graphs needs --device cuda")
    if options.child:
        if options.child == "keep":
            keep_freed_memory()
        print(json.dumps(measure(options)))
        return
    print(describe_machine(options.threads, options.device))
    shapes = SHAPES
    given = (options.width, options.hidden, options.tokens)
    if any(given):
        shape = tuple(own or usual for own, usual in zip(given, SHAPES["ViT-B/32"], strict=True))
        shapes = {"one shape": (shape[0], shape[1], shape[2])}
    allocators = options.allocators if options.device == "cpu" else ["default"]
    for name, (options.width, options.hidden, options.tokens) in shapes.items():
        for allocator in allocators:
            report(name, allocator, options)
    print(describe_machine(options.threads, options.device).partition(", Python")[0] + " at the end")


if __name__ == "__main__":
    main()
