"""Images of a task, read through ``datasets`` and decoded when they are needed."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wemoe_plugin.errors import TuningError

CACHE_BYTES = 64 * 2**20
"""Decoded images of one data set that are kept, so that small ones are decoded once."""

Transform = Callable[[Image.Image], Tensor]


class ImageSet:
    """Rows of a data set as model inputs.

    Args:
        dataset: a ``datasets.Dataset``.
        input_column: its column of images.
        label_column: its column of integer labels; None where labels must not be looked at.
        transform: from a picture to (channels, height, width).
        where: names the data in messages.
    """

    def __init__(
        self, dataset: Any, input_column: str, label_column: str | None, transform: Transform, where: str
    ) -> None:
        for column in (input_column, label_column):
            if column is not None and column not in dataset.column_names:
                raise TuningError(f"{where}: has no column {column!r}; it has {', '.join(dataset.column_names)}")
        if len(dataset) == 0:
            raise TuningError(f"{where}: has no rows")
        feature = dataset.features.get(label_column) if label_column else None
        self.label_names: list[str] | None = getattr(feature, "names", None)
        self.where = where
        self._pictures = dataset.select_columns([input_column])
        self._labels = dataset.select_columns([label_column]) if label_column else None
        self._input_column, self._label_column = input_column, label_column
        self._transform = transform
        self._cache: dict[int, Tensor] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self._pictures)

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Inputs of some rows, (rows, channels, height, width)."""
        return torch.stack([self._one(row) for row in rows])

    def labels(self) -> Tensor:
        """The labels of all rows, int64 (rows,)."""
        if self._labels is None:
            raise TuningError(f"{self.where}: was opened without labels")
        values = self._labels[self._label_column]
        if any(type(value) is not int for value in values):
            raise TuningError(f"{self.where}: the column {self._label_column!r} does not hold integer labels")
        return torch.tensor(list(values), dtype=torch.int64)

    def _one(self, row: int) -> Tensor:
        if row in self._cache:
            return self._cache[row]
        try:
            picture = self._pictures[row][self._input_column]
        except OSError as error:
            raise TuningError(f"{self.where}: row {row} cannot be decoded: {error}") from None
        if not isinstance(picture, Image.Image):
            kind = type(picture).__name__
            raise TuningError(f"{self.where}: the column {self._input_column!r} holds {kind}, not images")
        pixels = self._transform(picture.convert("RGB"))
        if self._room >= (size := pixels.numel() * pixels.element_size()):
            self._cache[row] = pixels
            self._room -= size
        return pixels


def load_images(
    arguments: Mapping[str, Any],
    resolve: Callable[[str], Path],
    transform: Transform,
    *,
    input_column: str,
    label_column: str | None,
    limit: int | None,
    where: str,
) -> ImageSet:
    """Load a data set.

    Args:
        arguments: of ``datasets.load_dataset``; a ``path`` that ``Dataset.save_to_disk`` wrote is read as such.
        resolve: from a path as the recipe names it to where it lies.
        transform: from a picture to (channels, height, width).
        input_column: the column with the images.
        label_column: the column with the labels; None where labels must not be looked at.
        limit: keep the first rows only.
        where: names the data in messages, such as ``tasks.digits.tune``.

    Raises:
        TuningError: the data cannot be loaded, or has no such columns.
    """
    import datasets

    kept = {key: value for key, value in arguments.items() if key != "path"}
    path = resolve(arguments["path"])
    for key in ("data_dir", "data_files"):
        if key in kept:
            kept[key] = _local(kept[key], resolve)
    _check_local_files(kept, where)
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = _saved(datasets.load_from_disk(str(path)), kept, where)
        else:
            loaded = datasets.load_dataset(str(path) if path.exists() else arguments["path"], **kept)
    except TuningError:
        raise
    except Exception as error:  # datasets raises anything, from KeyError to its own builder errors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TuningError(f"{where}: datasets cannot load it: {first}") from error
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise TuningError(f"{where}: has the splits {', '.join(map(str, loaded))}; name one with split:")
        loaded = next(iter(loaded.values()))
    if not isinstance(loaded, datasets.Dataset):
        kind = type(loaded).__name__
        raise TuningError(f"{where}: gives a {kind}, not one data set (no streaming, no lists of splits)")
    if limit is not None:
        loaded = loaded.select(range(min(limit, len(loaded))))
    return ImageSet(loaded, input_column, label_column, transform, where)


def _local(value: Any, resolve: Callable[[str], Path]) -> Any:
    if isinstance(value, str):
        return value if "://" in value else _local_pattern(value, resolve)
    if isinstance(value, list):
        return [_local(item, resolve) for item in value]
    if isinstance(value, dict):
        return {key: _local(item, resolve) for key, item in value.items()}
    return value


def _local_pattern(pattern: str, resolve: Callable[[str], Path]) -> str:
    """A pattern from where its part before the first wildcard lies."""
    parts = Path(pattern).parts
    plain = next((i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return str(resolve(str(Path(*parts[:plain]))).joinpath(*parts[plain:]))


def _saved(loaded: Any, arguments: Mapping[str, Any], where: str) -> Any:
    """A data set that was saved to disk: at most its split can be chosen."""
    others = sorted(set(arguments) - {"split"})
    if others:
        raise TuningError(f"{where}: a saved data set takes no {others[0]}")
    split = arguments.get("split")
    if split is None:
        return loaded
    if not isinstance(loaded, dict) or split not in loaded:
        has = f"the splits {', '.join(map(str, loaded))}" if isinstance(loaded, dict) else "no splits"
        raise TuningError(f"{where}: the saved data set has {has}; it has no {split!r}")
    return loaded[split]


def _check_local_files(arguments: Mapping[str, Any], where: str) -> None:
    """Say plainly what is not there; the library's own words for it are about its insides."""
    folder = arguments.get("data_dir")
    if isinstance(folder, str) and "://" not in folder and not Path(folder).is_dir():
        raise TuningError(f"{where}: no such directory {folder}")
    files = arguments.get("data_files", [])
    for value in files.values() if isinstance(files, dict) else [files]:
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
            if not isinstance(pattern, str):
                raise TuningError(f"{where}: data_files is a pattern, a list of patterns, or these by split")
            if "://" not in pattern and not glob.glob(pattern, recursive=True):  # noqa: PTH207 (absolute patterns)
                raise TuningError(f"{where}: no file matches {pattern}")
