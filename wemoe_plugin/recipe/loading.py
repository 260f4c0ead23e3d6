"""From a recipe file to a checked `Recipe`, with every problem reported at once and by line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from wemoe_plugin.errors import RecipeError
from wemoe_plugin.recipe.methods import METHODS, STREAMED, Parameter
from wemoe_plugin.recipe.paths import resolve_path
from wemoe_plugin.recipe.schema import Recipe
from wemoe_plugin.recipe.settings import Setting, parse_setting
from wemoe_plugin.recipe.whole import WHOLE_KEYS
from wemoe_plugin.recipe.yaml_source import Location, YamlSource, read_yaml

_MAX_PROBLEMS = 100
"""More are not told at once."""

_Problem = tuple[YamlSource, Location, str]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe together with where it stands.

    Attributes:
        path: the recipe file.
        recipe: what it says.
        directory: where relative paths in it start.
        fallback: where they start if nothing is there.
        tasks_path: the tasks file it names, if it does.
        source: its text, for the lines of messages.
    """

    path: Path
    recipe: Recipe
    directory: Path
    fallback: Path
    tasks_path: Path | None
    source: YamlSource

    def where(self, *location: str | int) -> str:
        """``path:line`` of a part of the recipe, for messages."""
        return self.source.where(location)

    def resolve(self, reference: str) -> Path:
        """A path the recipe names: relative to the recipe, else to the fallback if only that exists."""
        return resolve_path(reference, self.directory, self.fallback)


def load_recipe(
    path: Path | str,
    directory: Path | None = None,
    fallback: Path = Path(),
    tasks_path: Path | None = None,
) -> RecipeFile:
    """Read and check a recipe.

    Args:
        path: the recipe.
        directory: where its relative paths start; default its own folder.
        fallback: where they start if nothing is there; default the current folder.
        tasks_path: read the tasks from here if the recipe names a tasks file; default the file it names.

    Raises:
        RecipeError: one line per problem, each ``path:line: what is wrong``.
    """
    path = Path(path)
    directory = path.parent if directory is None else directory
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise RecipeError(f"{source.where(())}: a recipe is a mapping with models and a merge_method")
    data = dict(source.data)
    problems: list[_Problem] = []

    tasks_source: YamlSource | None = None
    if isinstance(data.get("tasks"), str):
        tasks_path = tasks_path or directory / data["tasks"]
        try:
            tasks_source = read_yaml(tasks_path)
            data["tasks"] = tasks_source.data
        except RecipeError as error:
            problems.append((source, ("tasks",), str(error)))
            data = {key: value for key, value in data.items() if key not in ("tasks", "tuning")}
    else:
        tasks_path = None

    def place(location: Location) -> tuple[YamlSource, Location]:
        if tasks_source is not None and location[:1] == ("tasks",):
            return tasks_source, location[1:]
        return source, location

    recipe: Recipe | None = None
    named = list(islice(_parameter_problems(data), _MAX_PROBLEMS))
    wrong = {where for where, _ in named}  # a parameter that nothing has needs no word about its value
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = ((where, text) for where, text in _explain(error, data) if where not in wrong)
        problems += [(*place(where), text) for where, text in islice(found, _MAX_PROBLEMS)]
    problems += [(*place(where), text) for where, text in named]
    if recipe is not None:
        problems += [(*place(where), text) for where, text in islice(_inconsistencies(recipe), _MAX_PROBLEMS)]
    if problems or recipe is None:
        raise RecipeError("\n".join(_lines(problems)))
    return RecipeFile(path, recipe, directory, fallback, tasks_path, source)


def _lines(problems: list[_Problem]) -> list[str]:
    def number(problem: _Problem) -> tuple[str, int]:
        path, _, line = problem[0].where(problem[1]).rpartition(":")
        return (path, int(line)) if line.isdigit() else (f"{path}:{line}", 0)

    ordered = sorted(problems, key=number)
    return [f"{source.where(place)}: {_one_line(_dotted(place) + text)}" for source, place, text in ordered]


def _one_line(text: str) -> str:
    """The text with whatever a terminal would not print, line ends above all, written as Python escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return f"{text}: " if text else ""


def _explain(error: ValidationError, data: dict[str, Any]) -> Iterable[tuple[Location, str]]:
    seen: set[tuple[Location, str]] = set()
    for detail in error.errors():
        location = _written_location(detail["loc"], data)
        kind, value = detail["type"], detail["input"]
        if kind == "extra_forbidden":
            text = _unknown_key(location)
        elif kind == "missing":
            text = "is missing"
            if location == ("merge_method",):
                text = f"is missing; it says what becomes of whatever no rule claims: {', '.join(STREAMED)}, ..."
        elif kind == "literal_error":
            text = f"{value!r} is not one of {detail['ctx']['expected']}"
        else:
            text = detail["msg"].removeprefix("Value error, ")
            text = f"{text[:1].lower()}{text[1:]}"
            if isinstance(value, str | int | float) and kind != "value_error":
                text += f" (found {value!r})"
        if (location, text) not in seen:
            seen.add((location, text))
            yield location, text


def _written_location(location: Location, data: Any) -> Location:
    """A pydantic location without the parts that name alternatives of its types and not keys of the document."""
    kept: list[str | int] = []
    for i, part in enumerate(location):
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
            kept.append(part)
        elif i == len(location) - 1 and isinstance(data, dict) and "[" not in str(part):
            kept.append(part)
    return tuple(kept)


def _unknown_key(location: Location) -> str:
    key = str(location[-1])
    if len(location) == 1 and key in WHOLE_KEYS:
        return f"{key} is for recipes that mergekit carries out as a whole: see read_whole_recipe and merge_whole"
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(key, known, 1, 0.5)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; known here: {', '.join(sorted(known))}"


def _known_keys(location: Location) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _model_in(fields[part].annotation) if part in fields else model
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def _parameter_problems(data: dict[str, Any]) -> Iterable[tuple[Location, str]]:
    """Parameters that no method of the recipe has, and values of another kind than theirs."""
    rules, entries = _mappings(data.get("rules")), _mappings(data.get("models"))
    named = [*(rule.get("merge_method") for rule in rules.values()), data.get("merge_method")]
    methods = [name for name in named if isinstance(name, str)]
    places: list[tuple[Location, Any, list[str]]] = [(("parameters",), data.get("parameters"), methods)]
    places += [(("models", i, "parameters"), entry.get("parameters"), methods) for i, entry in entries.items()]
    places += [
        (("rules", i, "parameters"), rule.get("parameters"), [str(rule.get("merge_method"))])
        for i, rule in rules.items()
    ]
    for location, parameters, users in places:
        if isinstance(parameters, dict) and all(user in METHODS or user == "wemoe" for user in users):
            for name, value in parameters.items():
                problem = _parameter_problem(location, str(name), value, users)
                if problem is not None:
                    yield (*location, name), problem


def _mappings(value: Any) -> dict[int, dict[str, Any]]:
    return {i: item for i, item in enumerate(value) if isinstance(item, dict)} if isinstance(value, list) else {}


def _parameter_problem(location: Location, name: str, value: Any, users: list[str]) -> str | None:
    in_rule = location[0] == "rules"
    if in_rule and users == ["wemoe"]:
        if name in ("router", "task_vectors"):
            return None
        if near := difflib.get_close_matches(name, ("router", "task_vectors"), 1, 0.5):
            return f"unknown key; did you mean {near[0]!r}?"
        cure = "; its λ is router.init_lambda" if name == "lambda" else ""
        return f"wemoe does not use {name} (it uses router, task_vectors{cure})"
    known = {key: spec for user in users if user in METHODS for key, spec in METHODS[user].parameters.items()}
    if "wemoe" in users:  # its λ and the weights of its experts are the recipe's
        known |= METHODS["task_arithmetic"].parameters
    if name in known:
        return _value_problem(known[name], value)
    if any(name in (*method.parameters, *method.idle) for method in METHODS.values()):
        # mergekit passes over what a method does not use, and so must a recipe of its; the plan says so
        return f"{users[0]} does not use {name} (it uses {', '.join(known) or 'none'})" if in_rule else None
    if name in ("router", "task_vectors"):
        return f"{name} is for rules with merge_method: wemoe"
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; {_listed(known)}"


def _listed(known: Iterable[str]) -> str:
    names = ", ".join(sorted(known))
    return f"known here: {names}" if names else "the method has none"


def _value_problem(parameter: Parameter, value: Any) -> str | None:
    try:
        setting: Setting = parse_setting(value)
    except ValueError:
        return None  # the schema says so
    anchors = [anchor for gradient in setting.values() for anchor in gradient.anchors]
    if parameter.kind == "flag":
        return None if all(isinstance(anchor, bool) for anchor in anchors) else "expected true or false"
    if any(isinstance(anchor, bool) for anchor in anchors):
        return "expected a number, not true or false"
    if parameter.kind == "integer" and not all(
        len(gradient.anchors) == 1 and float(gradient.anchors[0]).is_integer() for gradient in setting.values()
    ):
        return "expected a whole number"
    return None


def _inconsistencies(recipe: Recipe) -> Iterable[tuple[Location, str]]:
    """What single values cannot show."""
    methods = {recipe.merge_method, *(rule.merge_method for rule in recipe.rules)}
    needy = sorted(m for m in methods if m == "wemoe" or METHODS[m].base == "required")
    if recipe.base_model is None and needy:
        yield ("base_model",), f"is missing; {', '.join(needy)} {'need' if len(needy) > 1 else 'needs'} it"
    vectors = {i: rule.parameters.task_vectors for i, rule in enumerate(recipe.rules)}
    limits = {i: form.max_parameters for i, form in vectors.items() if form is not None and form.max_parameters}
    for i, limit in limits.items():
        if limit != (first := next(iter(limits.values()))):
            text = f"is one limit for the whole model; an earlier rule says {first:g}x"
            yield ("rules", i, "parameters", "task_vectors", "max_parameters"), text
    names: list[str] = []
    seen: set[str] = set()
    for i, entry in enumerate(recipe.models):
        names.append(entry.name)
        if entry.name in seen:
            yield ("models", i, "name"), f"two models are named {entry.name!r}; give one of them another name"
        seen.add(entry.name)
    for task_name, task in (recipe.tasks or {}).items():
        expert = task.expert or task_name
        if expert not in seen:
            near = difflib.get_close_matches(expert, names, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f" (models: {', '.join(names)})"
            key = ("expert",) if task.expert else ()
            yield ("tasks", task_name, *key), f"no model is named {expert!r}{hint}; set expert: NAME"
    if recipe.tuning is not None:
        if not recipe.tasks:
            yield ("tuning",), "there are no tasks to tune on; add tasks: with unlabeled data"
        for task_name, task in (recipe.tasks or {}).items():
            if task.tune is None:
                yield ("tasks", task_name), "tuning needs tune: the arguments of datasets.load_dataset"
        if "wemoe" not in methods:
            yield ("tuning",), "there are no routers to tune; add a rule with merge_method: wemoe"
