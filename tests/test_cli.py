"""The command from end to end, on the demo's real models and a few images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from snapshots import tree

from wemoe_plugin.demo.workspace import prepare_demo
from wemoe_plugin.errors import PlanError
from wemoe_plugin.evaluation.scores import accuracy, predict
from wemoe_plugin.pipeline.tune import _task
from wemoe_plugin.pipeline.workbench import Workbench
from wemoe_plugin.recipe.loading import load_recipe
from wemoe_plugin.recipe.schema import TuningSpec

Command = Callable[..., tuple[int, str, str]]


def test_the_main_job(demo: Path, command: Command) -> None:
    status, out, err = command(demo / "recipe.yaml", "--out", demo / "merged")
    assert (status, err) == (0, "")
    assert "tuning 68,112 router parameters: distill, 4 steps" in out
    assert "The merged model keeps" in out
    results = json.loads((demo / "merged" / "results.json").read_text())
    assert list(results["tasks"]) == ["digits", "shapes", "textures", "clocks"]
    assert all(set(row) == {"base", "expert", "static", "merged"} for row in results["tasks"].values())
    assert all(0 <= value <= 1 for row in results["tasks"].values() for value in row.values())
    assert results["kept"] == results["mean"]["merged"] / results["mean"]["expert"]
    assert set(results["seconds"]) == {"plan", "data", "merge", "tune", "evaluate"}
    assert {"report.html", "routing.svg", "tasks.yaml", "recipe.yaml"} <= set(tree(demo / "merged"))
    manifest = json.loads((demo / "merged" / "manifest.json").read_text())["files"]
    import hashlib

    assert set(manifest) | {"manifest.json"} == set(tree(demo / "merged"))
    for name, entry in manifest.items():
        assert entry["sha256"] == hashlib.sha256((demo / "merged" / name).read_bytes()).hexdigest()


def test_the_steps_one_by_one_give_what_the_main_job_gives(demo: Path, command: Command) -> None:
    assert command(demo / "recipe.yaml", "--out", demo / "a", "--quiet") == (0, "", "")
    status, out, _ = command(demo / "recipe.yaml", "--out", demo / "b", "--no-tune", "--json")
    assert (status, json.loads(out)["directory"]) == (0, str(demo / "b"))
    fresh = load_file(demo / "b" / "routers.safetensors")
    assert command("tune", demo / "b", "--quiet") == (0, "", "")
    status, out, _ = command("evaluate", demo / "b", "--json")
    assert status == 0
    assert json.loads(out)["tasks"] == json.loads((demo / "a" / "results.json").read_text())["tasks"]
    tuned = [load_file(demo / name / "routers.safetensors") for name in ("a", "b")]
    assert all(torch.equal(tuned[0][name], tensor) for name, tensor in tuned[1].items())
    assert not all(torch.equal(tuned[0][name], tensor) for name, tensor in fresh.items())


def test_an_output_can_be_moved_together_with_its_inputs(demo: Path, command: Command) -> None:
    command(demo / "recipe.yaml", "--out", demo / "merged", "--no-tune")
    moved = demo.rename(demo.parent / "elsewhere")
    assert command("evaluate", moved / "merged", "--quiet") == (0, "", "")


def test_plan_writes_nothing(demo: Path, command: Command) -> None:
    before = tree(demo)
    status, out, err = command("plan", demo / "recipe.yaml")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["visual.**.mlp", "wemoe", "16", "526,848", "4"] in rows
    assert "peak memory" in out
    status, out, _ = command("plan", demo / "recipe.yaml", "--json")
    plan: dict[str, Any] = json.loads(out)
    assert plan["experts"] == ["digits", "shapes", "textures", "clocks"]
    assert plan["parameters"] == {"static": 872_065, "task_vectors": 4 * 526_848, "routers": 68_112}
    assert tree(demo) == before


def test_the_default_output_and_force(demo: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    assert command("recipe.yaml", "--no-tune", "--quiet")[0] == 0
    assert (demo / "merged" / "recipe" / "open_clip_model.safetensors").is_file()
    before = tree(demo)
    status, _, err = command("recipe.yaml", "--no-tune", "--quiet")
    assert (status, err) == (2, "error: merged/recipe: exists; replace it with --force or choose another --out\n")
    assert tree(demo) == before
    assert command("recipe.yaml", "--no-tune", "--quiet", "--force")[0] == 0


def test_an_output_in_the_way_is_left_alone(demo: Path, command: Command) -> None:
    (demo / "merged").mkdir()
    (demo / "merged" / "thesis.tex").write_text("x")
    before = tree(demo)
    for options in ([], ["--force"]):
        status, _, err = command(demo / "recipe.yaml", "--out", demo / "merged", *options)
        assert status == 2
        assert f"{demo / 'merged'}: " in err
        assert tree(demo) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evalute", "x"], "evalute: no such file; did you mean the command 'evaluate'?"),
        (["tune", "."], "not an output of wemoe-merge"),
        (["evaluate", "nowhere"], "not an output of wemoe-merge"),
    ],
)
def test_mistaken_commands(
    args: list[str], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = command(*args)
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("option", "value"), [("--max-memory", "lots"), ("--shard-size", "0GB"), ("--max-memory", "5PB")]
)
def test_sizes_that_are_none(demo: Path, command: Command, option: str, value: str) -> None:
    status, _, err = command(demo / "recipe.yaml", option, value)
    assert (status, err) == (2, f"error: {option} {value!r} is not a size such as 500MB or 4GiB\n")


def test_an_unexpected_failure_has_status_1_and_no_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEMOE_DEBUG", raising=False)
    monkeypatch.setattr("wemoe_plugin.recipe.whole.read_whole_recipe", lambda *_: 1 / 0)
    status, out, err = command("plan", "x.yaml")
    assert (status, out) == (1, "")
    assert err == "error: ZeroDivisionError: division by zero\n(unexpected; set WEMOE_DEBUG=1 to see where)\n"


def test_tuning_rewrites_the_routers_alone_and_removes_results_of_the_old_ones(demo: Path, command: Command) -> None:
    command(demo / "recipe.yaml", "--out", demo / "merged", "--no-tune", "--quiet")
    command("evaluate", demo / "merged", "--quiet")
    before = tree(demo / "merged")
    assert command("tune", demo / "merged", "--seed", "7", "--quiet") == (0, "", "")
    after = tree(demo / "merged")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    results = {"results.json", "report.html", "routing.svg"}
    assert changed == {"routers.safetensors", "manifest.json", "README.md"} | results
    assert "## Accuracy" in before["README.md"].decode()
    assert "## Accuracy" not in after["README.md"].decode()
    assert set(after) == set(before) - results
    assert set(json.loads(after["manifest.json"])["files"]) == set(after) - {"manifest.json"}


def test_the_seed_draws_the_routers(demo: Path, command: Command) -> None:
    routers = []
    for i, seed in enumerate((0, 0, 1)):
        out = demo / f"out{i}"
        command(demo / "recipe.yaml", "--out", out, "--no-tune", "--quiet", "--seed", seed)
        routers.append((out / "routers.safetensors").read_bytes())
    assert routers[0] == routers[1] != routers[2]


def test_tasks_without_labels_are_tuned_on_and_not_scored(demo: Path, command: Command) -> None:
    text = (demo / "tasks.yaml").read_text()
    lines = [line for line in text.splitlines() if not ("score:" in line and "digits" in line)]
    (demo / "tasks.yaml").write_text("\n".join(lines))
    status, out, _ = command(demo / "recipe.yaml", "--out", demo / "merged")
    assert status == 0
    assert "not scored, since they have no score: digits" in out
    assert list(json.loads((demo / "merged" / "results.json").read_text())["tasks"]) == ["shapes", "textures", "clocks"]


def test_the_teacher_of_a_task_is_its_own_expert(demo: Path) -> None:
    workbench = Workbench(load_recipe(demo / "recipe.yaml"))
    images = workbench.scoring_images("clocks")
    scores = {
        name: accuracy(
            predict(model, workbench.encode, workbench.head("clocks"), images.pixels, len(images)),
            workbench.labels("clocks"),
        )
        for name, model in {"own": workbench.expert("clocks"), "other": workbench.expert("digits")}.items()
    }
    assert scores["own"] > 0.9 > 0.5 > scores["other"]
    spec = TuningSpec(objective="distill")
    (task,) = [_task(name, workbench, spec, print) for name in workbench.tasks if name == "clocks"]
    assert task.teacher is not None
    expected = workbench.head("clocks")(workbench.encode(workbench.expert("clocks"), task.inputs([0, 1])))
    torch.testing.assert_close(task.teacher[:2], expected)


def test_a_failure_after_the_merge_says_what_is_kept(demo: Path, command: Command) -> None:
    last = sorted((demo / "data" / "digits" / "tune").iterdir())[-1]
    last.write_bytes(b"not an image")
    status, _, err = command(demo / "recipe.yaml", "--out", demo / "merged", "--quiet")
    assert status == 2
    assert "tasks.digits.tune: row 23 cannot be decoded" in err
    assert f"(the merge is complete in {demo / 'merged'}; go on with wemoe-merge tune)" in err


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_any_work(demo: Path, command: Command, device: str) -> None:
    before = tree(demo)
    status, _, err = command(demo / "recipe.yaml", "--out", demo / "merged", "--device", device, "--quiet")
    assert status == 2
    assert err.startswith(f"error: --device {device}: cannot be used: ")
    assert tree(demo) == before


def test_a_recipe_that_found_its_models_from_the_current_folder_finds_them_again(
    demo: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = demo.parent / "recipes"
    recipes.mkdir()
    for name in ("recipe.yaml", "tasks.yaml"):
        (demo / name).rename(recipes / name)
    monkeypatch.chdir(demo)
    assert command(recipes / "recipe.yaml", "--out", demo / "merged", "--no-tune", "--quiet")[0] == 0
    monkeypatch.chdir(recipes)
    assert command("evaluate", demo / "merged", "--quiet") == (0, "", "")


def test_the_demo_replaces_its_own_folder_only(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("recipe.yaml", "thesis.tex"):
        (project / name).write_text("mine")
    with pytest.raises(PlanError, match="this was not made by the demo"):
        prepare_demo(project, force=True, tune_images=2, score_images=12)
    assert {p.name for p in project.iterdir()} == {"recipe.yaml", "thesis.tex"}
    own = tmp_path / "own"
    prepare_demo(own, tune_images=2, score_images=12)
    prepare_demo(own, force=True, tune_images=3, score_images=12)
    assert len(list((own / "data" / "digits" / "tune").iterdir())) == 3
    for name in ("notes.txt", "data/digits/tune/mine.png", "models/mine/x"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("mine")
        with pytest.raises(PlanError, match=f"this holds {name} as well"):
            prepare_demo(own, force=True, tune_images=2, score_images=12)
        (own / name).unlink()
    (own / "merged").mkdir()
    (own / "merged" / "mine").write_text("mine")
    with pytest.raises(PlanError, match=r"in merged, this has no manifest\.json of ours"):
        prepare_demo(own, force=True, tune_images=2, score_images=12)


def test_a_terminated_merge_leaves_nothing(demo: Path) -> None:
    """SIGTERM in the middle of the writing, which a signal handler turns into an orderly end."""
    code = (
        "import os, signal, sys\n"
        "from wemoe_plugin.checkpoints import ranges\n"
        "from wemoe_plugin.cli import main\n"
        "write = ranges.TensorFile.put\n"
        "def killing(self, *args):\n"
        "    write(self, *args)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "ranges.TensorFile.put = killing\n"
        "main(sys.argv[1:])\n"
    )
    before = tree(demo)
    args = [str(demo / "recipe.yaml"), "--out", str(demo / "merged"), "--no-tune"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "interrupted; nothing half-written is left" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(demo) == before


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom wemoe_plugin.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pydantic', 'yaml', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")
    assert "wemoe-merge demo" in result.stdout
