"""What tuning and scoring share: the recipe's models, its data, and the base's way of reading both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn

from wemoe_plugin.checkpoints.companions import find_companions
from wemoe_plugin.checkpoints.reference import open_reference
from wemoe_plugin.checkpoints.tensors import read_tensors
from wemoe_plugin.devices import check_device
from wemoe_plugin.errors import CheckpointError, TuningError
from wemoe_plugin.merging.alignment import align
from wemoe_plugin.modeling.families import FAMILIES, ModelFamily
from wemoe_plugin.modeling.loading import load_static
from wemoe_plugin.recipe.loading import RecipeFile
from wemoe_plugin.recipe.schema import TaskSpec
from wemoe_plugin.tasks.head import ZeroShotHead, check_labels, choose_class_names, zero_shot_head
from wemoe_plugin.tasks.images import ImageSet, load_images


class Workbench:
    """Data, heads and plain models of a recipe, each loaded when it is first needed.

    Args:
        source: a recipe with tasks.
        device: where models run.

    Raises:
        TuningError: the recipe has no tasks, or the device is not there.
        CheckpointError: its base is not there.
    """

    def __init__(self, source: RecipeFile, device: str = "cpu") -> None:
        check_device(device)
        if not source.recipe.tasks:
            raise TuningError(
                f"{source.path}: has no tasks; add tasks: to a recipe of CLIP models, or train routers of others in "
                "a loop of your own (load_model, freeze_all_but_routers, save_routers)"
            )
        self.source = source
        self.device = device
        self.tasks: dict[str, TaskSpec] = source.recipe.tasks
        base = open_reference(source.recipe.base_model or source.recipe.models[0].model, source.resolve)
        if base.library is not None:
            find_companions(base.path)
        self.base_path = base.path
        self.family: ModelFamily = FAMILIES[base.library or "transformers"]
        self._base = base
        self._references = {entry.name: entry.model for entry in source.recipe.models}
        self._heads: dict[str, ZeroShotHead] = {}
        self._sets: dict[tuple[str, str], ImageSet] = {}

    @property
    def scored_tasks(self) -> tuple[str, ...]:
        """The tasks that have labeled data."""
        return tuple(name for name, task in self.tasks.items() if task.score is not None)

    def check(self, *, tuning: bool, scoring: bool) -> None:
        """Open the data, look at columns, class names and labels, decode an image, and build the heads.

        Raises:
            TuningError: whatever is wrong with it.
            CheckpointError: the base cannot read text or images.
        """
        for name in self.tasks:
            if tuning:
                images = self.tuning_images(name)
                if len(images) < 2:
                    raise TuningError(f"{images.where}: tuning needs at least two rows, it has {len(images)}")
                images.pixels([0])
            if scoring and name in self.scored_tasks:
                self.labels(name)
                self.scoring_images(name).pixels([0])
            self.head(name)

    def tuning_images(self, task: str) -> ImageSet:
        """The task's unlabeled images."""
        return self._images(task, "tune")

    def scoring_images(self, task: str) -> ImageSet:
        """The task's labeled images."""
        return self._images(task, "score")

    def labels(self, task: str) -> Tensor:
        """The labels of `scoring_images`, int64 (rows,), each with a class name.

        Raises:
            TuningError: a label lies outside of the class names.
        """
        labels = self.scoring_images(task).labels()
        check_labels(labels, self.class_names(task), f"tasks.{task}.score")
        return labels

    def class_names(self, task: str) -> tuple[str, ...]:
        """The task's class names in label order."""
        spec = self.tasks[task]
        stored = self.scoring_images(task).label_names if spec.score is not None else None
        return choose_class_names(spec.head.class_names, stored, f"tasks.{task}")

    def head(self, task: str) -> ZeroShotHead:
        """The task's zero-shot head, by the base's text tower."""
        if task not in self._heads:
            self._heads[task] = self._build_head(task)
        return self._heads[task]

    def _build_head(self, task: str) -> ZeroShotHead:

        def encode(texts: Sequence[str]) -> Tensor:
            return self.family.encode_text(self.base, self._tokenize(texts).to(self.device))

        if not hasattr(self.base, "logit_scale"):
            raise CheckpointError(
                f"{self.base_path}: tasks need a text tower for their class names; a {type(self.base).__name__} has "
                "none: name the whole CLIP model as base_model, or leave out tasks and tuning"
            )
        scale = float(self.family.logit_scale(self.base).detach())
        return zero_shot_head(encode, self.class_names(task), self.tasks[task].head.templates, scale)

    @cached_property
    def base(self) -> nn.Module:
        """The base model."""
        return load_static(self.base_path, self.device)

    def expert_name(self, task: str) -> str:
        """The model that was fine-tuned on a task."""
        return self.tasks[task].expert or task

    def expert(self, name: str) -> nn.Module:
        """The base model with an expert's tensors; what a partial expert lacks is the base's."""
        checkpoint = align(open_reference(self._references[name], self.source.resolve), self._base)
        try:
            return self.family.build(self.base_path, torch.float32, read_tensors(checkpoint)).to(self.device)
        except CheckpointError as error:
            raise CheckpointError(f"the expert {name} ({self._references[name]}): {error}") from error

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Image features (batch, embed) of a model."""
        return self.family.encode_image(model, pixels.to(self.device))

    @cached_property
    def _tokenize(self) -> Callable[[Sequence[str]], Tensor]:
        return self.family.tokenizer(self.base_path)

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        return self.family.image_transform(self.base_path)

    def _images(self, task: str, purpose: str) -> ImageSet:
        if (task, purpose) not in self._sets:
            spec, where = self.tasks[task], f"tasks.{task}.{purpose}"
            arguments = spec.tune if purpose == "tune" else spec.score
            if arguments is None:
                raise TuningError(f"{where}: is missing; it holds the arguments of datasets.load_dataset")
            self._sets[task, purpose] = load_images(
                arguments,
                self.source.resolve,
                self._transform,
                input_column=spec.input,
                label_column=spec.label if purpose == "score" else None,
                limit=spec.limit,
                where=where,
            )
        return self._sets[task, purpose]
