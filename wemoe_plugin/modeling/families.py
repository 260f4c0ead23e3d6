"""What the libraries do differently: building a model, reading images and text, and their features."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.module_names import transformers_class, transformers_skeleton
from wemoe_plugin.checkpoints.tensors import read_tensors
from wemoe_plugin.errors import CheckpointError


class ModelFamily(Protocol):
    """A library that builds models from directories."""

    def build(self, directory: Path, dtype: torch.dtype, overlay: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The directory's model with its ordinary weights, in eval mode on the CPU.

        Tensors in ``overlay``, by the names of the directory's files, take the place of the directory's own.
        """

    def skeleton(self, directory: Path) -> nn.Module | None:
        """The same model without memory for its weights, to look at its modules; None if its class is not named."""

    def image_transform(self, directory: Path) -> Callable[[Image.Image], Tensor]:
        """From a picture to the model's input, (channels, height, width)."""

    def tokenizer(self, directory: Path) -> Callable[[Sequence[str]], Any]:
        """From texts to what `encode_text` takes."""

    def encode_image(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Image features (batch, embed), not normalized."""

    def encode_text(self, model: nn.Module, tokens: Any) -> Tensor:
        """Text features (texts, embed), not normalized."""

    def logit_scale(self, model: nn.Module) -> Tensor:
        """The factor of cosine similarities, a scalar."""


class OpenClipFamily:
    """open_clip's CLIP models."""

    def build(self, directory: Path, dtype: torch.dtype, overlay: Mapping[str, Tensor] | None = None) -> nn.Module:
        import open_clip

        with _quiet(), _as_checkpoint_error(directory):
            model = open_clip.create_model(f"local-dir:{directory}", precision="fp32")
            if overlay:
                model.load_state_dict({**model.state_dict(), **overlay})
        return model.to(dtype).eval()  # type: ignore[no-any-return]

    def skeleton(self, directory: Path) -> nn.Module | None:
        import open_clip

        with _quiet(), _as_checkpoint_error(directory), torch.device("meta"):
            return open_clip.create_model(  # type: ignore[no-any-return]
                f"local-dir:{directory}", load_weights=False, pretrained_text=False, device="meta"
            )

    def image_transform(self, directory: Path) -> Callable[[Image.Image], Tensor]:
        import open_clip

        with _quiet(), _as_checkpoint_error(directory):
            config = open_checkpoint(directory).config
            settings = open_clip.transform.PreprocessCfg(**config.get("preprocess_cfg", {}))
            size = config["model_cfg"]["vision_cfg"].get("image_size", settings.size)
            return open_clip.image_transform(  # type: ignore[no-any-return]
                size,
                is_train=False,
                mean=settings.mean,
                std=settings.std,
                interpolation=settings.interpolation,
                resize_mode=settings.resize_mode,
                fill_color=settings.fill_color,
            )

    def tokenizer(self, directory: Path) -> Callable[[Sequence[str]], Any]:
        import open_clip

        with _quiet(), _as_checkpoint_error(directory):
            tokenize = open_clip.get_tokenizer(f"local-dir:{directory}")
        return lambda texts: tokenize(list(texts))

    def encode_image(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return model.encode_image(pixels)  # type: ignore[operator, no-any-return]

    def encode_text(self, model: nn.Module, tokens: Any) -> Tensor:
        return model.encode_text(tokens)  # type: ignore[operator, no-any-return]

    def logit_scale(self, model: nn.Module) -> Tensor:
        return model.logit_scale.exp()  # type: ignore[operator]


class TransformersFamily:
    """Models of transformers; features are those of CLIP-like classes."""

    def build(self, directory: Path, dtype: torch.dtype, overlay: Mapping[str, Tensor] | None = None) -> nn.Module:
        checkpoint = open_checkpoint(directory)
        kind = transformers_class(checkpoint.config)
        if kind is None:
            raise CheckpointError(f"{directory}: config.json names no class of transformers under 'architectures'")
        state = {**read_tensors(checkpoint), **overlay} if overlay else None
        with _quiet(), _as_checkpoint_error(directory):
            model, report = kind.from_pretrained(
                None if state else directory,
                config=kind.config_class.from_pretrained(directory, local_files_only=True),
                state_dict=state,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
            )
        absent = [*sorted(report["missing_keys"]), *(key for key, *_ in report["mismatched_keys"])]
        if absent:
            raise CheckpointError(f"{directory}: has no fitting {absent[0]!r}, which a {kind.__name__} needs")
        return model.eval()  # type: ignore[no-any-return]

    def skeleton(self, directory: Path) -> nn.Module | None:
        config = open_checkpoint(directory).config
        with _quiet(), _as_checkpoint_error(directory):
            return transformers_skeleton(directory, config)

    def image_transform(self, directory: Path) -> Callable[[Image.Image], Tensor]:
        from transformers import AutoImageProcessor

        with _quiet(), _as_checkpoint_error(directory):
            processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True)
        return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]

    def tokenizer(self, directory: Path) -> Callable[[Sequence[str]], Any]:
        from transformers import AutoTokenizer

        with _quiet(), _as_checkpoint_error(directory):
            tokenize = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return lambda texts: tokenize(list(texts), padding=True, truncation=True, return_tensors="pt")

    def encode_image(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return _features(model, "get_image_features", {"pixel_values": pixels})

    def encode_text(self, model: nn.Module, tokens: Any) -> Tensor:
        return _features(model, "get_text_features", tokens)

    def logit_scale(self, model: nn.Module) -> Tensor:
        return model.logit_scale.exp()  # type: ignore[operator]


FAMILIES: Mapping[str, ModelFamily] = {"open_clip": OpenClipFamily(), "transformers": TransformersFamily()}
"""By the name `wemoe_plugin.checkpoints.checkpoint.Checkpoint.library` gives them."""


def _features(model: nn.Module, method: str, inputs: Mapping[str, Any]) -> Tensor:
    if not hasattr(model, method):
        raise CheckpointError(f"a {type(model).__name__} has no {method}; zero-shot heads need a CLIP-like model")
    output = getattr(model, method)(**inputs)
    return output if isinstance(output, Tensor) else output.pooler_output


_QUIET = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and notices off the terminal; one thread at a time, since both are global."""
    with _QUIET:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _as_checkpoint_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise anything; the message is what the user needs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = " ".join(lines[:4]) + (" …" if len(lines) > 4 else "")
        raise CheckpointError(f"{directory}: its library cannot load it: {text}") from error
