"""Where the local paths of a recipe lead."""

from __future__ import annotations

import os
from pathlib import Path


def resolve_path(reference: str, directory: Path, fallback: Path) -> Path:
    """A path that a recipe names: from the recipe's folder, or from the fallback if there is something only there."""
    try:
        path = Path(reference).expanduser()
    except RuntimeError:  # the home of a user there is not
        path = Path(reference)
    beside, here = directory / path, fallback / path
    return here if not os.path.lexists(beside) and os.path.lexists(here) else beside
