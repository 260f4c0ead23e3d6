"""Every architecture the documents name: merged, loaded, and compared by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import ROWS, Row, family, in_transformers, merged, route, same

from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.loading import load_model, load_static
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.pipeline.verify import verify
from wemoe_plugin.recipe.loading import load_recipe

architectures = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
FORMS = {
    "dense": "{form: dense}",
    "low_rank": "{form: low_rank, rank: 1000}",
    "sparse": "{form: sparse, density: 1.0}",
}


@architectures
@pytest.mark.parametrize("form", FORMS)
def test_mlps(tmp_path: Path, row: Row, form: str) -> None:
    base, experts = family(row, tmp_path, row.mlp)
    out = merged(tmp_path, "mlp", f"{{task_vectors: {FORMS[form]}}}")
    model = load_model(out)
    assert len(list(wemoe_modules(model))) == row.mlps
    assert all(check.kept for check in verify(out))
    assert not same(model, base)
    for k, expert in enumerate(experts):
        route(model, torch.eye(2)[k])
        assert same(model, expert)
    route(model, torch.zeros(2))
    assert same(model, base)


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.attention], ids=[k for k in ROWS if ROWS[k].attention]
)
def test_attention(tmp_path: Path, row: Row) -> None:
    assert row.attention is not None
    _, experts = family(row, tmp_path, row.attention)
    out = merged(tmp_path, "attention", "{router: {depth: 1}}")
    model = load_model(out)
    assert len(list(wemoe_modules(model))) == row.attentions
    assert same(model, load_static(out))
    route(model, torch.eye(2)[1])
    assert same(model, experts[1])
    assert not same(model, experts[0])


def test_attention_of_a_timm_tower(tmp_path: Path) -> None:
    row = ROWS["open_clip with a timm tower"]
    _, experts = family(row, tmp_path, r"\.attn\.(qkv|proj)\.")
    model = load_model(merged(tmp_path, "visual.**.attn", "{router: {depth: 1}}"))
    assert len(list(wemoe_modules(model))) == 6
    route(model, torch.eye(2)[0])
    assert same(model, experts[0])


def test_fused_attention_is_refused_and_the_rest_stays_possible(tmp_path: Path) -> None:
    family(ROWS["open_clip"], tmp_path, "mlp")
    with pytest.raises(PlanError, match=r"in_proj_weight belongs to an nn\.MultiheadAttention.*leave it to a static"):
        merged(tmp_path, "attention", "{}")


@pytest.mark.parametrize(
    ("row", "match", "message"),
    [
        ("Llama", "model", r"model is given a tensor of shape \[2, 8\], not features of width 16"),
        ("T5", "decoder", r"decoder is given a tensor of shape \[2, 8\]"),
        ("CLIP", "vision_model", r"vision_model is given a tensor of shape \[2, 3, 16, 16\]"),
        ("open_clip with a timm tower", "visual.trunk", r"visual\.trunk is given a tensor of shape \[2, 3, 160, 160\]"),
        ("ViT", "vit", "vit is a list of modules and has no forward pass; match smaller modules inside of it"),
        (
            "ViT",
            "[vit.**.attention.attention, vit.**.attention.output]",
            "match them together, by a keyword",
        ),
    ],
)
def test_what_is_given_no_features_is_refused(tmp_path: Path, row: str, match: str, message: str) -> None:
    """Token ids and pictures are nothing a router reads; widths may agree by chance."""
    family(ROWS[row], tmp_path, ".")
    with pytest.raises(PlanError, match=message):
        merged(tmp_path, match, "{}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("Llama", "'model.layers.*'"),
        ("CLIP", "vision_model.encoder"),
        ("BERT", "'bert.encoder.layer.*'"),
        ("ViT", "'vit.encoder.layer.*'"),
        ("DINOv2", "'dinov2.encoder.layer.*'"),
    ],
)
def test_whole_layers_and_stacks_of_them_can_be_upscaled(tmp_path: Path, row: str, match: str) -> None:
    family(ROWS[row], tmp_path, ".")
    assert all(check.kept for check in verify(merged(tmp_path, match, "{}")))


@pytest.mark.parametrize("claimed", ["[mlp, '**.attention.attention']", "mlp"])
def test_what_earlier_rules_leave_of_a_layer_can_be_upscaled(tmp_path: Path, claimed: str) -> None:
    """One of its linear layers, or some: also where the library has fewer levels than the file."""
    family(ROWS["ViT"], tmp_path, ".")
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nrules:\n"
        f"  - {{match: {claimed}, merge_method: base}}\n"
        "  - {match: 'vit.encoder.layer.*', merge_method: wemoe}\n"
    )
    source = load_recipe(tmp_path / "recipe.yaml")
    merge(source, plan_merge(source), tmp_path / "out")
    upscaled = [path for path, _ in wemoe_modules(load_model(tmp_path / "out"))]
    assert upscaled == ["vit.layers.0.attention", "vit.layers.1.attention"]
    assert all(check.kept for check in verify(tmp_path / "out"))


def test_parts_of_texts_as_rows_are_refused_unless_tokens_decide(tmp_path: Path) -> None:
    """OPT flattens the batch before its first linear layer."""
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}
    config = transformers.OPTConfig(max_position_embeddings=32, word_embed_proj_dim=16, **shape)
    family(Row(in_transformers("OPTForCausalLM", config), "fc1", 1, None, 0), tmp_path, ".")
    with pytest.raises(PlanError, match=r"fc1 is given 16 rows for 2 texts, so its router cannot decide for each text"):
        merged(tmp_path, "'**.fc1'", "{}")
    with pytest.raises(PlanError, match=r"fc2 is given 16 rows where model\.decoder\.layers\.0 is given 2"):
        merged(tmp_path, "'model.decoder.layers.*'", "{}")
    token = "{router: {routing: token}, task_vectors: {form: low_rank, rank: 2}}"
    assert all(check.kept for check in verify(merged(tmp_path, "'**.fc1'", token)))
