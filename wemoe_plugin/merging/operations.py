"""The operations a plan consists of, as frozen values. Each makes one tensor of the ordinary checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from wemoe_plugin.checkpoints.header import ITEM_BYTES
from wemoe_plugin.checkpoints.sources import Source
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


@dataclass(frozen=True)
class Combine:
    """A static merge by ranges of elements."""

    output: OutputTensor
    mixture: Mixture
    whole: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[Source, ...]:
        return _sources(self.mixture)


@dataclass(frozen=True)
class Upscale:
    """A static merge whose task vectors are kept as well.

    Attributes:
        vectors: for the dense form one tensor (experts, *shape); for the low-rank form A (experts, rank, in) and
            B (experts, out, rank).
        rank: None for the dense form.
    """

    output: OutputTensor
    mixture: Mixture
    vectors: tuple[OutputTensor, ...]
    rank: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the tensor must be held whole, for its decomposition; all else works on any range of elements."""
        return self.rank is not None

    @property
    def sources(self) -> tuple[Source, ...]:
        return _sources(self.mixture)


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


Operation = Copy | Combine | Upscale | Delegate


def _sources(mixture: Mixture) -> tuple[Source, ...]:
    return mixture.inputs if mixture.base is None else (mixture.base, *mixture.inputs)
