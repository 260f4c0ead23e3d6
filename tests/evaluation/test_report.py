"""Scores are shown as they are."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import torch
from torch import nn

from wemoe_plugin.evaluation.report import markdown_table, render_report, render_routing, score_lines, short_names
from wemoe_plugin.evaluation.routing import routing_means
from wemoe_plugin.evaluation.scores import Scores, accuracy, predict
from wemoe_plugin.merging.card import with_scores

ROW = {"base": 0.5, "expert": 1.0, "static": 0.75, "merged": 0.9}
SCORES = Scores(
    {"digits": ROW, "a<b": {**ROW, "merged": 0.7}},
    {"merge": 1.5},
    {name: {"blocks.0.mlp": [1.0, -0.25], "blocks.1.mlp": [0.5, 0.0]} for name in ("digits", "a<b")},
    ["digits", "a<b"],
)


def test_means_and_what_is_kept() -> None:
    assert SCORES.mean == {"base": 0.5, "expert": 1.0, "static": 0.75, "merged": 0.8}
    assert SCORES.kept == 0.8
    data: dict[str, Any] = json.loads(json.dumps(SCORES.to_json()))
    assert data["tasks"]["digits"] == ROW
    assert (data["kept"], data["mean"]["merged"], data["seconds"]) == (0.8, 0.8, {"merge": 1.5})


def test_the_table_for_a_terminal() -> None:
    assert score_lines(SCORES) == [
        "task            base    own expert  static merge        merged",
        "digits         50.0%        100.0%         75.0%         90.0%",
        "a<b            50.0%        100.0%         75.0%         70.0%",
        "mean           50.0%        100.0%         75.0%         80.0%",
        "The merged model keeps 80.0 % of its experts' mean accuracy, +5.0 points against its static merge.",
    ]


def test_the_picture_shows_every_weight_once() -> None:
    texts = [element.text for element in ET.fromstring(render_routing(SCORES)).iter() if element.text]
    for shown in ("1.00", "-0.25", "0.50", "layer 0", "digits images", "a<b images"):
        assert shown in texts
    assert texts.count("1.00") == texts.count("-0.25") == 2


def test_the_page_escapes_names_and_needs_nothing_else() -> None:
    page = render_report(SCORES, "my <model>")
    assert "my &lt;model&gt;" in page
    assert "a<b" not in page
    assert "src=" not in page
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "keeps 80.0 %" in page


def test_bad_news_is_told() -> None:
    scores = Scores({"t": {"base": 0.9, "expert": 0.5, "static": 0.8, "merged": 0.6}})
    assert score_lines(scores)[-2:] == [
        "Note: on t the expert is worse than the base.",
        "Note: the static merge is better; try objective: distill, more steps, or another learning_rate.",
    ]


def test_the_card_holds_the_latest_table_only() -> None:
    card = "# x\n\ntext\n\n## Recipe\n\nr\n"
    once = with_scores(card, markdown_table(SCORES))
    assert "| digits | 50.0 % | 100.0 % | 75.0 % | 90.0 % |" in once
    assert once.index("## Accuracy") < once.index("## Recipe")
    assert with_scores(once, markdown_table(SCORES)) == once
    assert with_scores(once, None) == card


def test_module_names_without_what_they_share() -> None:
    assert short_names(["v.0.mlp", "v.10.mlp"]) == ["layer 0", "layer 10"]
    assert short_names(["v.0.mlp", "t.0.mlp"]) == ["v", "t"]
    assert short_names(["v.0.mlp", "v.0.attn", "v.1.mlp"]) == ["0.mlp", "0.attn", "1.mlp"]
    assert short_names(["x.mlp"]) == ["x.mlp"]
    assert short_names(["a.b", "a.b.c"]) == ["a.b", "a.b.c"]


def test_routing_means_are_over_samples_not_batches() -> None:
    router = nn.Identity()
    with routing_means({"m": router}) as means:
        router(torch.tensor([[1.0, 0.0]] * 3))
        router(torch.tensor([[0.0, 1.0]]))
    assert means == {"m": [0.75, 0.25]}
    router(torch.ones(1, 2))
    assert means == {"m": [0.75, 0.25]}


def test_predictions_cover_every_row_in_order() -> None:
    data = torch.arange(7.0).unsqueeze(1)
    logits = predict(nn.Identity(), lambda m, x: m(x), lambda f: f * 2, lambda rows: data[list(rows)], 7, batch_size=3)
    assert logits.squeeze(1).tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_accuracy() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
