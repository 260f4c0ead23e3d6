"""A parameter's value as mergekit writes it: a plain value, a gradient over depth, or values by tensor name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = float | bool

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Gradient:
    """A value, or several over the depth of the network: numbers are interpolated linearly, flags are chosen."""

    anchors: tuple[Scalar, ...]

    def at(self, depth: float) -> Scalar:
        """The value at a relative depth in [0, 1]."""
        scaled = min(max(depth, 0.0), 1.0) * (len(self.anchors) - 1)
        low = int(scaled)
        if any(isinstance(anchor, bool) for anchor in self.anchors):
            return self.anchors[low]
        high = min(low + 1, len(self.anchors) - 1)
        share = scaled - low
        return (1 - share) * self.anchors[low] + share * self.anchors[high] if share else self.anchors[low]


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains ``filter`` (all of them if None or ``*``)."""

    filter: str | None
    value: Gradient

    def holds(self, tensor_name: str) -> bool:
        return self.filter in (None, "*") or str(self.filter) in tensor_name


@dataclass(frozen=True)
class Setting:
    """A parameter, evaluated per tensor as mergekit's ``evaluate_setting`` does: the first condition wins."""

    conditions: tuple[Condition, ...]

    def evaluate(self, tensor_name: str, depth: float) -> Scalar | None:
        """The value for one tensor at a relative depth in [0, 1]; None where no condition holds."""
        for condition in self.conditions:
            if condition.holds(tensor_name):
                return condition.value.at(depth)
        return None

    def values(self) -> Iterator[Gradient]:
        """Every value it may take."""
        return (condition.value for condition in self.conditions)


def parse_setting(value: Any) -> Setting:
    """Read what the recipe says.

    Raises:
        ValueError: it is none of the three forms.
    """
    if isinstance(value, Setting):
        return value
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, dict) for v in value):
        return Setting(tuple(_condition(item) for item in value))
    return Setting((Condition(None, _gradient(value)),))


def _condition(item: Any) -> Condition:
    if not isinstance(item, dict) or not set(item) <= {"filter", "value"} or "value" not in item:
        raise ValueError("a condition has the keys 'value' and, if it is not for all tensors, 'filter'")
    name = item.get("filter")
    if name is not None and not isinstance(name, str):
        raise ValueError("'filter' is a part of a tensor name")
    return Condition(name, _gradient(item["value"]))


def _gradient(value: Any) -> Gradient:
    values = value if isinstance(value, list) else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not values or not (len(numbers) == len(values) or all(isinstance(v, bool) for v in values)):
        raise ValueError(
            "expected a number or true or false, a list of them (a gradient over depth), or a list of {filter, value}"
        )
    if not all(-_LARGEST < v < _LARGEST for v in numbers):
        raise ValueError("expected finite numbers")
    return Gradient(tuple(v if isinstance(v, bool) else float(v) for v in values))
