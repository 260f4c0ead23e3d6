"""What globs and keywords claim."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemoe_plugin.recipe.patterns import Pattern, find_modules, glob_expression

CLIP = [
    f"{tower}.encoder.layers.{i}.{leaf}"
    for tower in ("vision_model", "text_model")
    for i in range(12)
    for leaf in (
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight"),
        *("self_attn.v_proj.weight", "self_attn.out_proj.weight", "layer_norm1.weight"),
    )
]


@pytest.mark.parametrize(
    ("glob", "name", "path"),
    [
        ("a.b", "a.b", "a.b"),
        ("a.b", "a.b.c.d", "a.b"),
        ("a.b", "a.bc", None),
        ("a", "b.a", None),
        ("*.b", "a.b.c", "a.b"),
        ("*", "a.b.c", "a"),
        ("a.*.c", "a.b.x.c", None),
        ("a.**.c", "a.b.x.c.d", "a.b.x.c"),
        ("a.**.c", "a.c.d", "a.c"),
        ("**.c", "c.d", "c"),
        ("**.c", "a.b.c", "a.b.c"),
        ("a.**", "a.b.c", "a.b"),
        ("a.**", "a", None),
        ("layers.[0-11].mlp", "layers.11.mlp.w", "layers.11.mlp"),
        ("layers.[0-11].mlp", "layers.12.mlp.w", None),
        ("layers.[0-1]*.mlp", "layers.12.mlp.w", "layers.12.mlp"),
        ("fc*", "fc1.weight", "fc1"),
        ("a+b", "a+b.c", "a+b"),
        ("a.b", "axb", None),
    ],
)
def test_a_glob_names_a_tensor_or_a_module_around_it(glob: str, name: str, path: str | None) -> None:
    glob_expression(glob)
    assert Pattern((glob,)).claims([name]).get(name) == path


def test_the_first_glob_of_a_list_that_matches_gives_the_path() -> None:
    assert Pattern(("x", "a.b", "a")).claims(["a.b.c"]) == {"a.b.c": "a.b"}


def test_mlp_and_attention_are_found_by_their_layers() -> None:
    assert len(find_modules("mlp", CLIP)) == len(find_modules("attention", CLIP)) == 24
    claims = Pattern(("mlp",)).claims(CLIP)
    assert claims["vision_model.encoder.layers.3.mlp.fc1.bias"] == "vision_model.encoder.layers.3.mlp"
    assert not any("attn" in name or "norm" in name for name in claims)


@pytest.mark.parametrize(
    ("keyword", "path", "leaves"),
    [
        ("mlp", "visual.transformer.resblocks.0.mlp", "c_fc.weight c_fc.bias c_proj.weight c_proj.bias"),
        ("mlp", "model.layers.0.mlp", "gate_proj.weight up_proj.weight down_proj.weight"),
        ("mlp", "encoder.block.0.layer.1.DenseReluDense", "wi.weight wo.weight"),
        ("mlp", "encoder.block.0.layer.1.DenseReluDense", "wi_0.weight wi_1.weight wo.weight"),
        ("mlp", "blocks.0.mlp", "fc1.weight norm.weight fc2.weight"),
        ("attention", "visual.transformer.resblocks.0.attn", "in_proj_weight in_proj_bias out_proj.weight"),
        ("attention", "encoder.block.0.layer.0.SelfAttention", "q.weight k.weight v.weight o.weight"),
        ("attention", "h.0.attn", "c_attn.weight c_proj.weight"),
    ],
)
def test_the_layers_of_known_families(keyword: str, path: str, leaves: str) -> None:
    names = [f"{path}.{leaf}" for leaf in leaves.split()]
    assert find_modules(keyword, [*names, "other.weight"]) == [path]
    assert find_modules("attention" if keyword == "mlp" else "mlp", names) == []


def test_a_block_that_holds_more_than_its_mlp_is_not_an_mlp() -> None:
    assert find_modules("mlp", ["layers.0.fc1.weight", "layers.0.fc2.weight", "layers.0.attn.q_proj.weight"]) == []


words = st.text("abc019_", min_size=1, max_size=3)


@given(st.lists(words, min_size=1, max_size=5))
def test_a_plain_name_matches_itself_and_everything_below(parts: list[str]) -> None:
    name = ".".join(parts)
    assert Pattern((name,)).claims([name, f"{name}.x", f"{name}x"]) == {name: name, f"{name}.x": name}
    assert Pattern(("**",)).claims([name])[name] == parts[0]
    assert set(Pattern((".".join("*" for _ in parts),)).claims([name])) == {name}


@pytest.mark.parametrize("half", ["self", "attention"])
def test_attention_in_bert_and_its_kin_is_the_module_around_both_halves(half: str) -> None:
    names = [f"layer.0.attention.{half}.{each}.weight" for each in ("query", "key", "value")]
    assert find_modules("attention", names) == [f"layer.0.attention.{half}"]
    assert find_modules("attention", [*names, "layer.0.attention.output.dense.weight"]) == ["layer.0.attention"]
