"""torch.compile and torch.export of small mixtures, run by test_wemoe.py in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from architectures import ROWS, family, merged
from torch import Tensor, nn

from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.modeling.wemoe import freeze_all_but_routers, wemoe_modules

FORMS = {
    "dense": "{form: dense}",
    "low_rank": "{form: low_rank, rank: 4}",
    "sparse": "{form: sparse, density: 0.3}",
}


def model_of(directory: Path, row: str, form: str) -> Any:
    """A model whose routers have something to say."""
    out = directory / "out"
    model = load_model(out if out.exists() else merged(directory, "mlp", f"{{task_vectors: {FORMS[form]}}}"))
    with torch.no_grad():
        for _, module in wemoe_modules(model):
            for parameter in module.router.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def compiles(model: nn.Module, inputs: Tensor, *, fullgraph: bool, halved: bool) -> None:
    """Values and gradients of a compiled mixture, under autocast if ``halved``."""
    parameters = freeze_all_but_routers(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with torch.autocast("cpu", torch.bfloat16, enabled=halved):
        found, expected = compiled(inputs).float(), model(inputs).float()
    torch.testing.assert_close(found, expected, rtol=0.02 if halved else 1e-4, atol=0.02 if halved else 1e-4)
    ours = torch.autograd.grad(found.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        bound = float(other.abs().max()) * (0.1 if halved else 1e-3) + 1e-6
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


class Breaking(nn.Module):
    """An activation that ends the graph in the middle of the mixture."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.tanh(x)


def exports(model: nn.Module, inputs: Tensor) -> None:
    """The exported program, for other batches as well."""
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: rows},), strict=False)
    for some in (inputs, torch.cat([inputs, inputs + 1, inputs])):
        found, expected = program.module()(some).logits, model(some).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def main() -> None:
    """Whatever does not agree raises."""
    torch.manual_seed(0)
    images, tokens = torch.randn(4, 3, 16, 16), torch.randint(1, 24, (3, 5))
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            place = Path(folder) / form
            place.mkdir()
            family(ROWS["ViT"], place, "mlp")
            model = model_of(place, "ViT", form)
            layer = model.vit.layers[0].mlp
            if form != "sparse":
                compiles(layer, torch.randn(4, 5, 16), fullgraph=True, halved=form == "low_rank")
            layer.module.activation_fn = Breaking()
            compiles(layer, torch.randn(4, 5, 16), fullgraph=False, halved=form == "dense")
        exports(model_of(Path(folder) / "low_rank", "ViT", "low_rank"), images)
        place = Path(folder) / "llama"
        place.mkdir()
        family(ROWS["Llama"], place, "mlp")
        whole = model_of(place, "Llama", "low_rank")
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
        compiled = torch.compile(whole, backend="aot_eager")
        found, expected = (run(input_ids=tokens, attention_mask=mask).logits for run in (compiled, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    print("compiled and exported")


if __name__ == "__main__":
    sys.exit(main())
