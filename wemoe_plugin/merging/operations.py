"""The operations a plan consists of, as frozen values.

All kinds but one make one tensor of the ordinary checkpoint; `Compress` makes one expert's part of the task vectors of
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from wemoe_plugin.checkpoints.header import ITEM_BYTES
from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source, is_change_of
from wemoe_plugin.recipe.settings import Scalar


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that will be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Mixture:
    """θ = θ₀ + λ (Σₖ wₖ (θₖ − θ₀)) / divisor, or without a base θ = λ (Σₖ wₖ θₖ) / divisor.

    Attributes:
        base: θ₀, or None for a plain weighted sum.
        inputs: θₖ, one per weight.
        weights: wₖ.
        divisor: Σₖ wₖ where the method normalizes, else 1.
        scale: λ.
    """

    base: Source | None
    inputs: tuple[Source, ...]
    weights: tuple[float, ...]
    divisor: float = 1.0
    scale: float = 1.0

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.inputs if self.base is None else (self.base, *self.inputs)


@dataclass(frozen=True)
class Copy:
    """The source as it is, rounded to the output's dtype; ``agreeing`` must hold the same values."""

    output: OutputTensor
    source: Source
    agreeing: tuple[Source, ...] = ()
    whole: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source, *self.agreeing)

    @property
    def written(self) -> tuple[OutputTensor, ...]:
        return (self.output,)


@dataclass(frozen=True)
class Combine:
    """A static merge by ranges of elements."""

    output: OutputTensor
    mixture: Mixture
    whole: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.mixture.sources

    @property
    def written(self) -> tuple[OutputTensor, ...]:
        return (self.output,)


@dataclass(frozen=True)
class Upscale:
    """A static merge whose task vectors are kept whole.

    Attributes:
        vectors: the tensor they are kept in, (experts, *shape).
    """

    output: OutputTensor
    mixture: Mixture
    vectors: OutputTensor
    whole: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.mixture.sources

    @property
    def written(self) -> tuple[OutputTensor, ...]:
        return (self.output, self.vectors)


@dataclass(frozen=True)
class Compress:
    """One expert's task vector of one weight, compressed.

    The factors of a LoRA expert whose change is the whole task vector are taken as they are, or cut to the rank without
    ever building the change.

    Attributes:
        output: the weight whose task vector it is; not written.
        base: θ₀.
        expert: θₖ.
        form: ``low_rank`` or ``sparse``.
        size: its rank, or how many entries are kept.
        parts: what is written: the two factors, or values and indices, of all experts.
        starts: the element of each part at which this expert's begins.
        norms: (experts, 2), ‖τₖ‖ and the norm of what is dropped.
        place: k, the expert's place.
    """

    output: OutputTensor
    base: Source
    expert: Source
    form: Literal["low_rank", "sparse"]
    size: int
    parts: tuple[OutputTensor, OutputTensor]
    starts: tuple[int, int]
    norms: OutputTensor
    place: int
    whole: ClassVar[bool] = True

    @property
    def factors(self) -> AdaptedTensor | None:
        """The expert, where its adapter's change is the task vector and the form can keep it."""
        own = isinstance(self.expert, AdaptedTensor) and is_change_of(self.expert, self.base)
        return self.expert if own and self.form == "low_rank" else None  # type: ignore[return-value]

    @property
    def sources(self) -> tuple[Source, ...]:
        if (expert := self.factors) is not None:
            return (expert.down, expert.up)
        return (self.base, self.expert)

    @property
    def written(self) -> tuple[OutputTensor, ...]:
        return (*self.parts, self.norms)


@dataclass(frozen=True)
class Delegate:
    """A tensor made by one of mergekit's methods, which sees it whole.

    Attributes:
        method: its name in mergekit's registry.
        dtype: of the arithmetic, a safetensors name.
        inputs: the models' tensors, in the recipe's order; the base comes last if the recipe does not list it.
        base: which of the inputs is the base's, or None.
        shared: the method's parameters that all inputs share.
        per_input: for every input its own parameters.
        seed: of the numbers the method draws; None if it draws none.
    """

    output: OutputTensor
    method: str
    dtype: str
    inputs: tuple[Source, ...]
    base: int | None
    shared: Mapping[str, Scalar]
    per_input: tuple[Mapping[str, Scalar | None], ...]
    seed: int | None = None
    whole: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.inputs

    @property
    def written(self) -> tuple[OutputTensor, ...]:
        return (self.output,)


Operation = Copy | Combine | Upscale | Compress | Delegate
