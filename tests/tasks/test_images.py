"""Data comes through datasets as its users know it; what is wrong with it is said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wemoe_plugin.errors import TuningError
from wemoe_plugin.tasks.images import ImageSet, load_images


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()


def image(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8))


def folders(directory: Path) -> Path:
    """Two classes with two images each, and one flat folder without labels."""
    for i, name in enumerate(("ant", "bee")):
        (directory / "test" / name).mkdir(parents=True)
        for j in range(2):
            image(100 * i + j).save(directory / "test" / name / f"{j}.png")
    (directory / "tune").mkdir()
    for j in range(3):
        image(j).save(directory / "tune" / f"{j}.png")
    return directory


def load(directory: Path, arguments: dict[str, Any], label: str | None = "label", limit: int | None = None) -> ImageSet:
    return load_images(
        arguments,
        lambda path: directory / path,
        to_tensor,
        input_column="image",
        label_column=label,
        limit=limit,
        where="tasks.t.score",
    )


def test_image_folders(tmp_path: Path) -> None:
    folders(tmp_path)
    images = load(tmp_path, {"path": "imagefolder", "data_dir": "test", "split": "train"})
    assert images.label_names == ["ant", "bee"]
    assert images.labels().tolist() == [0, 0, 1, 1]
    assert images.pixels([0, 3]).shape == (2, 3, 4, 4)
    assert images.pixels([0, 3, 0])[:, 0, 0, 0].tolist() == [0, 101, 0]
    assert len(load(tmp_path, {"path": "imagefolder", "data_dir": "test", "split": "train"}, limit=3)) == 3


def test_unlabeled_images_need_no_labels(tmp_path: Path) -> None:
    folders(tmp_path)
    images = load(tmp_path, {"path": "imagefolder", "data_dir": "tune", "split": "train"}, label=None)
    assert len(images) == 3
    with pytest.raises(TuningError, match="was opened without labels"):
        images.labels()


def test_saved_data_sets_and_parquet(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [image(5), image(6)], "label": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"tune": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "dict")
    for arguments in (
        {"path": "saved"},
        {"path": "parquet", "data_files": "rows.parquet"},
        {"path": "parquet", "data_files": {"x": ["rows.parquet"]}, "split": "x"},
        {"path": "dict", "split": "tune"},
    ):
        images = load(tmp_path, arguments)
        assert images.labels().tolist() == [1, 0]
        assert images.pixels([1])[0, 0, 0, 0] == 6
        assert images.label_names is None
    with pytest.raises(TuningError, match=r"tasks\.t\.score: has the splits tune, test; name one with split:"):
        load(tmp_path, {"path": "dict"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "imagefolder", "data_dir": "nowhere"}, "no such directory"),
        ({"path": "imagefolder", "data_files": "nowhere/*.png"}, "no file matches"),
        ({"path": "imagefolder", "data_files": {"x": ["test/*/*.png", "nowhere/*.png"]}}, "no file matches"),
        ({"path": "imagefolder", "data_dir": "test", "split": "dev"}, "datasets cannot load it"),
        ({"path": "imagefolder", "data_dir": "test", "wrong": 1}, "datasets cannot load it"),
        ({"path": "no/such-data"}, "datasets cannot load it"),
    ],
)
def test_data_that_cannot_be_loaded(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folders(tmp_path)
    with pytest.raises(TuningError) as caught:
        load(tmp_path, arguments)
    assert str(caught.value).startswith("tasks.t.score: ")
    assert message in str(caught.value)


def test_columns_that_are_not_there_or_not_what_they_should_be(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"], "soft": [0.5, 0.5]})
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(TuningError, match="has no column 'label'; it has image, text, soft"):
        load(tmp_path, {"path": "saved"})
    with pytest.raises(TuningError, match="'image' holds int, not images"):
        load(tmp_path, {"path": "saved"}, label=None).pixels([0])
    for column in ("text", "soft"):
        with pytest.raises(TuningError, match="does not hold integer labels"):
            load(tmp_path, {"path": "saved"}, label=column).labels()
    with pytest.raises(TuningError, match="has no rows"):
        ImageSet(rows.select([]), "image", None, to_tensor, "t")
