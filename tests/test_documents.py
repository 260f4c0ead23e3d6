"""What the documents show works: recipes parse, code runs, the public names are the ones that are promised."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import wemoe_plugin
from wemoe_plugin.checkpoints.checkpoint import OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG
from wemoe_plugin.checkpoints.torch_file import TORCH_SUFFIXES
from wemoe_plugin.demo.workspace import prepare_demo
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe
from wemoe_plugin.recipe.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        texts = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        found += [(f"{page.name}#{i}", text) for i, text in enumerate(texts)]
    return found


def shared_recipes() -> list[Path]:
    return sorted((ROOT / "merge_recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("path", shared_recipes(), ids=lambda path: path.stem)
def test_shared_recipes_are_valid_and_listed(path: Path) -> None:
    assert load_recipe(path).recipe.models
    assert f"]({path.parent.name}/{path.name})" in (ROOT / "merge_recipes" / "README.md").read_text()


@pytest.mark.parametrize(("where", "text"), blocks("yaml"))
def test_recipes_in_documents_are_valid(tmp_path: Path, where: str, text: str) -> None:
    data = yaml.safe_load(text)
    parts: dict[str, Any] = {"models": [{"model": "a"}], "base_model": "b", "merge_method": "task_arithmetic"}
    if "tuning" in data and "tasks" not in data:  # an excerpt
        parts |= {"rules": [{"match": "mlp", "merge_method": "wemoe"}], "tasks": {"a": {"tune": {"path": "x"}}}}
    if set(data) & {"models", "rules", "parameters", "tuning", "merge_method"}:
        names = [task.get("expert", name) for name, task in data.get("tasks", {}).items()]
        parts["models"] = [{"model": name} for name in names] or parts["models"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**parts, **data}))
    else:  # a tasks file
        parts["models"] = [{"model": task.get("expert", name)} for name, task in data.items()]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**parts, "tasks": data}))
    load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents' code finds: wemoe-demo/ with its merge."""
    directory = tmp_path_factory.mktemp("documents") / "wemoe-demo"
    source = load_recipe(prepare_demo(directory, tune_images=8, score_images=24, steps=2))
    merge(source, plan_merge(source), directory / "merged")
    return directory


@pytest.mark.parametrize(("where", "text"), blocks("python"))
def test_code_in_documents_runs(demo: Path, monkeypatch: pytest.MonkeyPatch, where: str, text: str) -> None:
    monkeypatch.chdir(demo.parent)
    exec(compile(text, where, "exec"), {})


def test_every_public_name_has_a_home() -> None:
    assert wemoe_plugin.__all__ == sorted(wemoe_plugin.__all__)
    assert sorted(name for names in wemoe_plugin._HOMES.values() for name in names) == wemoe_plugin.__all__
    for name in wemoe_plugin.__all__:
        assert getattr(wemoe_plugin, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wemoe_plugin.nothing  # noqa: B018


def test_the_tour_names_every_file() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "wemoe_plugin"
    missing = [
        str(p.relative_to(package)) for p in package.rglob("*.py") if p.stem != "__init__" and p.name not in tour
    ]
    assert missing == []


def test_the_demos_checkpoints_stay_small() -> None:
    sizes = [p.stat().st_size for p in (ROOT / "wemoe_plugin" / "demo" / "checkpoints").rglob("*") if p.is_file()]
    assert sum(sizes) < 10_000_000


def test_the_page_of_methods_shows_the_table_that_recipes_are_checked_against() -> None:
    """If not: python tools/methods_table.py --write."""
    specification = importlib.util.spec_from_file_location("methods_table", ROOT / "tools" / "methods_table.py")
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.with_table(page) == page
    assert all(f"| `{name}`<br>" in page for name in METHODS)


def test_the_page_of_inputs_names_every_kind_that_is_read() -> None:
    page = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    for word in (*TORCH_SUFFIXES, ".safetensors", OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG, "@revision", "base+"):
        assert word in page
