"""One tuning step through upscaled MLP blocks against plain autograd through composed weights, in one run.

    python benchmarks/tuning_step.py [--blocks 12 --width 768 --hidden 3072 --tokens 50 --experts 8 --batch 16]

A step is the forward pass through ``blocks`` residual blocks x + mlp(norm(x)) and the backward pass to the routers'
parameters and through x. The reference composes W₀ + Σₖ w_bk τₖ for every sample with differentiable operations and
uses them in functional linear layers: one expert after the other, as an ordinary implementation does, or with one
product over all experts, as a careful one does.

First the gradients of each form are compared with the reference's. Then seconds are printed, medians of alternating
rounds, and the peak memory of one step above what the process holds before it (the weights and the input; the
gradients of the routers are part of the peak), each variant's in a process of its own. The blocks are copies of one
another, each with memory of its own.

How long the reference takes depends on where its many tensors come from, so the variants are timed in two processes:
one returns freed tensors to the system, so that each new one comes in fresh pages of 4 KiB, and one keeps them and
asks for huge pages, so that from the second step on none is fresh. Left to its defaults (--allocators default), glibc
2.36 does neither: the reference's tensors leave holes that no later one fits into.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from machine import describe_machine
from mlp_forward import Mlp, upscale
from pages import keep_freed_memory, peak_above
from rounds import time_rounds
from torch import Tensor, nn

from wemoe_plugin.merging.allocator import return_large_buffers
from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear
from wemoe_plugin.modeling.forms import DenseForm, LowRankForm
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE

TOLERANCE = 1e-3
"""Largest distance of a gradient from the reference's, of the gradient's norm. Rounding alone gives 1e-5, but the ReLU
of a router lets a token's gradient pass or not, and which it does may hang on rounding where its input is near zero:
the two references differ by as much from each other."""

REFERENCE = "composed, expert by expert"
ONE_PRODUCT = "composed, one product"
ALLOCATORS = {
    "returned": "freed memory returned",
    "huge": "freed memory kept, huge pages",
    "default": "the allocator's defaults",
}


class ComposedMlp(nn.Module):
    """A WEMoE MLP that composes the weights of one sample after the other and leaves the rest to autograd."""

    def __init__(self, ours: WeightEnsemblingMoE, one_product: bool = False) -> None:
        super().__init__()
        self.router, self.one_product = ours.router, one_product
        lambdas = ours.lambdas
        for name in ("fc1", "fc2"):
            weight, bias, vectors, bias_vectors = whole(getattr(ours.module, name))
            self.register_buffer(f"{name}_weight", weight - torch.tensordot(lambdas, vectors, 1))
            self.register_buffer(f"{name}_bias", bias - lambdas @ bias_vectors)
            self.register_buffer(f"{name}_vectors", vectors)
            self.register_buffer(f"{name}_bias_vectors", bias_vectors)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x)
        return torch.stack([self._sample(own, sample) for own, sample in zip(weights, x, strict=True)])

    def _sample(self, weights: Tensor, x: Tensor) -> Tensor:
        hidden = F.linear(x, self._composed("fc1_weight", weights), self._composed("fc1_bias", weights))
        return F.linear(F.gelu(hidden), self._composed("fc2_weight", weights), self._composed("fc2_bias", weights))

    def _composed(self, name: str, weights: Tensor) -> Tensor:
        kind = name.removesuffix("weight").removesuffix("bias")
        vectors = self.get_buffer(f"{kind}{'bias_vectors' if name.endswith('bias') else 'vectors'}")
        result = self.get_buffer(name)
        if self.one_product:
            return torch.add(result, torch.tensordot(weights, vectors, 1))
        for weight, vector in zip(weights, vectors, strict=True):
            result = result + weight * vector
        return result


class Block(nn.Module):
    """A residual block of which only the router is tuned."""

    def __init__(self, norm: nn.LayerNorm, mlp: WeightEnsemblingMoE | ComposedMlp) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp
        self.requires_grad_(False)
        mlp.router.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(x))
        return y


def whole(layer: EnsembledLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Static weight and bias, and the task vectors of both, whatever their form."""
    form = layer.form
    if isinstance(form, DenseForm):
        return form.weight, cast(Tensor, form.bias), form.stack[1:], cast(Tensor, form.bias_vectors)
    assert isinstance(form, LowRankForm)
    experts = int(form.owners.max()) + 1
    up, bias_vectors = form.up[:-experts], form.up[-experts:]
    vectors = torch.stack([up[form.owners == k].T @ form.down[form.owners == k] for k in range(experts)])
    return form.weight, cast(Tensor, form.bias), vectors, bias_vectors


def network(options: argparse.Namespace, rank: int | None, blocks: int) -> list[Block]:
    """Upscaled blocks."""
    torch.manual_seed(0)
    base = Mlp(options.width, options.hidden)
    experts = [Mlp(options.width, options.hidden) for _ in range(options.experts)]
    block = Block(nn.LayerNorm(options.width), upscale(base, experts, rank))
    return [copy.deepcopy(block) for _ in range(blocks)]


def composed_network(blocks: list[Block], one_product: bool = False) -> list[Block]:
    """The same network by plain autograd; it shares the routers and dense task vectors."""
    return [Block(block.norm, ComposedMlp(cast(WeightEnsemblingMoE, block.mlp), one_product)) for block in blocks]


def step(blocks: list[Block], x: Tensor, slope: Tensor) -> list[Tensor]:
    """Gradients of Σ slope · blocks(x), of x first and then of the routers' parameters."""
    y = x
    for block in blocks:
        y = block(y)
    trained = [x, *(parameter for block in blocks for parameter in block.mlp.router.parameters())]
    return list(torch.autograd.grad(y, trained, slope))


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """x, and the gradient of the loss by the output."""
    generator = torch.Generator().manual_seed(1)
    shape = options.batch, options.tokens, options.width
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


def largest_difference(ours: list[Tensor], reference: list[Tensor]) -> float:
    """The largest distance of a gradient from the reference's, relative to its norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, reference, strict=True))


def measure_memory(options: argparse.Namespace) -> int:
    """In a child: bytes that one step takes."""
    return_large_buffers()
    blocks = network(options, options.rank if options.memory == "WEMoE low_rank" else None, options.blocks)
    if options.memory in (REFERENCE, ONE_PRODUCT):
        blocks = composed_network(blocks, options.memory == ONE_PRODUCT)
    x, slope = inputs(options)
    # What libraries set up and import at the first call is not the step's; one sample is enough for it.
    step(blocks[:1], x[:1].detach().requires_grad_(), slope[:1])
    return peak_above(lambda: step(blocks, x, slope))


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """In a child: seconds of all variants, and how far their gradients are from the reference's."""
    if options.time == "huge":
        keep_freed_memory()
    elif options.time == "returned":
        return_large_buffers()
    x, slope = inputs(options)
    low_rank = network(options, options.rank, options.blocks)
    dense = network(options, None, options.blocks)
    networks = {
        "WEMoE dense": dense,
        "WEMoE low_rank": low_rank,
        ONE_PRODUCT: composed_network(dense, one_product=True),
        REFERENCE: composed_network(dense),
    }
    few = low_rank[:2]  # their task vectors written out take memory of their own
    expected = step(networks[REFERENCE], x, slope)
    errors = {
        "dense": largest_difference(step(dense, x, slope), expected),
        f"low_rank, {len(few)} blocks": largest_difference(step(few, x, slope), step(composed_network(few), x, slope)),
    }
    del expected, few
    variants: dict[str, Callable[[], object]] = {
        name: partial(step, blocks, x, slope) for name, blocks in networks.items()
    }
    return {"errors": errors, **time_rounds(variants, options.repeats)._asdict()}


def limit_memory() -> None:
    """End in an error, not with a machine that stands still, if three quarters of its memory do not suffice."""
    most = 3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def child(flag: str, value: str) -> Any:
    """What a process of its own measures."""
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1" if value == "huge" else "0"}  # read by torch
    command = [sys.executable, __file__, *sys.argv[1:], flag, value]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"blocks": 12, "width": 768, "hidden": 3072, "tokens": 50, "experts": 8, "batch": 16, "rank": 16}
    for name, value in {**defaults, "threads": 2, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--allocators", choices=ALLOCATORS, nargs="*", default=["returned", "huge"])
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory or options.time:
        limit_memory()
        try:
            print(json.dumps(measure_memory(options) if options.memory else measure_time(options)))
        except RuntimeError as failure:
            if "can't allocate memory" not in str(failure):
                raise
            print(json.dumps(None))
        return

    print(describe_machine(options.threads))
    print(
        f"{options.blocks} blocks, width {options.width}, hidden {options.hidden}, {options.tokens} tokens, "
        f"{options.experts} experts, batch {options.batch}, rank {options.rank}, float32",
        flush=True,
    )
    names = ["WEMoE dense", "WEMoE low_rank", ONE_PRODUCT, REFERENCE]
    peaks = {name: child("--memory", name) for name in names}
    print(f"\npeak memory of one step\n{'':<28}{'MB':>8}{'/ reference':>13}")
    for name in names:
        print(f"{name:<28}{peaks[name] / 1e6:>8.0f}{peaks[name] / peaks[REFERENCE]:>13.2f}", flush=True)
    for allocator in options.allocators:
        timed = child("--time", allocator)
        if timed is None:
            print(f"\n{ALLOCATORS[allocator]}: three quarters of this machine's memory do not suffice")
            continue
        print(f"\n{ALLOCATORS[allocator]}: medians of alternating rounds, ", end="")
        print(f"{timed['quiet']} of {timed['rounds']} undisturbed")
        for name, error in timed["errors"].items():
            print(f"gradients of {name}: within {error:.1e} of the reference's (at most {TOLERANCE:.0e})")
            if not error <= TOLERANCE:
                sys.exit("the gradients differ")
        print(f"{'':<28}{'seconds':>8}{'reference /':>13}{'one product /':>15}")
        for name in names:
            seconds = timed["seconds"]
            times = [f"{seconds[other] / seconds[name]:.1f}x" for other in (REFERENCE, ONE_PRODUCT)]
            print(f"{name:<28}{seconds[name]:>8.2f}{times[0]:>13}{times[1]:>15}", flush=True)
    print("\nwanted of dense: reference / >= 6, MB / reference <= 0.33")
    print(describe_machine(options.threads).partition(", Python")[0] + " at the end")


if __name__ == "__main__":
    main()
