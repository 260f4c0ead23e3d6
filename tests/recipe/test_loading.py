"""A recipe is read whole, or every problem is named with its line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hostile import cases, refusal
from hypothesis import given
from hypothesis import strategies as st

from wemoe_plugin.errors import CheckpointError, RecipeError
from wemoe_plugin.merging.inputs import open_models
from wemoe_plugin.recipe.loading import RecipeFile, load_recipe
from wemoe_plugin.recipe.whole import read_whole_recipe

GOOD = """\
base_model: ./base
models:
  - model: ./experts/digits
    parameters: {weight: 0.5}
  - {model: ./experts/shapes-v2.safetensors, name: shapes}
merge_method: task_arithmetic
parameters: {lambda: 0.3}
dtype: float32
out_dtype: bfloat16
rules:
  - match: mlp
    merge_method: wemoe
    parameters:
      router: {depth: 1, init_lambda: 0.4, shared: true}
      task_vectors: {form: low_rank, rank: 16}
  - match: [text_model.**, logit_scale]
    merge_method: base
tasks:
  digits:
    tune: {path: imagefolder, data_dir: tune}
    head: {class_names: [zero, one], templates: ["the digit {}."]}
tuning: {objective: distill, steps: 10, learning_rate: 1e-3, batch_size: 4}
"""


def load(tmp_path: Path, text: str) -> RecipeFile:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]


def test_reads_every_part(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD).recipe
    assert [entry.name for entry in recipe.models] == ["digits", "shapes"]
    first, second = recipe.rules
    assert first.match.globs == ("mlp",)
    assert second.match.globs == ("text_model.**", "logit_scale")
    assert first.parameters.router is not None
    assert (first.parameters.router.depth, first.parameters.router.init_lambda) == (1, 0.4)
    assert first.parameters.task_vectors is not None
    assert first.parameters.task_vectors.rank == 16
    assert recipe.tuning is not None
    assert recipe.tuning.learning_rate == 1e-3
    assert recipe.tasks is not None
    assert recipe.tasks["digits"].head.class_names == ("zero", "one")


def test_names_default_to_the_last_part_of_the_path(tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: a/b c/}, {model: x/y.safetensors}]\n"
    assert [entry.name for entry in load(tmp_path, text).recipe.models] == ["b-c", "y"]


def test_reports_all_problems_at_once_by_line(tmp_path: Path) -> None:
    text = GOOD.replace("parameters: {weight: 0.5}", "parametrs: {weight: 0.5}").replace("lambda: 0.3", "lamda: 0.3")
    text = text.replace("depth: 1", "depth: 5").replace("batch_size: 4", "batch_size: 0")
    assert problems(tmp_path, text) == [
        "recipe.yaml:4: models[0].parametrs: unknown key; did you mean 'parameters'?",
        "recipe.yaml:7: parameters.lamda: unknown key; did you mean 'lambda'?",
        "recipe.yaml:14: rules[0].parameters.router.depth: 5 is not one of 0, 1 or 2",
        "recipe.yaml:22: tuning.batch_size: input should be greater than or equal to 1 (found 0)",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge_method: task_arithmetic\n", "", "recipe.yaml:1: merge_method: is missing; it says what becomes of"),
        ("merge_method: task_arithmetic", "merge_method: task_arithmetics", "did you mean 'task_arithmetic'?"),
        ("merge_method: task_arithmetic", "merge_method: wemoe", "recipe.yaml:6: merge_method: wemoe upscales parts"),
        ("base_model: ./base\n", "", "base_model: is missing; base, task_arithmetic, wemoe need it"),
        ("name: shapes", "name: digits", "recipe.yaml:5: models[1].name: two models are named 'digits'"),
        ("name: shapes", "name: a/b", "a name has letters, digits"),
        ("weight: 0.5", "weight: [0.1, high]", "weight: expected a number or true or false, a list of them"),
        ("weight: 0.5", "weight: [{filter: mlp}]", "a condition has the keys 'value'"),
        ("weight: 0.5", "weight: .nan", "expected finite numbers"),
        ("weight: 0.5", "weight: true", "recipe.yaml:4: models[0].parameters.weight: expected a number, not true or"),
        ("lambda: 0.3", "lambda: 0.3, normalize: 1", "parameters.normalize: expected true or false"),
        ("lambda: 0.3", "router: {}", "parameters.router: router is for rules with merge_method: wemoe"),
        (
            "    merge_method: base",
            "    merge_method: ties\n    parameters: {t: 1}",
            "ties does not use t (it uses lambda",
        ),
        ("    merge_method: base", "    merge_method: ties\n    parameters: {densiti: 1}", "did you mean 'density'?"),
        (
            "    merge_method: base",
            "    merge_method: karcher\n    parameters: {max_iter: 1.5}",
            "recipe.yaml:18: rules[1].parameters.max_iter: expected a whole number",
        ),
        ("form: low_rank, rank: 16", "form: low_rank", "form low_rank needs one of rank: 16, energy: 0.95 and max_par"),
        ("form: low_rank, rank: 16", "rank: 16", "rank is for form: low_rank"),
        ("match: mlp", "match: layers..mlp", "recipe.yaml:11: rules[0].match: 'layers..mlp' has an empty component"),
        ("match: mlp", "match: 'layers.[5-1]'", "[5-1] in 'layers.[5-1]' is not a range of numbers"),
        ("match: mlp", "match: 3", "expected one of the keywords mlp, attention, a glob"),
        ("    merge_method: base", "    merge_method: base\n    parameters: {lambda: 1}", "base does not use lambda"),
        (
            "router: {depth: 1",
            "lambda: 1\n      router: {depth: 1",
            "rules[0].parameters.lambda: wemoe does not use lambda (it uses router, task_vectors; its λ is",
        ),
        ("router: {depth: 1", "ruoter: {depth: 1", "rules[0].parameters.ruoter: unknown key; did you mean 'router'?"),
        ('"the digit {}."', '"the digit"', "the template 'the digit' needs exactly one {}"),
        ('"the digit {}."', '"{} {x}"', "needs exactly one {}"),
        ("tune: {path: imagefolder, data_dir: tune}", "tune: {data_dir: tune}", "'path' is missing"),
        ("  digits:\n", "  digts:\n", "recipe.yaml:19: tasks.digts: no model is named 'digts'; did you mean 'digits'?"),
        ("tune: {path: imagefolder, data_dir: tune}", "label: label", "tasks.digits: tuning needs tune:"),
        ("steps: 10", "steps: true", "tuning.steps: expected a number, not true or false"),
        ("steps: 10", "stepz: 10", "tuning.stepz: unknown key; did you mean 'steps'?"),
        ("dtype: float32", "slices: []", "slices is for recipes that mergekit carries out as a whole"),
        ("objective: distill", "objective: destill", "'destill' is not one of 'distill', 'entropy' or 'infomax'"),
    ],
)
def test_names_what_is_wrong_and_what_would_mend_it(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in "\n".join(problems(tmp_path, GOOD.replace(old, new, 1)))


VECTORS = "recipe.yaml:15: rules[0].parameters.task_vectors"
MULTIPLE = "max_parameters: expected a multiple of the base's parameters above 1, such as 1.3x"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("form: sparse, rank: 4", ": rank is for form: low_rank"),
        ("form: sparse, density: 0.1, rank: 4", ": rank is for form: low_rank"),
        ("form: sparse, density: 0.1, energy: 0.9", ": energy is for form: low_rank"),
        ("form: sparse", ": form sparse needs a density, such as 0.1"),
        ("form: sparse, density: 0", ".density: input should be greater than 0 (found 0)"),
        ("form: sparse, density: 1.1", ".density: input should be less than or equal to 1 (found 1.1)"),
        ("form: sparse, density: 10%", ".density: input should be a valid number (found '10%')"),
        ("form: low_rank, rank: 4, density: 0.1", ": density is for form: sparse"),
        ("density: 0.1", ": density is for form: sparse"),
        ("energy: 0.9", ": energy is for form: low_rank"),
        ("max_parameters: 1.3x", ": max_parameters is for form: low_rank"),
        ("form: low_rank, energy: 0", ".energy: input should be greater than 0 (found 0)"),
        ("form: low_rank, energy: 1.5", ".energy: input should be less than or equal to 1 (found 1.5)"),
        ("form: low_rank, energy: .nan", ".energy: input should be a finite number (found nan)"),
        ("form: low_rank, energy: true", ".energy: expected a number, not true or false"),
        ("form: low_rank, rank: 0", ".rank: input should be greater than or equal to 1 (found 0)"),
        *(
            (f"form: low_rank, max_parameters: {text}", f".{MULTIPLE}")
            for text in ("0.9x", "1x", "'1.3'", "1.3", "-2x")
        ),
        *(
            (f"form: low_rank, max_parameters: {text}", f".{MULTIPLE}")
            for text in ("0.9x", "1x", "'1.3'", "1.3", "-2x", "1.3 x", "nanx", "1e9x", "[1.3x]")
        ),
        (
            "form: low_rank, rank: 4, energy: 0.9",
            ": form low_rank needs one of rank: 16, energy: 0.95 and max_parameters: 1.3x; it has rank and energy",
        ),
        (
            "form: low_rank, energy: 0.9, max_parameters: 1.3x",
            ": form low_rank needs one of rank: 16, energy: 0.95 and max_parameters: 1.3x; it has energy and "
            "max_parameters",
        ),
        ("form: lowrank, rank: 4", ".form: 'lowrank' is not one of 'dense', 'low_rank' or 'sparse'"),
    ],
)
def test_sizes_that_do_not_belong_to_their_form_are_one_message(tmp_path: Path, form: str, message: str) -> None:
    assert problems(tmp_path, GOOD.replace("form: low_rank, rank: 16", form)) == [f"{VECTORS}{message}"]


@pytest.mark.parametrize(("form", "named"), [("form: sparse, density: 0.1", "sparse"), ("form: dense", "dense")])
def test_tokens_are_routed_with_low_rank_task_vectors_only(tmp_path: Path, form: str, named: str) -> None:
    text = GOOD.replace("shared: true", "routing: token").replace("form: low_rank, rank: 16", form)
    (line,) = problems(tmp_path, text)
    assert line == (
        "recipe.yaml:13: rules[0].parameters: routing: token needs form: low_rank; "
        f"{named} ones are composed for a whole sample"
    )
    assert load(tmp_path, GOOD.replace("shared: true", "routing: token")).recipe.rules[0].parameters.router


def test_limits_for_the_whole_model_are_one(tmp_path: Path) -> None:
    limited = "    merge_method: wemoe\n    parameters: {task_vectors: {form: low_rank, max_parameters: LIMIT}}"
    text = GOOD.replace("rank: 16", "max_parameters: 1.3x").replace("    merge_method: base", limited)
    assert load(tmp_path, text.replace("LIMIT", "1.30x"))
    assert problems(tmp_path, text.replace("LIMIT", "1.4x")) == [
        "recipe.yaml:18: rules[1].parameters.task_vectors.max_parameters: is one limit for the whole model; an earlier "
        "rule says 1.3x"
    ]


def test_tuning_without_tasks_is_an_error(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("tasks:")] + "tuning: {steps: 10}\n"
    assert problems(tmp_path, text) == [
        "recipe.yaml:18: tuning: there are no tasks to tune on; add tasks: with unlabeled data"
    ]


def test_tuning_without_routers_is_an_error(tmp_path: Path) -> None:
    text = GOOD.replace(GOOD[GOOD.index("  - match: mlp") : GOOD.index("  - match: [text")], "")
    assert "there are no routers to tune; add a rule with merge_method: wemoe" in problems(tmp_path, text)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "recipe.yaml:2: the key 'a' stands twice"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not",
        ),
        ("a: !custom 1\n", "the tag '!custom' is not allowed"),
        ("? [1, 2]\n: 3\n", "a key must be a plain word"),
        ("- 1\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: &a {<<: *a}\n", "nested too deeply"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: {<<: 1}\n", "recipe.yaml:1: << takes a mapping"),
        ("a: 0x" + "f" * 5000, "recipe.yaml:1: a number has 5,002 characters"),
        ("a: 1\n" * 200_001, "recipe.yaml: has more than 1,000,000 bytes"),
        ("a: \0\n", "recipe.yaml: not valid YAML: unacceptable character #x0000"),
    ],
)
def test_refuses_yaml_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(problems(tmp_path, text))


def test_refuses_alias_bombs(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "more than 100,000 values once aliases are followed" in problems(tmp_path, text)[0]


def test_refuses_merge_bombs(tmp_path: Path) -> None:
    text = "a0: &a0 {}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))
    assert "more than 100,000 values once aliases are followed" in problems(tmp_path, text)[0]


BOMB = (
    "[&a [x, x, x, x, x, x, x, x, x, x], "
    + ", ".join(f"&{b} [{f'*{a}, ' * 10}]" for a, b in zip("abcde", "bcdef", strict=True))
    + "]"
)
ODD_YAML = [
    *("null", "true", "-1", "1.5", "1e400", ".nan", "-.inf", "[]", "{}", "''", "x", "0x" + "f" * 5000, "9" * 4000),
    *(
        "1:" * 3000 + "1",
        "1" * 99 + ".0",
        '"a\\nb"',
        '"\\0"',
        '"\\ud800"',
        '"\\u001b[2J"',
        "~nobody/x",
        "x" * 5000,
        "../x",
        "/",
    ),
    *(
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system",
        "!custom x",
        "!!int x",
        "!!bool x",
        "!!set {a}",
    ),
    *("!!binary x", "!!timestamp x", "!!map x", "!!seq x", "!!str [1]", "!!float 1:x", "2001-02-30", "=", "<<", "*a"),
    *(
        BOMB,
        "&a [*a]",
        "[" * 300,
        "[" * 80 + "]" * 80,
        "'[0-9999]'",
        "'[\\n]'",
        "layers.[5-1]",
        "'**.**.**'",
        "[mlp, [mlp]]",
    ),
]
PLAUSIBLE = [
    *("base", "linear", "task_arithmetic", "wemoe", "mlp", "digits", "0.3", "16", "low_rank", "float32", "'a {}.'"),
    *("[{model: a}]", "[{model: a}, {model: b}]", "[{match: mlp, merge_method: wemoe}]", "{lambda: 0.3}", "[0, 1]"),
    *("{digits: {tune: {path: x}}}", "{steps: 3}", "recipe.yaml", "."),
]
KEYS = [
    *("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "rules", "tasks", "tuning", "model"),
    *("name", "match", "lambda", "weight", "normalize", "router", "depth", "init_lambda", "shared", "task_vectors"),
    *("form", "rank", "tune", "score", "path", "expert", "head", "class_names", "templates", "steps", "seed", "filter"),
    *("value", "slices", "<<", '"a\\nb"', "x[0]", "[1]", "!!int 1", "''", "?"),
]
keys = st.sampled_from(KEYS)
values = st.recursive(
    st.sampled_from(ODD_YAML) | st.sampled_from(PLAUSIBLE),
    lambda inner: (
        st.builds(lambda items: f"[{', '.join(items)}]", st.lists(inner, max_size=3))
        | st.builds(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}",
            st.lists(st.tuples(keys, inner), max_size=3),
        )
    ),
    max_leaves=6,
)


def is_read_or_refused_by_line(path: Path) -> None:
    for read in (load_recipe, read_whole_recipe):
        for line in (refusal(lambda read=read: read(path), RecipeError) or "").splitlines():
            assert line.startswith(f"{path}:")
            assert line.isprintable()


@given(st.lists(st.tuples(keys, values), max_size=5, unique_by=lambda pair: pair[0]), st.booleans())
@cases("recipes")
def test_any_recipe_is_read_or_refused_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[str, str]], whole: bool
) -> None:
    monkeypatch.setattr("wemoe_plugin.recipe.yaml_source.MAX_VALUES", 2_000)
    start = {"merge_method": "linear", "models": "[{model: a}]"} if whole else {}
    text = "".join(f"{key}: {value}\n" for key, value in {**start, **dict(pairs)}.items())
    (tmp_path / "recipe.yaml").write_text(text)
    is_read_or_refused_by_line(tmp_path / "recipe.yaml")


@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"%@#? \n\tab1<=", max_size=30) | st.binary(max_size=30))
@cases("recipes of any text")
def test_any_text_is_read_or_refused_by_line(tmp_path: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (tmp_path / "recipe.yaml").write_bytes(data)
    is_read_or_refused_by_line(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("reference", ["~nobody-of-that-name/x", "x" * 5000, '"a\\0b"'])
def test_a_path_that_cannot_be_is_not_there(tmp_path: Path, reference: str) -> None:
    source = load(tmp_path, f"merge_method: linear\nmodels: [{{model: {reference}, name: a}}]\n")
    with pytest.raises(CheckpointError, match="no such directory or file"):
        open_models(source)


def test_a_device_is_no_recipe(tmp_path: Path) -> None:
    assert (
        "is a pipe, a socket or a device" in problems(tmp_path, GOOD[: GOOD.index("tasks:")] + "tasks: /dev/zero\n")[0]
    )


def test_problems_of_a_tasks_file_name_that_file(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("digits:\n  tune: {path: x}\n  heads: {}\n")
    text = GOOD[: GOOD.index("tasks:")] + "tasks: t.yaml\n"
    assert problems(tmp_path, text) == ["t.yaml:3: digits.heads: unknown key; did you mean 'head'?"]


def test_a_missing_tasks_file_is_named_with_the_line_that_names_it(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("tasks:")] + "tasks: t.yaml\n"
    assert problems(tmp_path, text) == [f"recipe.yaml:18: tasks: {tmp_path}/t.yaml: no such file"]


def test_paths_start_at_the_recipe_and_then_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for directory in (home / "both", here / "both", here / "only-here"):
        directory.mkdir(parents=True)
    monkeypatch.chdir(here)
    source = load(home, "merge_method: linear\nmodels: [{model: a}]\n")
    assert source.resolve("both") == home / "both"
    assert source.resolve("only-here").resolve() == here / "only-here"
    assert source.resolve("nowhere") == home / "nowhere"
    assert source.resolve(str(here / "both")) == here / "both"


def test_reading_a_recipe_imports_no_torch() -> None:
    import subprocess

    code = "import sys, wemoe_plugin.merging.planner, wemoe_plugin.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_misspelled_parameter_has_one_message_not_one_about_its_value_too(tmp_path: Path) -> None:
    assert len(problems(tmp_path, GOOD.replace("router: {depth", "ruoter: {depth"))) == 1
