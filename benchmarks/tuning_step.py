"""One tuning step through upscaled MLP blocks against plain autograd through composed weights, in one run.

    python benchmarks/tuning_step.py [--blocks 12 --width 768 --hidden 3072 --tokens 50 --experts 8 --batch 16]

A step is the forward pass through ``blocks`` residual blocks x + mlp(norm(x)) and the backward pass to the routers'
parameters and through x. The reference composes W₀ + Σₖ w_bk τₖ for every sample with differentiable operations, one
expert after the other, and uses them in functional linear layers: what an ordinary implementation does.

Prints medians of seconds of alternating rounds and the peak memory of one step, each variant's in processes of its
own, above what the process holds before the step: the weights and the input. The gradients of the routers are part of
it. The blocks are copies of one another, each with memory of its own.

First the gradients of each form are compared with the reference's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import cast

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

TOLERANCE = 1e-4
"""Largest difference of a gradient from the reference's, of the gradient's largest entry."""

REFERENCE = "composed by autograd"
WANTED = {"WEMoE dense": "reference / >= 6, of the reference's memory <= 1/3"}


class ComposedMlp(nn.Module):
    """A WEMoE MLP that composes the weights of one sample after the other and leaves the rest to autograd."""

    def __init__(self, ours: WeightEnsemblingMoE) -> None:
        super().__init__()
        self.router = ours.router
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


def composed_network(blocks: list[Block]) -> list[Block]:
    """The same network by plain autograd; it shares the routers and dense task vectors."""
    return [Block(block.norm, ComposedMlp(cast(WeightEnsemblingMoE, block.mlp))) for block in blocks]


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
    """Of any gradient, relative to the gradient's largest entry."""
    pairs = zip(ours, reference, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure_memory(options: argparse.Namespace) -> int:
    """In the child: bytes that one step takes."""
    return_large_buffers()
    blocks = network(options, options.rank if options.child == "WEMoE low_rank" else None, options.blocks)
    if options.child == REFERENCE:
        blocks = composed_network(blocks)
    x, slope = inputs(options)
    # What libraries set up at the first call is not the step's; one sample is enough for it.
    step(blocks[:1], x[:1].detach().requires_grad_(), slope[:1])
    return peak_above(lambda: step(blocks, x, slope))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"blocks": 12, "width": 768, "hidden": 3072, "tokens": 50, "experts": 8, "batch": 16, "rank": 16}
    for name, value in {**defaults, "threads": 2, "repeats": 5, "processes": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--allocator", choices=["keep", "default"], default="keep", help="of the timed process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure_memory(options)))
        return
    if options.allocator == "keep":
        keep_freed_memory()
    print(describe_machine(options.threads))
    print(
        f"{options.blocks} blocks, width {options.width}, hidden {options.hidden}, {options.tokens} tokens, "
        f"{options.experts} experts, batch {options.batch}, rank {options.rank}, float32\n"
    )
    x, slope = inputs(options)
    low_rank = network(options, options.rank, options.blocks)
    dense = network(options, None, options.blocks)
    reference = composed_network(dense)
    few = low_rank[:2]  # their task vectors written out take memory of their own
    for name, ours, theirs in (("dense", dense, reference), ("low_rank", few, composed_network(few))):
        error = largest_difference(step(ours, x, slope), step(theirs, x, slope))
        print(f"{name}, {len(ours)} blocks: gradients within {error:.1e} of the reference's (at most {TOLERANCE:.0e})")
        if not error <= TOLERANCE:
            sys.exit("the gradients differ")

    networks = {"WEMoE dense": dense, "WEMoE low_rank": low_rank, REFERENCE: reference}
    del dense, low_rank, reference, few, ours, theirs
    variants: dict[str, Callable[[], object]] = {
        name: partial(step, blocks, x, slope) for name, blocks in networks.items()
    }
    timings = time_rounds(variants, options.repeats)
    names = list(networks)
    del networks, variants  # gigabytes that the children may need
    peaks = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        children = (subprocess.run(command, check=True, stdout=subprocess.PIPE) for _ in range(options.processes))
        peaks[name] = statistics.median(json.loads(child.stdout) for child in children)

    kept = "freed memory kept" if options.allocator == "keep" else "the allocator's defaults"
    print(f"\nseconds: medians of alternating rounds, undisturbed: {timings.quiet} of {timings.rounds}; {kept}")
    print(f"MB: medians of {options.processes} processes\n")
    print(f"{'':<22}{'seconds':>9}{'reference /':>13}{'MB':>8}{'/ reference':>13}  wanted")
    for name in names:
        seconds, peak = timings.seconds[name], peaks[name]
        times, share = timings.seconds[REFERENCE] / seconds, peak / peaks[REFERENCE]
        row = f"{name:<22}{seconds:>9.2f}{times:>12.1f}x{peak / 1e6:>8.0f}{share:>13.2f}  {WANTED.get(name, '')}"
        print(row.rstrip())
    print(describe_machine(options.threads).partition(", Python")[0] + " at the end")


if __name__ == "__main__":
    main()
