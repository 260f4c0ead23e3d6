"""The plan: every output tensor and how it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wemoe_plugin.checkpoints.ranges import FileStamp
from wemoe_plugin.merging.inputs import Model
from wemoe_plugin.merging.layout import OutputFile
from wemoe_plugin.merging.operations import Operation
from wemoe_plugin.merging.tied import Twins
from wemoe_plugin.merging.upscaling import UpscaledModule


@dataclass(frozen=True)
class Claim:
    """What one rule (or the default) takes: for the plan's table."""

    label: str
    method: str
    tensors: int
    parameters: int
    modules: int


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do.

    Attributes:
        base: θ₀; for a recipe without base_model, the first model, which then only lends its configuration.
        experts: the models whose task vectors are taken, in the recipe's order.
        dtype: of the arithmetic on ranges, a safetensors name; never less than float32.
        operations: one per tensor of the ordinary checkpoint; after those whose task vectors are compressed, one per
            expert for that.
        static_files: the ordinary checkpoint.
        vector_files: the task vectors of the upscaled modules; empty if no rule upscales.
        modules: the upscaled modules.
        claims: what each rule and the default took.
        base_only: tensors that no expert has and that are copied from the base.
        notes: what a reader of the recipe might not expect.
        twins: tensors that must be equal to each other; compared before anything is merged.
        stamps: every file that is read, as it was when the plan was made.
        seed: of the methods that draw numbers, and of the routers.
        shard_bytes: the largest file to write.
        open_ranks: what will decide about ranks once `wemoe_plugin.merging.survey.settle` sees the singular values:
            ``energy``, whose ranks are upper bounds until then, and ``max_parameters``, whose ranks are an even share.
    """

    base: Model
    experts: tuple[Model, ...]
    dtype: str
    operations: tuple[Operation, ...]
    static_files: tuple[OutputFile, ...]
    vector_files: tuple[OutputFile, ...]
    modules: tuple[UpscaledModule, ...]
    claims: tuple[Claim, ...]
    base_only: tuple[str, ...]
    notes: tuple[str, ...]
    twins: tuple[Twins, ...]
    stamps: Mapping[Path, FileStamp]
    seed: int
    shard_bytes: int | None
    open_ranks: tuple[str, ...]

    @property
    def settled(self) -> bool:
        """Whether all ranks are known."""
        return not self.open_ranks

    @property
    def library(self) -> str:
        return self.base.checkpoint.library or "transformers"

    @property
    def files(self) -> tuple[OutputFile, ...]:
        return self.static_files + self.vector_files

    @property
    def bytes_read(self) -> int:
        return sum(source.nbytes for operation in self.operations for source in operation.sources)

    @property
    def bytes_written(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def base_parameters(self) -> int:
        return sum(tensor.elements for tensor in self.base.checkpoint.tensors.values())

    @property
    def vector_parameters(self) -> int:
        return sum(
            tensor.elements for file in self.vector_files for tensor in file.tensors if is_parameter(tensor.name)
        )

    @property
    def router_parameters(self) -> int:
        return sum(router.parameters for router in {m.router.name: m.router for m in self.modules}.values())


def is_parameter(vector_name: str) -> bool:
    """Whether what is stored for task vectors takes part in the arithmetic: positions and norms do not."""
    return not vector_name.endswith((".indices", ".norms"))
