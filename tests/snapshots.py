"""What a folder holds, to see that nothing has changed."""

from __future__ import annotations

from pathlib import Path


def tree(directory: Path) -> dict[str, bytes]:
    """Every file and folder below a directory, with the files' content."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in sorted(directory.rglob("*"))}
