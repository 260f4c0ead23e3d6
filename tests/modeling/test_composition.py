"""The kernels: values, gradients, and what a pass holds at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import (
    BATCH,
    HIDDEN,
    WIDTH,
    batch,
    family,
    form_of,
    linear,
    stirred,
    upscaled,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wemoe_plugin.modeling.composition import apply_dense
from wemoe_plugin.modeling.forms import LowRankForm, SparseForm


@pytest.mark.parametrize("working_bytes", [1, 1500, 10**9])
def test_the_working_memory_changes_no_value(working_bytes: int) -> None:
    x, offsets, weight, vectors = linear()
    stack = torch.cat([weight[None], vectors])
    expected = torch.stack([x[b] @ (weight + torch.einsum("k,koi->oi", offsets[b], vectors)).T for b in range(BATCH)])
    torch.testing.assert_close(apply_dense(x, offsets, stack, working_bytes=working_bytes), expected)


@pytest.mark.parametrize("working_bytes", [1500, 10**9])
def test_gradients_of_a_dense_layer(working_bytes: int) -> None:
    x, offsets, weight, vectors = linear()
    stack = torch.cat([weight[None], vectors])
    x.requires_grad_(True), offsets.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a, b: apply_dense(a, b, stack, working_bytes=working_bytes), (x, offsets))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.seen = max(self.seen, result.untyped_storage().nbytes())
        return result


class Alive(TorchDispatchMode):
    """Bytes of all tensors made while it is on, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(weakref.ref(result))
        alive = [tensor.untyped_storage() for made in self.made if (tensor := made()) is not None]
        self.peak = max(self.peak, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return result


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_all_that_a_pass_holds_at_once_stays_within_the_bound(form: str, rows: int) -> None:
    """Bands of spread-out task vectors too: one is gone before the next is made."""
    width, hidden, bound = 64, 2048, 256 * 1024
    made = form_of(form, nn.Linear(width, hidden), torch.randn(3, hidden, width), None)
    made.working_bytes = bound
    x, offsets = torch.randn(rows, 1, width), torch.randn(rows, 3)
    with torch.no_grad(), Alive() as alive:
        made(x, offsets)
    output = rows * hidden * 4
    assert bound / 2 < alive.peak - output <= bound


@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_the_sum_with_a_bias_costs_the_backward_pass_nothing(form: str) -> None:
    """No gradient of the output's size is made anew: in-place sums on views would."""
    made = form_of(form, nn.Linear(8, 64), torch.randn(2, 64, 8), torch.randn(2, 64))
    y = made(torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 2, requires_grad=True))
    names, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [follow for follow, _ in node.next_functions if follow is not None]
    assert not names & {"CopySlices", "AsStridedBackward0"}


def test_gradients_of_offsets_are_not_summed_in_half_precision() -> None:
    """Over as many bands as there are rows, they are as exact as over one."""
    x, offsets, weight, vectors = (each.to(torch.bfloat16) for each in linear())
    stack = torch.cat([weight[None], vectors]).repeat(1, 64, 1)
    exact = [each.double().requires_grad_(True) for each in (x, offsets)]
    apply_dense(*exact, stack.double()).square().sum().backward()
    errors = []
    for working_bytes in (1, 10**9):
        own = offsets.clone().requires_grad_(True)
        y = apply_dense(x, own, stack, working_bytes=working_bytes)
        y.backward(2 * apply_dense(*exact, stack.double()).detach().to(torch.bfloat16))
        errors.append(float((own.grad.double() - exact[1].grad).norm() / exact[1].grad.norm()))  # type: ignore[union-attr]
    assert max(errors) < 0.01


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_composed_weights_stay_within_their_bound_whatever_the_batch(form: str) -> None:
    width, hidden, bound = 32, 256, 64 * 1024
    layer = nn.Linear(width, hidden)
    vectors = torch.randn(3, hidden, width)
    made = form_of(form, layer, vectors, None)
    made.working_bytes = bound
    for rows in (1, 4, 400):
        x = torch.randn(rows, 1, width).requires_grad_(True)
        with Largest() as largest:
            made(x, torch.randn(rows, 3, requires_grad=True)).sum().backward()
        assert largest.seen <= max(bound, rows * hidden * 4), "no tensor but the output is larger"
        assert rows * hidden * width * 4 > bound or rows == 1, "or the bound had nothing to do"


def test_a_loaded_state_brings_its_own_places(tmp_path: Path) -> None:
    """What a sparse form keeps beside its tensors follows them."""
    weight = torch.zeros(2, 3)
    first = SparseForm(weight, None, torch.ones(1, 2), torch.tensor([[0, 1]], dtype=torch.int32))
    second = SparseForm(weight, None, torch.full((1, 2), 5.0), torch.tensor([[4, 5]], dtype=torch.int32))
    first.load_state_dict(second.state_dict())
    x, offsets = torch.tensor([[[1.0, 10.0, 100.0]]]), torch.ones(1, 1)
    assert torch.equal(first(x, offsets), torch.tensor([[[0.0, 550.0]]]))


def test_ranks_may_differ_between_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(HIDDEN, WIDTH, generator=generator), batch()
    ranks = [3, 0, 1]
    down, up = torch.randn(4, WIDTH, generator=generator), torch.randn(4, HIDDEN, generator=generator)
    form = LowRankForm(weight, None, down, up, ranks)
    offsets = torch.randn(BATCH, 3, generator=generator)
    vectors = torch.stack([u.T @ d for u, d in zip(up.split(ranks), down.split(ranks), strict=True)])
    expected = torch.einsum("boi,bti->bto", weight + torch.einsum("bk,koi->boi", offsets, vectors), x)
    torch.testing.assert_close(form(x, offsets), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_second_derivatives_are_refused(form: str) -> None:
    base, own = family(2)
    module, x = stirred(upscaled(base, own, form=form)), batch().requires_grad_(True)
    with pytest.raises(NotImplementedError, match="no second derivatives; use low_rank"):
        torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
