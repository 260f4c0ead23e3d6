"""What every test shares: shapes are checked at run time, nothing reaches the network or the user's folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
SHAPED = ["modeling.router", "modeling.composition", "modeling.forms", "modeling.ensembled_linear", "task_vectors"]
install_import_hook([f"wemoe_plugin.{name}" for name in SHAPED], "beartype.beartype")

import torch  # noqa: E402 (after the hook)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``wemoe-merge`` in this process: (exit status, stdout, stderr)."""
    from wemoe_plugin.cli import main

    def run(*args: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        output = capsys.readouterr()
        return int(stopped.value.code or 0), output.out, output.err

    return run


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with few images and few steps."""
    from wemoe_plugin.demo.workspace import prepare_demo

    directory = tmp_path_factory.mktemp("pristine") / "demo"
    prepare_demo(directory, tune_images=24, score_images=24, steps=4)
    return directory


@pytest.fixture
def demo(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it that the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "demo"))
