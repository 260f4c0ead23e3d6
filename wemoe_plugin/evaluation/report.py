"""Show scores: lines for a terminal, a picture of the routing weights, a page for a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from wemoe_plugin.evaluation.scores import COLUMNS, Scores

_HEADINGS = {"base": "base", "expert": "own expert", "static": "static merge", "merged": "merged"}


def score_lines(scores: Scores) -> list[str]:
    """The accuracies as an aligned table, in percent, and what the merged model keeps."""
    width = max(len(name) for name in (*scores.tasks, "mean"))
    lines = [f"{'task':<{width}}" + "".join(f"{_HEADINGS[column]:>14}" for column in COLUMNS)]
    for name, row in (*scores.tasks.items(), ("mean", scores.mean)):
        lines.append(f"{name:<{width}}" + "".join(f"{100 * row[column]:>13.1f}%" for column in COLUMNS))
    gain = 100 * (scores.mean["merged"] - scores.mean["static"])
    lines.append(
        f"The merged model keeps {100 * scores.kept:.1f} % of its experts' mean accuracy, "
        f"{gain:+.1f} points against its static merge."
    )
    below = [name for name, row in scores.tasks.items() if row["expert"] < row["base"]]
    if below:
        lines.append(f"Note: on {', '.join(below)} the expert is worse than the base.")
    if gain < 0:
        lines.append("Note: the static merge is better; try objective: distill, more steps, or another learning_rate.")
    return lines


def markdown_table(scores: Scores) -> str:
    """The accuracies as a Markdown table, in percent."""
    headings = " | ".join(_HEADINGS[column] for column in COLUMNS)
    rows = [f"| task | {headings} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for name, row in (*scores.tasks.items(), ("mean", scores.mean)):
        rows.append(f"| {name} | {' | '.join(f'{100 * row[column]:.1f} %' for column in COLUMNS)} |")
    return "\n".join(rows)


_CELL_WIDTH, _CELL_HEIGHT, _GAP, _HEAD, _ACROSS = 52, 26, 28, 44, 4


def render_routing(scores: Scores) -> str:
    """An SVG with one panel per task: mean routing weight by upscaled module (rows) and expert (columns)."""
    modules = list(next(iter(scores.routing.values())))
    labels = short_names(modules)
    left = 16 + 7 * max(len(label) for label in labels)
    across = min(len(scores.routing), max(1, _ACROSS * 4 // max(4, len(scores.experts))))
    down = -(-len(scores.routing) // across)
    panel = _CELL_WIDTH * len(scores.experts)
    block = _HEAD + _CELL_HEIGHT * len(modules) + 16
    width = max(left + across * (panel + _GAP) - _GAP + 8, left + 440)
    height = 32 + down * block
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-size="14" fill="#1b1f24">Mean routing weight of each expert, '
        "by task of the images</text>",
    ]
    for i, (task, weights) in enumerate(scores.routing.items()):
        x, y = left + (i % across) * (panel + _GAP), 32 + (i // across) * block
        if i % across == 0:
            for row, label in enumerate(labels):
                middle = y + _HEAD + row * _CELL_HEIGHT + 17
                parts.append(
                    f'<text x="{left - 8}" y="{middle}" text-anchor="end" fill="#57606a">{escape(label)}</text>'
                )
        parts.append(f'<text x="{x}" y="{y + 14}" font-weight="600" fill="#1b1f24">{escape(task)} images</text>')
        parts += _panel(x, y, [weights[module] for module in modules], scores.experts)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(x: int, y: int, rows: Sequence[Sequence[float]], experts: Sequence[str]) -> list[str]:
    parts = []
    for k, expert in enumerate(experts):
        middle = x + k * _CELL_WIDTH + _CELL_WIDTH // 2
        shown = expert if len(expert) <= 8 else f"{expert[:7]}…"
        parts.append(
            f'<text x="{middle}" y="{y + 34}" text-anchor="middle" font-size="11" fill="#57606a">{escape(shown)}</text>'
        )
    for row, weights in enumerate(rows):
        for k, weight in enumerate(weights):
            left, top = x + k * _CELL_WIDTH, y + _HEAD + row * _CELL_HEIGHT
            ink = "#ffffff" if abs(weight) > 0.55 else "#1b1f24"
            parts.append(
                f'<rect x="{left}" y="{top}" width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}" rx="3" '
                f'fill="{_shade(weight)}"/><text x="{left + _CELL_WIDTH // 2 - 1}" y="{top + 16}" '
                f'text-anchor="middle" font-size="11" fill="{ink}">{weight:.2f}</text>'
            )
    return parts


def _shade(weight: float) -> str:
    """White at 0, blue towards 1, orange towards -1."""
    strength = min(abs(weight), 1.0)
    end = (31, 95, 191) if weight >= 0 else (196, 90, 20)
    red, green, blue = (round(255 + (channel - 255) * strength) for channel in end)
    return f"#{red:02x}{green:02x}{blue:02x}"


def short_names(paths: Sequence[str]) -> list[str]:
    """Dotted paths without the components they all share; "layer 3" where only one number differs."""
    split = [path.split(".") for path in paths]
    paths = ["shared router" if re.fullmatch(r"rules\.\d+", path) else path for path in paths]
    if len(paths) == 1 or len({len(parts) for parts in split}) > 1:
        return list(paths)
    varying = [i for i in range(len(split[0])) if len({parts[i] for parts in split}) > 1]
    if len(varying) == 1 and all(parts[varying[0]].isdigit() for parts in split):
        return [f"layer {parts[varying[0]]}" for parts in split]
    return [".".join(parts[i] for i in varying) for parts in split]


def render_report(scores: Scores, title: str) -> str:
    """A page with the accuracies and the routing weights; it needs no other file and no network."""
    rows = [_row(name, row) for name, row in scores.tasks.items()] + [_row("mean", scores.mean, "mean")]
    gain = 100 * (scores.mean["merged"] - scores.mean["static"])
    figure = f"<h2>Routing</h2><figure>{render_routing(scores)}</figure>" if scores.routing else ""
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in scores.seconds.items())
    style = (files("wemoe_plugin.evaluation") / "report.css").read_text(encoding="utf-8")
    headings = "".join(f"<th>{_HEADINGS[column]}</th>" for column in COLUMNS)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: merged with wemoe-plugin</title>
<style>
{style}</style>
<h1>{escape(title)}</h1>
<p class="lead">One model that keeps {100 * scores.kept:.1f} % of its experts' mean accuracy,
{gain:+.1f} points against its static merge.</p>
<h2>Accuracy</h2>
<div class="scroll"><table>
<tr><th>task</th>{headings}</tr>
{"".join(rows)}
</table></div>
{figure}
<footer>Time: {escape(spent)}. The numbers are in results.json.</footer>
</html>
"""


def _row(name: str, values: Mapping[str, float], kind: str = "") -> str:
    cells = "".join(
        f'<td class="{column}"><span class="track">'
        f'<span class="fill" style="width:{100 * values[column]:.1f}%"></span></span>'
        f"{100 * values[column]:.1f} %</td>"
        for column in COLUMNS
    )
    return f'<tr class="{kind}"><td>{escape(name)}</td>{cells}</tr>\n'
