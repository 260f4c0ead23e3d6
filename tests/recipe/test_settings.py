"""Numbers, gradients and conditions mean what they mean in mergekit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import ConditionalParameter, evaluate_setting

from wemoe_plugin.recipe.settings import parse_setting

numbers = st.floats(-4, 4, allow_nan=False)
gradients = numbers | st.lists(numbers, min_size=1, max_size=5)
conditions = st.lists(
    st.fixed_dictionaries({"value": gradients}, optional={"filter": st.sampled_from(["mlp", "attn", "*", "x"])}),
    min_size=1,
    max_size=4,
)


@given(gradients | conditions, st.sampled_from(["a.mlp.w", "a.attn.w", "b"]), st.floats(0, 1))
def test_agrees_with_mergekit(value: object, name: str, depth: float) -> None:
    theirs = value
    if isinstance(value, list) and isinstance(value[0], dict):
        theirs = [ConditionalParameter(**item) for item in value]
    expected = evaluate_setting(name, theirs, depth, validate=float)
    ours = parse_setting(value).evaluate(name, depth)
    assert (ours is None) == (expected is None)
    if expected is not None:
        assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "value", ["0.3", None, [True, 1], [], [1, "a"], {"filter": "x"}, [{"value": 1, "else": 2}], [[1]]]
)
def test_refuses_what_is_none_of_the_three(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected|condition"):
        parse_setting(value)
