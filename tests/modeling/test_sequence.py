"""Text: padding does not enter a decision, and a decision on a prompt holds for what is generated from it."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ROWS, family, merged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wemoe_plugin.modeling.loading import load_model, load_static
from wemoe_plugin.modeling.sequence import UNKNOWN, SequenceState, Tokens, _padding
from wemoe_plugin.modeling.wemoe import freeze_all_but_routers, wemoe_modules

LOW_RANK = "{form: low_rank, rank: 1000}"
DECODERS = ["Llama", "Mistral", "Qwen2", "Qwen3", "GPT-2", "T5", "Flan-T5"]
NEW = 6


def wemoe(
    directory: Path, row: str, routing: str = "sample", form: str = "{form: dense}", match: str = "mlp"
) -> nn.Module:
    """A model whose routers have something to say."""
    family(ROWS[row], directory, ".")
    router = f"{{router: {{depth: 2, routing: {routing}}}, task_vectors: {form}}}"
    model = load_model(merged(directory, match, router), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, module in wemoe_modules(model):
            for parameter in module.router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 24, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens (rows, new) and the logits they were chosen by (rows, new, vocabulary)."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    found = model.generate(
        **inputs, **(settings | options), return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    return found.sequences[:, -NEW:], torch.stack(found.logits, 1)


def decided_on(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every router gives for a prompt."""
    weights: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        return lambda router, args, output: weights.setdefault(path, output)

    handles = [module.router.register_forward_hook(watch(path)) for path, module in wemoe_modules(model)]
    if "decoder" in dict(model.named_children()):
        inputs = {**inputs, "decoder_input_ids": torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.int64)}
    model(**inputs)
    for handle in handles:
        handle.remove()
    return weights


def folded(model: nn.Module, directory: Path, weights: dict[str, Tensor]) -> nn.Module:
    """The plain model with W_static + Σₖ (wₖ − λₖ) τₖ in every upscaled layer, for one row of weights."""
    plain = load_static(directory / "out", dtype=torch.float64)
    with torch.no_grad():
        for path, module in wemoe_modules(model):
            offsets = weights[path][0] - module.lambdas
            for name, layer in module.module.named_modules():
                if not hasattr(layer, "form"):
                    continue
                target = plain.get_submodule(f"{path}.{name}")
                composed = torch.einsum("k,koi->oi", torch.cat([torch.ones(1), offsets]), layer.form.stack)
                target.weight.copy_(composed.T if type(target).__name__ == "Conv1D" else composed)
                if layer.bias is not None:
                    target.bias.copy_(layer.bias + offsets @ layer.form.bias_vectors)
    return plain


@pytest.mark.parametrize("row", DECODERS)
@torch.no_grad()
def test_greedy_decoding_is_that_of_the_weights_decided_on_the_prompt(tmp_path: Path, row: str) -> None:
    model = wemoe(tmp_path, row)
    for length in (1, 5):
        inputs = {"input_ids": tokens(1, length)}
        plain = folded(model, tmp_path, decided_on(model, inputs))
        chosen, logits = generated(model, inputs)
        expected, by_hand = generated(plain, inputs)
        assert torch.equal(chosen, expected)
        torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-5)
        _, static = generated(load_static(tmp_path / "out", dtype=torch.float64), inputs)
        assert not torch.allclose(logits, static, atol=1e-2)


@pytest.mark.parametrize("row", ["Llama", "GPT-2", "T5"])
@pytest.mark.parametrize("routing", ["sample", "token"])
@torch.no_grad()
def test_a_padded_prompt_generates_what_it_generates_alone(tmp_path: Path, row: str, routing: str) -> None:
    model = wemoe(tmp_path, row, routing, LOW_RANK)
    prompts = [tokens(1, length, seed)[0] for seed, length in enumerate((3, 7, 5))]
    left = row != "T5"  # an encoder's text is padded at its end
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        place = slice(7 - len(prompt), 7) if left else slice(0, len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    _, together = generated(model, {"input_ids": ids, "attention_mask": mask})
    for i, prompt in enumerate(prompts):
        _, alone = generated(model, {"input_ids": prompt[None]})
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", ["BERT", "RoBERTa", "CLIP"])
@torch.no_grad()
def test_padding_changes_nothing_for_an_encoder(tmp_path: Path, row: str) -> None:
    model: Any = wemoe(tmp_path, row)
    ids = tokens(1, 5) if row != "CLIP" else torch.tensor([[470, 3, 9, 4, 471]])
    padded = torch.cat([ids, torch.full((1, 4), 471 if row == "CLIP" else 0)], 1)
    mask = (torch.arange(9) < 5).long()[None]
    run = model.get_text_features if row == "CLIP" else model
    short, long = run(input_ids=ids, attention_mask=mask[:, :5]), run(input_ids=padded, attention_mask=mask)
    find = (lambda output: output.pooler_output) if row == "CLIP" else (lambda output: output.logits)
    torch.testing.assert_close(find(long), find(short), rtol=0, atol=1e-6)
    blind = run(input_ids=padded, attention_mask=torch.ones_like(mask))
    assert not torch.allclose(find(blind), find(short), atol=1e-3)


@pytest.mark.parametrize("row", ["Llama", "GPT-2"])
@torch.no_grad()
def test_token_routing_is_causal(tmp_path: Path, row: str) -> None:
    model: Any = wemoe(tmp_path, row, "token", LOW_RANK)
    ids = tokens(2, 8)
    changed = ids.clone()
    changed[:, 5:] = changed[:, 5:] % 23 + 1
    found, other = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(found[:, :5], other[:, :5], rtol=0, atol=1e-9)
    assert not torch.allclose(found[:, 5:], other[:, 5:], atol=1e-3)
    _, cached = generated(model, {"input_ids": ids})
    _, anew = generated(model, {"input_ids": ids}, use_cache=False)
    torch.testing.assert_close(cached, anew, rtol=0, atol=1e-6)


@torch.no_grad()
def test_steps_by_hand_keep_the_decision_with_the_cache(tmp_path: Path) -> None:
    model: Any = wemoe(tmp_path, "Llama")
    ids = tokens(2, 6)
    plain = [
        folded(model, tmp_path, {k: v[i : i + 1] for k, v in decided_on(model, {"input_ids": ids[:, :4]}).items()})
        for i in range(2)
    ]
    first = model(input_ids=ids[:, :4], use_cache=True)
    twin = copy.deepcopy(first.past_key_values)
    second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
    for i in range(2):
        expected = plain[i](input_ids=ids[i : i + 1]).logits[:, 4:]
        torch.testing.assert_close(second[i : i + 1], expected, rtol=0, atol=1e-6)
    model(input_ids=tokens(2, 9, 3), use_cache=True)  # another prompt in between has a cache of its own
    torch.testing.assert_close(model(input_ids=ids[:, 4:], past_key_values=twin).logits, second)
    assert model.model.layers[0].mlp.sequence.tokens is UNKNOWN


@torch.no_grad()
def test_beams_of_one_prompt_share_its_decision(tmp_path: Path) -> None:
    model = wemoe(tmp_path, "Llama")
    inputs = {"input_ids": tokens(1, 5)}
    plain = folded(model, tmp_path, decided_on(model, inputs))
    chosen, _ = generated(model, inputs, num_beams=3)
    assert torch.equal(chosen, generated(plain, inputs, num_beams=3)[0])


@pytest.mark.parametrize("row", ["Llama", "GPT-2"])
@torch.no_grad()
def test_a_cache_of_fixed_size_changes_nothing(tmp_path: Path, row: str) -> None:
    """transformers then makes masks of queries and keys, over positions that are not there yet."""
    model = wemoe(tmp_path, row)
    ids = torch.tensor([[0, 0, 3, 4, 5], [7, 8, 9, 3, 2]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    expected = generated(model, inputs)[1]
    torch.testing.assert_close(generated(model, inputs, cache_implementation="static")[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_read_from_masks_of_queries_and_keys(additive: bool) -> None:
    tokens = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    causal = torch.ones(4, 4).tril().bool()
    allowed = (causal[None] & tokens[:, None, :])[:, None]
    allowed = allowed | ~allowed.any(-1, keepdim=True)  # no empty rows
    mask: Tensor = torch.where(allowed, 0.0, torch.finfo(torch.float32).min) if additive else allowed
    found = _padding({"full_attention": mask, "sliding_attention": torch.zeros(3, 1, 4, 4)})
    assert found is not None
    assert torch.equal(found, tokens)


def test_recomputing_in_a_backward_pass_is_refused(tmp_path: Path) -> None:
    model: Any = wemoe(tmp_path, "Llama")
    freeze_all_but_routers(model)
    mlp = model.model.layers[0].mlp
    mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)
    ids = tokens(2, 5)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)  # of which nothing is computed again
    model(input_ids=ids, use_cache=False).logits.sum().backward()  # without padding there is nothing to know
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum()
    with pytest.raises(ValueError, match="turn gradient checkpointing off"):
        loss.backward()


def test_recomputing_is_refused_whatever_ran_since_and_in_copies(tmp_path: Path) -> None:
    model: Any = wemoe(tmp_path, "Llama")
    freeze_all_but_routers(model)
    ids = tokens(2, 5)

    def losses(each: Any) -> Tensor:
        mlp = each.model.layers[0].mlp
        mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)
        masked = each(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum()
        return masked + each(input_ids=ids, use_cache=False).logits.sum()  # of which nothing is padding

    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with ThreadPoolExecutor(1) as pool:  # this thread has made no forward pass
            loss = pool.submit(losses, each).result()
        with pytest.raises(ValueError, match="turn gradient checkpointing off"):
            loss.backward()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # older versions have no other
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_inside_of_an_upscaled_module_is_refused(tmp_path: Path, reentrant: bool) -> None:
    """As transformers does in whole layers: offsets are not known there any more."""
    model: Any = wemoe(tmp_path, "Llama", match="'model.layers.*'")
    freeze_all_but_routers(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    embeds = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    loss = model(inputs_embeds=embeds, use_cache=False).logits.sum()
    with pytest.raises(ValueError, match="where its routing is not known: turn gradient checkpointing off"):
        loss.backward()


@torch.no_grad()
def test_copies_watch_their_own_sequences(tmp_path: Path) -> None:
    model: Any = wemoe(tmp_path, "Llama")
    inputs = {"input_ids": tokens(1, 5)}
    expected = generated(model, inputs)[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        states = {id(module.sequence) for _, module in wemoe_modules(twin)}
        assert len(states) == 1
        assert states.isdisjoint(id(module.sequence) for _, module in wemoe_modules(model))
        torch.testing.assert_close(generated(twin, inputs)[1], expected)


def test_what_does_not_fit_the_rows_is_refused() -> None:
    state = SequenceState()
    state.tokens = Tokens(mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the attention mask is for \[2, 3\]"):
        state.decide("mlp", torch.zeros(2, 5, 4), lambda x, mask=None: x)
    state.tokens = Tokens(kept={"mlp": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="the cache was made for 2 prompts, this step has 1 rows"):
        state.decide("mlp", torch.zeros(1, 5, 4), lambda x, mask=None: x)

    state.tokens = Tokens(batch=2, length=5)
    with pytest.raises(ValueError, match="sees 10 rows of a batch of 2 texts"):
        state.decide("fc1", torch.zeros(10, 4), lambda x, mask=None: x)
    with pytest.raises(ValueError, match="sees 3 of 5 tokens"):
        state.decide("mlp", torch.zeros(2, 3, 4), lambda x, mask=None: x)


@torch.no_grad()
def test_a_cache_that_others_filled_is_refused(tmp_path: Path) -> None:
    model: Any = wemoe(tmp_path, "Llama")
    cache = load_static(tmp_path / "out", dtype=torch.float64)(input_ids=tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 4 tokens but not what their routers decided"):
        model(input_ids=tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_feed_forward_chunks_are_refused(tmp_path: Path) -> None:
    model: Any = wemoe(tmp_path, "BERT")
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="sees 2 of 6 tokens; it cannot decide for the whole text"):
        model(input_ids=tokens(2, 6))


@pytest.mark.parametrize(("row", "towers"), [("ViT", []), ("CLIP", ["text_model"]), ("CLIP vision tower", [])])
def test_only_text_has_a_sequence(tmp_path: Path, row: str, towers: list[str]) -> None:
    model = wemoe(tmp_path, row)
    watched = {path.partition(".")[0] for path, module in wemoe_modules(model) if module.sequence is not None}
    assert sorted(watched) == towers


@torch.no_grad()
def test_threads_with_padding_of_their_own(tmp_path: Path) -> None:
    """No thread sees another's mask or decision, or leaves its own behind."""
    model: Any = wemoe(tmp_path, "Llama")
    ids = tokens(3, 6)
    masks = [(torch.arange(6) >= start).long().expand(3, -1) for start in range(4)]
    expected = [model(input_ids=ids, attention_mask=mask).logits for mask in masks]
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(15):
            found = model(input_ids=ids, attention_mask=masks[i]).logits
            if not torch.allclose(found, expected[i], atol=1e-6):
                wrong.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, range(4)))
        states = pool.map(lambda _: [m.routing.offsets for _, m in wemoe_modules(model)], range(4))
        assert all(offsets is None for each in states for offsets in each)
    assert all(module.routing.offsets is None for _, module in wemoe_modules(model))
    assert wrong == []
