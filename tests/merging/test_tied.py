"""Tied weights: whichever of the two names a file keeps, the merge is the same, and the plan says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import fine_tuned, save_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.recipe.loading import load_recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=24, tie_word_embeddings=True, **shape))
    for name, model in (("base", base), ("e0", fine_tuned(base, 0)), ("e1", fine_tuned(base, 1))):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\n"
    )
    return tmp_path


def state(family: Path, name: str) -> dict[str, Tensor]:
    return load_file(family / name / "model.safetensors")


def keep_both(family: Path, name: str, head: Tensor | None = None) -> None:
    tensors = state(family, name)
    assert HEAD not in tensors
    save_state({**tensors, HEAD: tensors[EMBEDDING] if head is None else head}, family / name / "model.safetensors")


def planned(family: Path) -> MergePlan:
    return plan_merge(load_recipe(family / "recipe.yaml"))


def merged(plan: MergePlan, out: Path) -> dict[str, Tensor]:
    out.mkdir()
    execute_plan(plan, out, chunk_elements=100)
    return load_file(out / "model.safetensors")


def test_a_copy_that_only_an_expert_keeps_is_left_out(family: Path) -> None:
    expected = merged(planned(family), family / "without")
    keep_both(family, "e1")
    plan = planned(family)
    assert plan.notes == (f"e1: {HEAD} is left out: the base ties it to {EMBEDDING}",)
    found = merged(plan, family / "with")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_head_that_is_no_copy_is_refused(family: Path) -> None:
    head = state(family, "e1")[EMBEDDING].clone()
    head[-1, -1] += 1
    keep_both(family, "e1", head)
    with pytest.raises(CheckpointError, match="it is not tied to it, but another model"):
        merged(planned(family), family / "out")
    assert list((family / "out").iterdir()) == []


def test_a_copy_that_only_the_base_keeps_is_the_experts_embedding(family: Path) -> None:
    expected = merged(planned(family), family / "without")
    keep_both(family, "base")
    plan = planned(family)
    assert plan.notes == tuple(f"{e}: {HEAD} is its {EMBEDDING}, to which it is tied" for e in ("e0", "e1"))
    found = merged(plan, family / "with")
    assert torch.equal(found[HEAD], expected[EMBEDDING])
    assert torch.equal(found[EMBEDDING], expected[EMBEDDING])


def test_a_base_whose_head_is_no_copy_fills_in_nothing(family: Path) -> None:
    """Whether the configuration denies it or says nothing."""
    keep_both(family, "base", state(family, "base")[EMBEDDING] + 1)
    with pytest.raises(CheckpointError, match="it is not tied to it, but another model"):
        merged(planned(family), family / "out")
    path = family / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    plan = planned(family)
    assert plan.notes == ()
    assert plan.base_only == (HEAD,)


def test_a_head_of_another_shape_is_no_copy(family: Path) -> None:
    keep_both(family, "e1", torch.zeros(25, 16))
    with pytest.raises(PlanError, match=r"which the base .* has not"):
        planned(family)
