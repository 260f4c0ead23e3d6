"""`verify` sees what is right, and each thing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fine_tuned, open_clip_family, transformers_family
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from wemoe_plugin.checkpoints.manifest import refresh_manifest
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.forms import DenseForm, LowRankForm, SparseForm
from wemoe_plugin.modeling.loading import load_model, load_static
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.samples import sample_inputs
from wemoe_plugin.modeling.wemoe import freeze_all_but_routers
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.pipeline.routers import save_routers
from wemoe_plugin.pipeline.verify import _equal
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
HEAD = (
    "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nparameters: {lambda: 0.3}\n"
)
WEMOE = "rules: [{match: mlp, merge_method: wemoe}]\n"
PROMISES = 8


def merged(directory: Path, rules: str = WEMOE) -> Path:
    (directory / "recipe.yaml").write_text(HEAD + rules)
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / "out")
    return directory / "out"


def merged_elsewhere(directory: Path, rules: str) -> Path:
    (directory / "other.yaml").write_text(HEAD + rules)
    source = load_recipe(directory / "other.yaml")
    merge(source, plan_merge(source), directory / "other")
    return directory / "other"


def save_family(directory: Path, base: Any) -> None:
    for name, model in (("base", base), ("e0", fine_tuned(base, 0)), ("e1", fine_tuned(base, 1))):
        model.save_pretrained(directory / name)


def llamas(directory: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    save_family(directory, LlamaForCausalLM(LlamaConfig(vocab_size=24, tie_word_embeddings=False, **shape)))


def t5s(directory: Path) -> None:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    save_family(directory, T5ForConditionalGeneration(T5Config(vocab_size=24, **shape)))


def classifiers(directory: Path) -> None:
    """Which name no padding token, as GPT-2 does."""
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 24, "n_positions": 32}
    save_family(directory, GPT2ForSequenceClassification(GPT2Config(num_labels=3, **shape)))


def test_a_configuration_that_does_not_say_how_large_things_are() -> None:
    class Odd(nn.Linear):
        config = object()

        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return input_ids

    with pytest.raises(CheckpointError, match="what a Odd takes is not known"):
        sample_inputs(Odd(1, 1), 2, torch.Generator())


def test_a_model_that_made_up_inputs_do_not_fit_is_named(tmp_path: Path, command: Command) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_family(tmp_path, BertForMultipleChoice(BertConfig(vocab_size=24, **shape)))
    status, _, err = command("verify", merged(tmp_path))
    assert (status, "BertForMultipleChoice cannot be run on made-up inputs: " in err) == (2, True)
    assert "unexpected" not in err


@pytest.mark.parametrize("family", [open_clip_family, transformers_family, llamas, t5s, classifiers])
def test_outputs_of_every_kind_keep_their_promises(
    tmp_path: Path, command: Command, family: Callable[[Path], Any]
) -> None:
    torch.manual_seed(0)
    family(tmp_path)
    status, out, err = command("verify", merged(tmp_path))
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * PROMISES


def test_a_static_merge_is_verified_as_far_as_it_goes(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    status, out, _ = command("verify", merged(tmp_path, ""), "--json")
    assert status == 0
    assert [check["kept"] for check in json.loads(out)] == [True, True]


def change(out: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(out / name)
    edit(state)
    save_file(state, out / name, {"format": "pt"})


def broken(command: Command, out: Path) -> list[str]:
    status, said, _ = command("verify", out, "--json")
    assert status == 1
    return [check["promise"] for check in json.loads(said) if not check["kept"]]


def test_a_changed_file_is_seen(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path)
    (out / "open_clip_config.json").write_text((out / "open_clip_config.json").read_text() + " ")
    assert broken(command, out) == ["the files are those of the manifest"]


def test_a_model_that_is_not_finite_is_seen(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path)
    change(out, "open_clip_model.safetensors", lambda state: state["visual.proj"].fill_(float("inf")))
    refresh_manifest(out, ["open_clip_model.safetensors"])
    assert "the ordinary checkpoint's outputs are finite" in broken(command, out)


def test_routing_that_mixes_rows_is_seen(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh output too, whose routers decide the same for all inputs until they are stirred."""
    open_clip_family(tmp_path)
    out = merged(tmp_path)
    forward = Router.forward

    def mixing(self: Router, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return forward(self, x, mask).mean(0, keepdim=True).expand(len(x), -1)

    monkeypatch.setattr(Router, "forward", mixing)
    found = broken(command, out)
    assert "a row alone gives what it gives in a batch" in found
    assert "shuffled rows give the same" not in found


@pytest.mark.parametrize("form", ["{form: dense}", "{form: low_rank, rank: 3}", "{form: sparse, density: 0.2}"])
def test_a_kernel_that_computes_otherwise_is_seen(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, f"rules: [{{match: mlp, merge_method: wemoe, parameters: {{task_vectors: {form}}}}}]\n")
    for kind in (DenseForm, LowRankForm, SparseForm):
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, o, forward=forward: forward(self, x, 1.01 * o))
    assert broken(command, out) == ["layers compute with the files' task vectors"]


def test_other_task_vectors_than_those_that_were_compressed_are_seen(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    rule = "{match: mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 3}}}"
    out = merged(tmp_path, f"rules: [{rule}]\n")
    change(out, "wemoe.safetensors", lambda state: [t.mul_(2) for n, t in state.items() if n.endswith(".up")])  # type: ignore[func-returns-value]
    refresh_manifest(out, ["wemoe.safetensors"])
    assert broken(command, out) == ["compressed task vectors have the norms noted"]


def test_a_difference_that_is_no_number_is_a_difference() -> None:
    seen = _equal("x", {"a": torch.ones(2)}, {"a": torch.tensor([1.0, float("nan")])})
    assert not seen.kept


def test_routers_of_a_loop_of_ones_own_are_kept(tmp_path: Path, command: Command) -> None:
    """With the manifest that describes them, and without results of others."""
    llamas(tmp_path)
    out = merged(tmp_path)
    (out / "results.json").write_text("{}")
    refresh_manifest(out, ["results.json"])
    model = load_model(out)
    with torch.no_grad():
        for parameter in freeze_all_but_routers(model):
            parameter.add_(torch.randn_like(parameter))
    save_routers(model, out)
    for name, value in load_model(out).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert not (out / "results.json").exists()
    assert command("verify", out)[0] == 0


def test_routers_of_another_model_are_not_kept(tmp_path: Path) -> None:
    llamas(tmp_path)
    out, before = merged(tmp_path), (tmp_path / "out" / "routers.safetensors").read_bytes()
    other = merged_elsewhere(tmp_path, "rules: [{match: mlp, merge_method: wemoe, parameters: {router: {depth: 1}}}]\n")
    for model in (load_model(other), load_static(out)):
        with pytest.raises(CheckpointError, match="does not have the routers of this directory"):
            save_routers(model, out)
    (out / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is absent"):
        save_routers(load_model(out), out)
    assert (out / "routers.safetensors").read_bytes() == before
