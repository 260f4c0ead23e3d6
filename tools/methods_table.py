"""The table of merge methods in docs/methods.md, from the table the product checks recipes against.

python tools/methods_table.py [--write]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from wemoe_plugin.recipe.methods import MERGEKITS, OURS, STREAMED, Method, Parameter

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- the table: tools/methods_table.py -->", "<!-- end of the table -->"


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None:
        return "none"
    return str(parameter.default).lower() if parameter.kind == "flag" else f"{parameter.default:g}"


def _parameters(parameters: Mapping[str, Parameter]) -> str:
    return ", ".join(
        f"`{name}`{'ₖ' if spec.scope == 'model' else ''} ({_default(spec)})" for name, spec in parameters.items()
    )


def _models(method: Method) -> str:
    (fewest, most), (_, others) = method.inputs, method.others
    if method.base == "ignored":
        return "1" if most == 1 else "any number (a base is one)"
    base = "base" if method.base == "required" else "base or none"
    if most is not None:
        return f"{base} and {most - 1}"
    if others is not None:
        return f"{base} and {others}"
    return f"{base} and {max(1, fewest - 1)} or more"


def _row(name: str, method: Method) -> str:
    how = "ranges" if name in STREAMED else "tensors, seeded" if method.random else "tensors"
    title = f"[{method.title}]({method.source})" if method.source else method.title
    return f"| `{name}`<br>{title} | {_models(method)} | {_parameters(method.parameters)} | {how} |"


def render() -> str:
    """The table as Markdown, ours first."""
    head = ["| method | models | parameters (defaults) | works on |", "|---|---|---|---|"]
    return "\n".join([*head, *(_row(name, method) for name, method in {**OURS, **MERGEKITS}.items())])


def with_table(page: str) -> str:
    """A page with the table between its two marks renewed."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew docs/methods.md")
    if parser.parse_args().write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(render())


if __name__ == "__main__":
    main()
