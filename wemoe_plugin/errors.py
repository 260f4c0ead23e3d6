"""What can go wrong because of the input, as one tree.

    WemoeError
      ├─ RecipeError        the recipe or the tasks file: syntax, unknown keys, values, rules
      ├─ CheckpointError    a model on disk: missing, truncated, garbage, not finite
      ├─ PlanError          models that do not fit together or not the recipe; an output in the way
      └─ TuningError        tasks, data and heads; tuning itself

The command prints the message of any of these without a traceback and exits with status 2.
"""

from __future__ import annotations


class WemoeError(Exception):
    """The input is wrong; the message says what, where, and what would mend it."""


class RecipeError(WemoeError):
    """The recipe cannot be read; the message has one line per problem."""


class CheckpointError(WemoeError):
    """A checkpoint on disk cannot be used."""


class PlanError(WemoeError):
    """The models do not fit together, or do not fit the recipe or the output."""


class TuningError(WemoeError):
    """The tasks, their data or their heads cannot be used."""
