"""Score an output directory and leave the results in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from wemoe_plugin.checkpoints.manifest import refresh_manifest
from wemoe_plugin.checkpoints.staging import write_atomically
from wemoe_plugin.errors import TuningError
from wemoe_plugin.evaluation.report import markdown_table, render_report, render_routing
from wemoe_plugin.evaluation.routing import routing_means
from wemoe_plugin.evaluation.scores import Scores, accuracy, predict
from wemoe_plugin.merging.card import with_scores
from wemoe_plugin.modeling.attach import routers_of
from wemoe_plugin.modeling.config import CONFIG_NAME, read_config
from wemoe_plugin.modeling.loading import load_model, load_static
from wemoe_plugin.pipeline.workbench import Workbench

RESULT_NAMES = ("results.json", "report.html", "routing.svg")
"""The files that show scores."""


def evaluate_directory(
    directory: Path,
    workbench: Workbench,
    *,
    say: Callable[[str], None] = lambda line: None,
    seconds: Mapping[str, float] | None = None,
) -> Scores:
    """Score base, experts, static merge and merged model on the recipe's labeled data.

    Writes ``results.json``, ``report.html`` and, with upscaled modules, ``routing.svg`` into the directory, and the
    table into its model card.

    Args:
        directory: an output of wemoe-merge.
        workbench: of its recipe.
        say: receives a line about what is being done.
        seconds: what earlier steps took, to stand beside the scores.

    Raises:
        TuningError: data, heads or labels cannot be used.
        CheckpointError: the directory or one of the recipe's models cannot be loaded.
    """
    if not workbench.scored_tasks:
        raise TuningError(f"{directory}: no task of its recipe has score: with labeled data")
    started = time.perf_counter()
    config = read_config(directory) if (directory / CONFIG_NAME).is_file() else None
    static, merged = load_static(directory, workbench.device), load_model(directory, workbench.device)
    routers = routers_of(merged)
    tasks: dict[str, dict[str, float]] = {}
    routing: dict[str, dict[str, list[float]]] = {}
    for name in workbench.scored_tasks:
        images, labels, head = workbench.scoring_images(name), workbench.labels(name), workbench.head(name)
        say(f"scoring {name}: {len(images):,} images")
        expert = workbench.expert(workbench.expert_name(name))
        models = {"base": workbench.base, "expert": expert, "static": static, "merged": merged}
        tasks[name] = {}
        with routing_means(routers) as means:
            for column, model in models.items():
                logits = predict(model, workbench.encode, head, images.pixels, len(images))
                tasks[name][column] = accuracy(logits, labels)
        if routers:
            routing[name] = means
    spent = {**(seconds or {}), "evaluate": time.perf_counter() - started}
    experts = config.experts if config is not None else ()
    scores = Scores(tasks, {key: round(value, 2) for key, value in spent.items()}, routing, experts)
    write_results(directory, scores)
    return scores


def write_results(directory: Path, scores: Scores) -> None:
    """Write the files that show the scores, and enter them in the manifest."""
    texts = [json.dumps(scores.to_json(), indent=2) + "\n", render_report(scores, directory.resolve().name)]
    if scores.routing:
        texts.append(render_routing(scores))
    files = dict(zip(RESULT_NAMES, texts, strict=False))
    card = directory / "README.md"
    if card.is_file():
        files[card.name] = with_scores(card.read_text(encoding="utf-8"), markdown_table(scores))
    for name, text in files.items():
        write_atomically(directory / name, text.encode())
    refresh_manifest(directory, files)
