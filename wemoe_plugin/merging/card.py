"""The model card of an output directory."""

from __future__ import annotations

from wemoe_plugin.merging.plan import MergePlan


def model_card(plan: MergePlan, title: str, recipe_text: str) -> str:
    """README.md of an output: what was merged, how to load it, the recipe."""
    library = plan.library
    experts = "\n".join(f"- {expert.name}" for expert in plan.experts)
    plain = (
        'open_clip.create_model("local-dir:PATH")'
        if library == "open_clip"
        else "the model's own class, `from_pretrained(PATH)`"
    )
    upscaled = (
        f"""{len(plan.modules)} modules are weight-ensembling mixtures of experts (WEMoE, arXiv 2402.00433): their
weights are composed for every input from the base and {len(plan.experts)} task vectors.

```python
from wemoe_plugin import load_model

model = load_model("PATH")
```

The directory is an ordinary checkpoint too: {plain} loads the static merge. Until its routers are tuned, both are the
same."""
        if plan.modules
        else f"A static merge; {plain} loads it."
    )
    return f"""---
library_name: {library}
tags: [merge, wemoe]
---
# {title}

Merged with wemoe-plugin from {len(plan.experts)} fine-tunes of one base model:

{experts}

{upscaled}

## Recipe

```yaml
{recipe_text.rstrip()}
```
"""


def with_scores(card: str, table: str | None) -> str:
    """The card with a table of accuracies before its recipe, in place of an earlier one; None takes that away."""
    head, mark, recipe = card.partition("## Recipe")
    head = head.partition("## Accuracy")[0].rstrip()
    accuracy = "" if table is None else f"## Accuracy\n\n{table}\n\n"
    return f"{head}\n\n{accuracy}{mark}{recipe}"
