"""What a recipe may say: strict, frozen values. Unknown keys are errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from wemoe_plugin.recipe.methods import METHODS
from wemoe_plugin.recipe.patterns import KEYWORDS, Pattern, glob_expression
from wemoe_plugin.recipe.settings import Setting, parse_setting


def _parse_pattern(value: Any) -> Pattern:
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, list) or not globs or not all(isinstance(g, str) and g for g in globs):
        raise ValueError(f"expected one of the keywords {', '.join(KEYWORDS)}, a glob, or a list of globs")
    for glob in globs:
        if glob not in KEYWORDS:
            glob_expression(glob)
    return Pattern(tuple(globs))


def _static_method(name: str) -> str:
    if name in METHODS:
        return name
    if name == "wemoe":
        raise ValueError("wemoe upscales parts of the network: name them in rules, each with merge_method: wemoe")
    near = difflib.get_close_matches(name, METHODS, 1, 0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown merge method {name!r}{hint} (known: {', '.join(METHODS)}, and wemoe in rules)")


def _rule_method(name: str) -> str:
    return name if name == "wemoe" else _static_method(name)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def _multiple(value: Any) -> float:
    """Read ``1.3x``."""
    text = value if isinstance(value, str) else ""
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?x", text) or float(text[:-1]) <= 1:
        raise ValueError("expected a multiple of the base's parameters above 1, such as 1.3x")
    return float(text[:-1])


Positive = Annotated[int, Field(ge=1, strict=True), BeforeValidator(_number)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True), BeforeValidator(_number)]
ParameterSetting = Annotated[Setting, BeforeValidator(parse_setting)]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class Strict(BaseModel):
    """A frozen value that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, populate_by_name=False)


class RouterSpec(Strict):
    """The routers of a rule's modules (WEMoE, arXiv 2402.00433, section 3.3).

    Attributes:
        depth: 2, Linear-ReLU-Linear; 1, one Linear; 0, a constant vector (layer-wise AdaMerging).
        init_lambda: the weight of every task vector before tuning; default the recipe's ``lambda``.
        shared: one router for all modules of the rule (E-WEMoE, arXiv 2410.21804).
        routing: what has weights of its own: each ``sample``, or each ``token``, with low-rank task vectors only.
    """

    depth: Annotated[Literal[0, 1, 2], BeforeValidator(_number)] = 2
    init_lambda: Number | None = None
    shared: Annotated[bool, Field(strict=True)] = False
    routing: Literal["sample", "token"] = "sample"


class TaskVectorSpec(Strict):
    """How a rule's task vectors are stored.

    Attributes:
        form: ``dense``; ``low_rank``, by truncated singular value decomposition or as LoRA experts' own factors;
            ``sparse``, the largest entries by magnitude (E-WEMoE, arXiv 2410.21804).
        rank: for ``low_rank``: singular values kept per tensor and expert, at most.
        energy: for ``low_rank`` instead: as many as keep this share of the sum of their squares, per tensor and expert.
        max_parameters: for ``low_rank`` instead: the whole model has at most this many times the base's parameters;
            ranks go where singular values are largest.
        density: for ``sparse``: the share of entries that is kept, per tensor and expert.
    """

    form: Literal["dense", "low_rank", "sparse"] = "dense"
    rank: Positive | None = None
    energy: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_parameters: Annotated[float, BeforeValidator(_multiple)] | None = None
    density: Annotated[Number, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _sizes_belong_to_their_form(self) -> Self:
        ranks = [name for name in ("rank", "energy", "max_parameters") if getattr(self, name) is not None]
        if self.form == "low_rank" and len(ranks) != 1:
            given = f"; it has {' and '.join(ranks)}" if ranks else ""
            raise ValueError(f"form low_rank needs one of rank: 16, energy: 0.95 and max_parameters: 1.3x{given}")
        if self.form != "low_rank" and ranks:
            raise ValueError(f"{ranks[0]} is for form: low_rank")
        if (self.form == "sparse") != (self.density is not None):
            missing = self.form == "sparse"
            raise ValueError("form sparse needs a density, such as 0.1" if missing else "density is for form: sparse")
        return self

    @property
    def open_rank(self) -> Literal["energy", "max_parameters"] | None:
        """What decides about ranks by singular values, if something does."""
        return "energy" if self.energy is not None else "max_parameters" if self.max_parameters is not None else None


class RuleParameters(BaseModel):
    """Parameters of one rule: a static method's by name (in ``settings``), or for ``wemoe`` these two."""

    model_config = ConfigDict(extra="allow", frozen=True, arbitrary_types_allowed=True)
    __pydantic_extra__: dict[str, ParameterSetting] = Field(init=False)

    router: RouterSpec | None = None
    task_vectors: TaskVectorSpec | None = None

    @model_validator(mode="after")
    def _tokens_need_low_rank(self) -> Self:
        form = self.task_vectors.form if self.task_vectors is not None else "dense"
        if self.router is not None and self.router.routing == "token" and form != "low_rank":
            raise ValueError(f"routing: token needs form: low_rank; {form} ones are composed for a whole sample")
        return self

    @property
    def settings(self) -> Mapping[str, Setting]:
        return self.__pydantic_extra__


class Rule(Strict):
    """How one part of the network is merged. The first rule that matches a tensor wins."""

    match: Annotated[Pattern, BeforeValidator(_parse_pattern)]
    merge_method: Annotated[str, AfterValidator(_rule_method)]
    parameters: RuleParameters = RuleParameters()


class ModelEntry(Strict):
    """One model to merge.

    Attributes:
        model: a directory, a file, a hub id, ``model@revision`` or ``model+adapter``; relative paths start at the
            recipe, then at the current folder.
        name: names routing columns and reports; default the last part of the path.
        parameters: of the method, for this model: ``weight`` is its factor in the merge.
    """

    model: Annotated[str, Field(min_length=1)]
    name: str = ""
    parameters: dict[str, ParameterSetting] = {}

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("model"), str) and "name" not in data:
            last = re.split(r"[/\\+]", data["model"].rstrip("/\\"))[-1].partition("@")[0]
            last = re.sub(r"\.(safetensors|bin|pt|pth|ckpt)$", "", last)
            data = {**data, "name": re.sub(r"[^\w.-]", "-", last) or "model"}
        return data

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
            raise ValueError("a name has letters, digits, '_', '-' and '.' only, and not dots alone")
        return name


class HeadSpec(Strict):
    """A zero-shot head: class names and prompt templates, read by the base model's own text tower.

    Attributes:
        class_names: the text of each class, in label order; default the data set's own label names.
        templates: prompts with one ``{}`` each; the class vector is the mean over them.
    """

    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @field_validator("templates")
    @classmethod
    def _one_place_for_the_name(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if not templates:
            raise ValueError("a head needs at least one template")
        for template in templates:
            if template.count("{}") != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
                raise ValueError(f"the template {template!r} needs exactly one {{}} for the class name")
        return templates

    @field_validator("class_names")
    @classmethod
    def _at_least_two(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(names) < 2:
            raise ValueError("a task needs at least two classes")
        return names


class TaskSpec(Strict):
    """A task: data and a head.

    Attributes:
        tune: arguments of ``datasets.load_dataset`` for the unlabeled data of tuning.
        score: arguments of ``datasets.load_dataset`` for the labeled data of scoring.
        expert: the model that was fine-tuned on it; default the model with the task's name.
        input: the column with the images.
        label: the column with the labels; only scoring reads it.
        limit: use at most this many rows of each, the first ones.
    """

    tune: dict[str, Any] | None = None
    score: dict[str, Any] | None = None
    expert: str | None = None
    input: str = "image"
    label: str = "label"
    limit: Positive | None = None
    head: HeadSpec = HeadSpec()

    @field_validator("tune", "score")
    @classmethod
    def _has_a_path(cls, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        if arguments is not None and not isinstance(arguments.get("path"), str):
            raise ValueError("these are the arguments of datasets.load_dataset; 'path' is missing")
        return arguments


class TuningSpec(Strict):
    """How the routers are tuned on unlabeled data.

    Attributes:
        objective: ``distill``, KL to the predictions of each task's own expert; ``entropy``, the paper's
            test-time adaptation; ``infomax``, entropy less the entropy of the mean prediction.
        steps: optimizer steps; each takes one batch of every task.
        learning_rate: Adam's, at the start of its cosine schedule.
        batch_size: images per task and step.
        hold_out: images per task that are kept from training and decide which routers are kept.
        check_every: steps between two looks at the held-out images.
        seed: draws the routers' initial weights and the order of the data.
    """

    objective: Literal["distill", "entropy", "infomax"] = "distill"
    steps: Positive = 300
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-3
    batch_size: Positive = 16
    hold_out: Positive = 64
    check_every: Positive = 25
    seed: Annotated[int, Field(ge=0, strict=True), BeforeValidator(_number)] = 0


class Recipe(Strict):
    """A mergekit recipe with three additions: rules, tasks and tuning.

    Attributes:
        merge_method: for whatever no rule claims.
        parameters: of every method that has them and is not told otherwise by a model or a rule.
        dtype: of the arithmetic, though ranges are never merged in less than float32; default float32, whatever the
            inputs are stored in.
        out_dtype: of the written tensors; default ``dtype`` if given, else as the base (or first model) stores them.
    """

    merge_method: Annotated[str, AfterValidator(_static_method)]
    models: tuple[ModelEntry, ...]
    base_model: Annotated[str, Field(min_length=1)] | None = None
    parameters: dict[str, ParameterSetting] = {}
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    rules: tuple[Rule, ...] = ()
    tasks: dict[str, TaskSpec] | None = None
    tuning: TuningSpec | None = None

    @field_validator("models")
    @classmethod
    def _at_least_one(cls, models: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
        if not models:
            raise ValueError("a merge needs at least one model")
        return models
