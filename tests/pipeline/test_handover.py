"""Recipes that stack layers or make a tokenizer are mergekit's, and come out as mergekit makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from models import fine_tuned
from safetensors.torch import load_file
from snapshots import tree
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Command = Callable[..., tuple[int, str, str]]
WORDS = ["<unk>", "a", "b", "c", "d", "e"]


def save(directory: Path, seed: int, words: list[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), tie_word_embeddings=False, **shape)
    model = LlamaForCausalLM(config)
    (model if seed == 0 else fine_tuned(model, seed)).save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(["base", "e0", "e1"]):
        save(tmp_path / name, seed, WORDS)
    save(tmp_path / "grown", 3, [*WORDS, "f", "g"])
    return tmp_path


SLICES = """\
slices:
  - sources: [{model: e0, layer_range: [0, 2]}]
  - sources: [{model: ./e1, layer_range: [1, 2], parameters: {scale: 0.5}}]
merge_method: passthrough
dtype: float32
"""
UNION = """\
models:
  - {model: e0, parameters: {weight: 0.5}}
  - {model: grown, parameters: {weight: 0.4}}
base_model: base
merge_method: ties
parameters: {density: 0.5}
dtype: float32
tokenizer_source: base
chat_template: chatml
"""


def written(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("text", [SLICES, UNION], ids=["slices", "tokenizer"])
def test_the_output_is_mergekits(family: Path, command: Command, text: str) -> None:
    (family / "recipe.yaml").write_text(text)
    status, out, err = command(family / "recipe.yaml", "--out", family / "ours")
    assert status == 0, err
    assert "carried out by mergekit as a whole, for its" in out
    for name in ("e0", "./e1", "grown", "base"):
        text = text.replace(f"model: {name}", f"model: {family / name}")
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(family / "theirs"), MergeOptions(quiet=True))
    ours, theirs = written(family / "ours"), written(family / "theirs")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert json.loads((family / "ours" / "config.json").read_text()) == json.loads(
        (family / "theirs" / "config.json").read_text()
    )
    manifest = json.loads((family / "ours" / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in (family / "ours").iterdir()} - {"manifest.json"}
    LlamaForCausalLM.from_pretrained(family / "ours")
    assert command(family / "recipe.yaml", "--out", family / "quiet", "--quiet") == (0, "", "")
    status, _, err = command(family / "recipe.yaml", "--out", family / "ours")
    assert status == 2
    assert "exists; replace it with --force" in err


def test_signs_in_a_path_are_part_of_it(family: Path, command: Command) -> None:
    odd = family / "a+b@c d"
    odd.mkdir()
    for name in ("e0", "e1"):
        (family / name).rename(odd / name)
    (odd / "recipe.yaml").write_text(SLICES)
    status, _, err = command(odd / "recipe.yaml", "--out", odd / "ours", "--quiet")
    assert status == 0, err
    LlamaForCausalLM.from_pretrained(odd / "ours")


def test_the_plan_shows_the_models(family: Path, command: Command) -> None:
    (family / "recipe.yaml").write_text(SLICES)
    status, out, _ = command("plan", family / "recipe.yaml")
    assert status == 0
    assert f"{family}/e0  21 tensors" in out
    status, out, _ = command("plan", family / "recipe.yaml", "--json")
    assert json.loads(out) == {"mergekit": ["slices"], "models": [f"{family}/e0", f"{family}/e1"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SLICES + "rules: []\n", "DIR/recipe.yaml:6: rules cannot stand beside slices"),
        (SLICES.replace("./e1", "./e2"), "DIR/recipe.yaml:3: './e2': no such directory or file"),
        (
            SLICES.replace("passthrough", "passthru"),
            "mergekit cannot carry it out: Unimplemented merge method",
        ),
        (SLICES.replace("sources:", "sorces:"), "mergekit does not accept it"),
        (UNION.replace("chatml", "x"), "Invalid chat template: x"),
        (
            UNION.replace("tokenizer_source: base\nchat_template: chatml\n", ""),
            "has shape [8, 16], the base [6, 16]; with tokenizer_source: union (or base) mergekit aligns",
        ),
    ],
)
def test_what_does_not_fit_leaves_nothing(family: Path, command: Command, text: str, message: str) -> None:
    (family / "recipe.yaml").write_text(text)
    before = tree(family)
    status, out, err = command(family / "recipe.yaml", "--out", family / "deep" / "ours", "--quiet")
    assert status == 2
    assert message in err.replace(str(family), "DIR")
    assert out == ""
    assert tree(family) == before


@pytest.mark.parametrize("options", [["--max-memory", "1GiB"], ["--resume"], ["--jobs", "1"]])
def test_what_mergekit_cannot_do_is_not_silently_dropped(family: Path, command: Command, options: list[str]) -> None:
    (family / "recipe.yaml").write_text(SLICES)
    status, _, err = command(family / "recipe.yaml", *options)
    assert status == 2
    assert "it knows no --max-memory" in err
