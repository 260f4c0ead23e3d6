"""The mathematics of a WEMoE module, against a slow and obvious reference."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import (
    BATCH,
    FORMS,
    HIDDEN,
    TOKENS,
    WIDTH,
    Fixed,
    batch,
    depths,
    family,
    form_of,
    forms,
    linear,
    stirred,
    upscaled,
)
from reference import composed, router_weights, wemoe_forward
from torch import Tensor, nn

from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear, Routing
from wemoe_plugin.modeling.forms import DenseForm
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE, freeze_all_but_routers


@forms
@depths
@pytest.mark.parametrize("experts", [1, 3])
def test_agrees_with_the_reference(form: str, depth: int, experts: int) -> None:
    base, own = family(experts)
    module, x = stirred(upscaled(base, own, depth, form)), batch()
    weights = module.router(x)
    assert weights.std(0).max() > 1e-2 or depth == 0
    torch.testing.assert_close(module(x), wemoe_forward(base, own, weights, x), rtol=0, atol=1e-5)


@depths
def test_the_router_is_the_papers(depth: int) -> None:
    router = Router(WIDTH, 3, depth, [0.1, 0.2, 0.3])
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    layers = [(m.weight, m.bias) for m in (router.hidden, router.output) if m is not None]
    x = batch()
    if depth == 0:
        assert router.constant is not None
        expected = router.constant.expand(BATCH, -1)
    else:
        expected = torch.stack([router_weights(row, layers) for row in x])
    torch.testing.assert_close(router(x), expected)


@depths
def test_a_fresh_router_gives_lambda_and_its_hidden_layer_is_drawn_as_in_the_paper(depth: int) -> None:
    router = Router(256, 3, depth, [0.1, 0.2, 0.3], torch.Generator().manual_seed(0))
    assert torch.equal(router(torch.randn(2, 7, 256)), torch.tensor([[0.1, 0.2, 0.3]] * 2))
    if router.hidden is not None:
        assert router.hidden.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not router.hidden.bias.any()


@forms
def test_freshly_upscaled_it_is_the_static_merge(form: str) -> None:
    base, own = family(3)
    module, x = upscaled(base, own, form=form), batch()
    assert torch.equal(module.router(x) - module.lambdas, torch.zeros(BATCH, 3))
    torch.testing.assert_close(module(x), composed(base, own, [0.3] * 3)(x), rtol=0, atol=1e-6)


@forms
def test_one_hot_routing_recovers_each_expert(form: str) -> None:
    base, own = family(3)
    module, x = upscaled(base, own, form=form), batch()
    for k, expert in enumerate(own):
        module.router = Fixed(torch.eye(3)[k])
        torch.testing.assert_close(module(x), expert(x), rtol=0, atol=1e-5)
    module.router = Fixed(torch.zeros(3))
    torch.testing.assert_close(module(x), base(x), rtol=0, atol=1e-5)


@forms
def test_a_row_alone_equals_the_row_in_its_batch(form: str) -> None:
    """In float64: sums of other shapes are rounded otherwise, and nothing but rounding may differ."""
    base, own = family(3, torch.float64)
    module, x = stirred(upscaled(base, own, form=form)), batch(torch.float64)
    together = module(x)
    for b in range(BATCH):
        torch.testing.assert_close(module(x[b : b + 1])[0], together[b], rtol=0, atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(x[order]), together[order], rtol=0, atol=1e-12)
    other = x.clone()
    other[1:] = 1e3
    torch.testing.assert_close(module(other)[0], together[0], rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(FORMS))
def test_permuting_experts_permutes_columns(order: list[int], form: str) -> None:
    base, own = family(4)
    module = stirred(upscaled(base, own, form=form))
    permuted = upscaled(base, [own[k] for k in order], form=form)
    permuted.router.load_state_dict(module.router.state_dict())
    with torch.no_grad():
        permuted.router.output.weight.copy_(module.router.output.weight[order])
        permuted.router.output.bias.copy_(module.router.output.bias[order])
    torch.testing.assert_close(permuted(batch()), module(batch()), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 5),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    st.integers(0, 1000),
)
def test_a_layer_is_linear_in_its_offsets(form: str, experts: int, factors: list[float], seed: int) -> None:
    x, _, weight, vectors = linear(experts)
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(BATCH, experts, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = nn.Linear(WIDTH, HIDDEN, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    applied = form_of(form, layer, vectors, None)
    plain = x @ weight.T

    def added(offsets: Tensor) -> Tensor:
        return applied(x, offsets) - plain

    one, other = factors
    expected = one * added(first) + other * added(second)
    torch.testing.assert_close(added(one * first + other * second), expected, rtol=0, atol=1e-9)


@forms
@pytest.mark.parametrize("experts", [1, 32])
def test_one_expert_and_many(form: str, experts: int) -> None:
    base, own = family(experts, torch.float64)
    module, x = stirred(upscaled(base, own, form=form)), batch(torch.float64)
    # Low-rank factors are stored in float32.
    torch.testing.assert_close(module(x), wemoe_forward(base, own, module.router(x), x), rtol=1e-5, atol=1e-5)
    module.router = Fixed(torch.eye(experts, dtype=torch.float64)[-1])
    torch.testing.assert_close(module(x), own[-1](x), rtol=1e-5, atol=1e-5)


@forms
@depths
def test_gradients_of_every_form_and_depth(form: str, depth: int) -> None:
    """Central differences in float64, for the input and every parameter of the router."""
    base, own = family(2, torch.float64)
    module, x = stirred(upscaled(base, own, depth, form)), batch(torch.float64).requires_grad_(True)
    names = [name for name, _ in module.router.named_parameters()]
    parameters = tuple(parameter.detach().requires_grad_(True) for parameter in module.router.parameters())

    def run(h: Tensor, *values: Tensor) -> Tensor:
        routed = {f"router.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(module, routed, (h,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_gradients_of_token_routing() -> None:
    base, own = family(2, torch.float64)
    module, x = stirred(upscaled(base, own, form="low_rank", per_token=True)), batch(torch.float64)
    assert torch.autograd.gradcheck(module, (x.requires_grad_(True),), fast_mode=True)


@forms
@depths
def test_gradients_agree_with_autograd_through_the_composed_weights(form: str, depth: int) -> None:
    base, own = family(2, torch.float64)
    module, x = stirred(upscaled(base, own, depth, form)), batch(torch.float64).requires_grad_(True)
    target = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)

    def by_hand(h: Tensor) -> Tensor:
        weights = module.router(h)
        rows = []
        for b in range(BATCH):
            values = {
                name: p.detach()
                + sum(weights[b, k] * (dict(e.named_parameters())[name] - p).detach() for k, e in enumerate(own))
                for name, p in base.named_parameters()
            }
            rows.append(torch.func.functional_call(base, values, h[b : b + 1]))
        return torch.cat(rows)

    trained = [x, *freeze_all_but_routers(module)]
    ours = torch.autograd.grad((module(x) * target).sum(), trained)
    theirs = torch.autograd.grad((by_hand(x) * target).sum(), trained)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # low-rank factors are stored in float32


def test_gradients_reach_the_routers_only() -> None:
    base, own = family(2)
    module = stirred(upscaled(base, own))
    trained = freeze_all_but_routers(module)
    module(batch()).sum().backward()
    assert {id(p) for p in module.parameters() if p.grad is not None} == {id(p) for p in trained}
    assert len(trained) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("shape", [(BATCH, WIDTH), (BATCH, 2, 3, WIDTH)], ids=["no tokens", "a grid of tokens"])
@forms
def test_any_number_of_axes_between_batch_and_width(shape: tuple[int, ...], form: str) -> None:
    base, own = family(2)
    module, x = stirred(upscaled(base, own, form=form)), torch.randn(shape)
    flat = x.reshape(BATCH, -1, WIDTH)
    torch.testing.assert_close(module(x).reshape(flat.shape), module(flat), rtol=0, atol=1e-6)


@forms
def test_an_empty_batch_gives_an_empty_result(form: str) -> None:
    base, own = family(2)
    assert upscaled(base, own, form=form)(batch()[:0]).shape == (0, TOKENS, WIDTH)


def test_a_module_that_mixes_batch_and_tokens_is_refused() -> None:
    base, own = family(2)
    module = upscaled(base, own)
    module.module.fc1.register_forward_pre_hook(lambda m, args: (args[0].flatten(0, 1),))
    with pytest.raises(ValueError, match="mixes batch and tokens"):
        module(batch())


def test_nothing_is_left_behind_by_a_forward_pass_that_fails() -> None:
    base, own = family(2)
    module = upscaled(base, own)
    with pytest.raises(RuntimeError):
        module(torch.zeros(2, TOKENS, WIDTH + 1))
    assert module.routing.offsets is None


def test_inputs_of_the_construction_are_left_alone() -> None:
    base, own = family(2)
    before = [copy.deepcopy(m.state_dict()) for m in (base, *own)]
    stirred(upscaled(base, own))(batch())
    for module, state in zip((base, *own), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_route_for_themselves(copied) -> None:  # type: ignore[no-untyped-def]
    base, own = family(2)
    module = stirred(upscaled(base, own))
    twin = copied(module)
    assert twin.routing is not module.routing
    assert twin.module.fc1.routing is twin.module.fc2.routing is twin.routing
    assert torch.equal(twin(batch()), module(batch()))
    other = upscaled(base, own)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(batch()), module(batch()))


def test_one_model_serves_several_threads() -> None:
    base, own = family(3)
    module = stirred(upscaled(base, own))
    inputs = [torch.randn(BATCH, TOKENS, WIDTH) for _ in range(8)]
    expected = [module(x) for x in inputs]
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(30):
            if not torch.equal(module(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_wrapped_modules_attributes_stay_reachable() -> None:
    base, own = family(1)
    module = upscaled(base, own)
    assert module.fc1.weight.dtype == torch.float32
    with pytest.raises(AttributeError):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    base, own = family(2)
    module = stirred(upscaled(base, own))
    expected = module(batch())
    result = copy.deepcopy(module).to(dtype)(batch(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@forms
def test_autocast_gives_nearly_the_same_values_and_gradients(form: str) -> None:
    base, experts = family(3)
    module = stirred(upscaled(base, experts, form=form))
    parameters = freeze_all_but_routers(module)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = module(x)
            loss = y.float().square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        results.append((y, gradients))
    (y, gradients), (halved, half_gradients) = results
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.float(), y, rtol=0.05, atol=0.05)
    for full, half in zip(gradients, half_gradients, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.1, atol=0.02 * float(full.abs().max()))


def test_token_routing_gives_every_token_its_own_weights() -> None:
    base, own = family(3, torch.float64)
    module, x = stirred(upscaled(base, own, form="low_rank", per_token=True)), batch(torch.float64)
    assert module.router(x).shape == (BATCH, TOKENS, 3)
    tokens = x.reshape(BATCH * TOKENS, 1, WIDTH)  # one token each: a sample's weights are its only token's
    single = upscaled(base, own, form="low_rank")
    single.router.load_state_dict(module.router.state_dict())
    torch.testing.assert_close(module(x), single(tokens).view(x.shape), rtol=0, atol=1e-12)
    changed = x.clone()
    changed[:, -1] += 1
    torch.testing.assert_close(module(changed)[:, :-1], module(x)[:, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_composed_weights_are_one_samples(form: str) -> None:
    base, own = family(2)
    with pytest.raises(ValueError, match=f"token routing needs low-rank task vectors, not {form} ones"):
        upscaled(base, own, form=form, per_token=True)(batch())


def test_layers_that_read_other_tokens_cannot_be_routed_by_token() -> None:
    base, own = family(2)
    module = upscaled(base, own, form="low_rank", per_token=True)
    module.module.fc1.register_forward_pre_hook(lambda m, args: (args[0][:, :2],))
    with pytest.raises(ValueError, match="5 tokens were routed, but this layer sees 2: it reads other tokens"):
        module(batch())


def test_padding_has_no_say_in_the_mean() -> None:
    router = Router(WIDTH, 3, 2, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(router.output.weight)  # type: ignore[union-attr]
    x = batch()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    weights = router(x, mask)
    expected = [router(row[own][None])[0] for row, own in zip(x[:3], mask[:3], strict=True)]
    torch.testing.assert_close(weights[:3], torch.stack(expected))
    assert router.output is not None
    torch.testing.assert_close(weights[3], router.output.bias)


@pytest.mark.parametrize("argument", [0, 1])
def test_the_router_reads_the_argument_it_was_told(argument: int) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(HIDDEN, WIDTH)

        def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
            return self.dense(hidden) + residual

    module, routing = Half(), Routing()
    vectors = torch.randn(2, WIDTH, HIDDEN)
    module.dense = EnsembledLinear(DenseForm(module.dense.weight, module.dense.bias, vectors), routing)  # type: ignore[assignment]
    inputs = torch.randn(BATCH, TOKENS, HIDDEN), batch()
    router = Router(inputs[argument].shape[-1], 2, 1)
    nn.init.normal_(router.output.weight)  # type: ignore[union-attr]
    wrapper = WeightEnsemblingMoE(module, router, [0.0, 0.0], routing, argument=argument)
    weights = router(inputs[argument])
    expected = module(*inputs) + torch.einsum("bk,koi,bti->bto", weights, vectors, inputs[0])
    torch.testing.assert_close(wrapper(*inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wrapper(inputs[0], residual=inputs[1]), expected, rtol=1e-4, atol=1e-4)


@forms
def test_hooks_see_what_a_layer_gave(form: str) -> None:
    """On every module, forward and backward: nothing is edited after it was handed on."""
    base, own = family(2)
    module, x = stirred(upscaled(base, own, form=form)), batch().requires_grad_(True)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    seen: list[tuple[Tensor, Tensor]] = []
    for part in module.modules():
        part.register_full_backward_hook(lambda *_: None)
        part.register_forward_hook(lambda _, __, y: seen.append((y, y.detach().clone())))
    torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), x)[0], expected)
    assert len(seen) > 5
    assert all(torch.equal(given, then) for given, then in seen)


@forms
@depths
def test_texts_without_tokens_give_none(form: str, depth: int) -> None:
    base, own = family(2)
    module = upscaled(base, own, depth, form)
    assert module.module(batch()[:, :0]).shape == (BATCH, 0, WIDTH)
    module.routing.offsets = torch.zeros(2).expand(BATCH, -1) if depth == 0 else torch.zeros(BATCH, 2)
    assert module.module(batch()[:, :0]).shape == (BATCH, 0, WIDTH)


def test_compiled_and_exported_it_is_the_same() -> None:
    """In a process without the run-time checks of shapes, which cannot be traced."""
    script = Path(__file__).parents[1] / "compiled.py"
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stdout) == (0, "compiled and exported\n"), found.stderr


def test_a_pass_in_one_thread_is_nothing_to_another() -> None:
    base, own = family(2)
    module = stirred(upscaled(base, own))
    inside, release = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert release.wait(30)
            return nn.functional.gelu(x)

    act, module.module.act = module.module.act, Waiting()
    thread = threading.Thread(target=module, args=(batch(),))
    thread.start()
    assert inside.wait(30)
    assert module.routing.offsets is None
    static = module.module.fc1(batch())
    module.module.act = act
    module(batch())
    release.set()
    thread.join()
    assert module.routing.offsets is None
    torch.testing.assert_close(static, nn.functional.linear(batch(), module.fc1.weight, module.fc1.bias))
