"""``wemoe_config.json``: what turns an ordinary checkpoint into a WEMoE model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.errors import CheckpointError

CONFIG_NAME = "wemoe_config.json"
ROUTERS_NAME = "routers.safetensors"
VERSION = 2

PARTS: Mapping[str, tuple[str, ...]] = {
    "dense": ("",),
    "low_rank": (".down", ".up"),
    "sparse": (".values", ".indices"),
}
"""What is stored for each form, as ends of the tensors' names."""

NORMS = ".norms"
"""End of the name under which a compressed form keeps ‖τₖ‖ and ‖τₖ − what is stored‖ (Frobenius), (experts, 2)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RouterConfig(_Strict):
    """A router's shape, and what it decides for; see `wemoe_plugin.modeling.router.Router`."""

    width: Annotated[int, Field(gt=0, lt=2**31)]
    depth: Literal[0, 1, 2]
    routing: Literal["sample", "token"] = "sample"


class LayerConfig(_Strict):
    """A Linear layer of a module and the form of its task vectors.

    Attributes:
        path: relative to the module; empty if the module is the layer.
        form: of the weight's task vectors.
        ranks: of the low-rank form, one per expert.
        count: of the sparse form, entries per expert.
        bias: whether the bias has task vectors too (always dense).
    """

    path: str
    form: Literal["dense", "low_rank", "sparse"]
    ranks: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = None
    count: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    bias: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """What the names of the weight's task vectors end with, one per stored tensor."""
        return PARTS[self.form]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.ranks is not None) != (self.form == "low_rank") or (self.count is not None) != (self.form == "sparse"):
            raise ValueError(f"the layer {self.path}: ranks belong to low_rank, count to sparse")
        return self


class ModuleConfig(_Strict):
    """An upscaled module: its path, the name of its router, λₖ per expert, its layers.

    Paths are those of the checkpoint's files; libraries may name the module otherwise.

    Attributes:
        argument: which of the module's positional arguments the router reads.
    """

    path: str
    router: str
    lambdas: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    layers: Annotated[tuple[LayerConfig, ...], Field(min_length=1)]
    argument: Annotated[int, Field(ge=0, le=1)] = 0


class WemoeConfig(_Strict):
    """The whole file.

    Attributes:
        library: which one builds the model, ``open_clip`` or ``transformers``.
        experts: their names, in the order of the routers' outputs and of every task vector's first axis.
        vector_files: the safetensors files with the task vectors.
    """

    version: int = VERSION
    library: Literal["open_clip", "transformers"]
    experts: tuple[str, ...]
    modules: tuple[ModuleConfig, ...]
    routers: dict[str, RouterConfig]
    vector_files: tuple[str, ...]

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, data: Any) -> Any:
        version = data.get("version", VERSION) if isinstance(data, dict) else VERSION
        if version != VERSION:
            raise ValueError(f"version {version}; this package reads version {VERSION}: merge the recipe again")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for module in self.modules:
            if module.router not in self.routers:
                raise ValueError(f"the module {module.path} names an unknown router {module.router!r}")
            if len(module.lambdas) != len(self.experts):
                raise ValueError(
                    f"the module {module.path} has {len(module.lambdas)} λ for {len(self.experts)} experts"
                )
            for layer in module.layers:
                where, experts = f"{module.path}.{layer.path}".rstrip("."), len(self.experts)
                if layer.ranks is not None and len(layer.ranks) != experts:
                    raise ValueError(f"{where} has {len(layer.ranks)} ranks for {experts} experts")
                if self.routers[module.router].routing == "token" and layer.form != "low_rank":
                    raise ValueError(f"{where}: token routing needs low-rank task vectors")
        for expert in self.experts:
            if not re.fullmatch(r"[\w.-]{1,200}", expert) or not expert.strip("."):
                raise ValueError(f"{expert!r:.100} cannot be the name of an expert")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("two experts have one name")
        if any(Path(name).name != name for name in self.vector_files):
            raise ValueError("a file of task vectors lies outside of the directory")
        return self


def read_config(directory: Path) -> WemoeConfig:
    """Read a directory's ``wemoe_config.json``.

    Raises:
        CheckpointError: it is not there, of an unknown version, or not consistent.
    """
    path = file_in(directory, CONFIG_NAME)
    if path is None:
        raise CheckpointError(f"{directory}: not an output of wemoe-merge with routers: {CONFIG_NAME} is absent")
    try:
        config = WemoeConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {place + ': ' if place else ''}{first['msg']}") from None
    return config
