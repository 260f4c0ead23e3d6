"""Forward pass of an upscaled MLP against the slow per-sample reference and the plain MLP, in one run.

    python benchmarks/mlp_forward.py [--width 768 --hidden 3072 --tokens 50 --experts 8 --batch 16 --rank 16]

Prints ratios of medians; the variants take turns, so a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from machine import describe_machine
from reference import wemoe_forward  # type: ignore[import-not-found]

from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear, Routing
from wemoe_plugin.modeling.forms import DenseForm, Form, LowRankForm
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE
from wemoe_plugin.task_vectors.low_rank import truncated_svd


class Mlp(nn.Module):
    """The MLP of a ViT block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


def upscale(base: Mlp, experts: list[Mlp], rank: int | None) -> WeightEnsemblingMoE:
    """The WEMoE module of these experts, its router at λ = 0.3."""
    width = base.fc1.in_features
    static, routing, lambdas = Mlp(width, base.fc1.out_features), Routing(), [0.3] * len(experts)
    for name in ("fc1", "fc2"):
        layer, own = getattr(base, name), [getattr(expert, name) for expert in experts]
        vectors = torch.stack([e.weight - layer.weight for e in own]).detach()
        biases = torch.stack([e.bias - layer.bias for e in own]).detach()
        target = getattr(static, name)
        target.weight.data = layer.weight.detach() + 0.3 * vectors.sum(0)
        target.bias.data = layer.bias.detach() + 0.3 * biases.sum(0)
        form: Form = DenseForm(target.weight, target.bias, vectors, biases)
        if rank is not None:
            pairs = [truncated_svd(vector, rank) for vector in vectors]
            down, up = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
            form = LowRankForm(target.weight, target.bias, down, up, [rank] * len(own), biases)
        setattr(static, name, EnsembledLinear(form, routing))
    router = Router(width, len(experts), 2, lambdas)
    nn.init.normal_(router.output.weight, 0.0, 0.01)  # type: ignore[union-attr]
    return WeightEnsemblingMoE(static, router, lambdas, routing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 768, "hidden": 3072, "tokens": 50, "experts": 8, "batch": 16, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = Mlp(options.width, options.hidden)
    experts = [Mlp(options.width, options.hidden) for _ in range(options.experts)]
    x = torch.randn(options.batch, options.tokens, options.width)
    dense, low_rank = upscale(base, experts, None), upscale(base, experts, options.rank)

    def reference() -> Tensor:
        y: Tensor = wemoe_forward(base, experts, dense.router(x), x)
        return y

    variants: dict[str, Callable[[], Tensor]] = {
        "plain MLP": lambda: base(x),
        "WEMoE dense": lambda: dense(x),
        f"WEMoE low_rank r={options.rank}": lambda: low_rank(x),
        "per-sample reference": reference,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        error = (dense(x) - reference()).abs().max().item()
        for _ in range(options.repeats + 1):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}

    print(describe_machine(options.threads))
    print(
        f"width {options.width}, hidden {options.hidden}, {options.tokens} tokens, {options.experts} experts, "
        f"batch {options.batch}, float32; medians of {options.repeats} alternating runs"
    )
    print(f"largest difference between dense and the reference: {error:.1e}\n")
    print(f"{'':<24}{'ms':>9}{'/ plain':>10}{'reference /':>13}")
    for name, median in medians.items():
        against = medians["per-sample reference"] / median
        print(f"{name:<24}{1000 * median:>9.1f}{median / medians['plain MLP']:>9.2f}x{against:>12.1f}x")


if __name__ == "__main__":
    main()
