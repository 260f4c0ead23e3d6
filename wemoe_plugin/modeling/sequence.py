"""What a model knows about its tokens and its modules do not: which are padding, and which came in earlier steps."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wemoe_plugin.modeling.per_thread import PerThread

CACHE_ATTRIBUTE = "wemoe_weights"
"""Under which a key-value cache carries what was decided on its prompt: with it the decision is copied and dropped."""


class SampleRouter(Protocol):
    """What decides on a sample: a `wemoe_plugin.modeling.router.Router`."""

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One weight per sample and expert."""


class Tokens(NamedTuple):
    """What routers must know of the tokens that a stack of layers works on.

    Attributes:
        known: whether a forward pass of the stack is under way.
        batch: how many texts there are; None if the stack was given nothing that tells.
        length: how many tokens of each are in this pass.
        mask: which positions are tokens, not padding, (batch, positions), earlier ones first; None if all are.
        past: how many positions lie in the cache, before those of this pass.
        kept: what earlier tokens of the same sequences decided, by module; None for a new prompt.
        decided: what this pass decides, by module.
    """

    known: bool = False
    batch: int | None = None
    length: int | None = None
    mask: Tensor | None = None
    past: int = 0
    kept: dict[str, Tensor] | None = None
    decided: dict[str, Tensor] | None = None


UNKNOWN = Tokens()


class SequenceState:
    """The tokens of the forward pass of a stack that is under way.

    Attributes:
        masked: whether a pass with gradients had a mask.
    """

    def __init__(self) -> None:
        self._tokens: PerThread[Tokens] = PerThread(UNKNOWN)
        self.masked = False

    @property
    def tokens(self) -> Tokens:
        return self._tokens.get()

    @tokens.setter
    def tokens(self, value: Tokens) -> None:
        self._tokens.set(value)

    def decide(self, path: str, x: Tensor, router: SampleRouter) -> Tensor:
        """The weights (batch, experts) of a module: those of the prompt if it was seen, else the router's.

        Args:
            path: of the module.
            x: its input, (batch, tokens, width).
            router: its router.

        Raises:
            ValueError: the module sees other rows or tokens than its stack, the cache or the mask are of others, or the
                module is run again in a backward pass.
        """
        tokens = self.tokens
        if not tokens.known and self.masked and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{path} is computed again in the backward pass, where padding is not known, after a pass that had an "
                "attention mask: turn gradient checkpointing off"
            )
        _check_rows(path, x, tokens)
        if tokens.kept is not None and path in tokens.kept:
            return tokens.kept[path].to(x.device)
        mask = _mask_of(x, tokens)
        weights = router(x) if mask is None else router(x, mask)
        if tokens.decided is not None:
            tokens.decided[path] = weights.detach()
        return weights


def _check_rows(path: str, x: Tensor, tokens: Tokens) -> None:
    """Refuse a module that sees parts of texts as rows, or parts of their tokens: it cannot decide for the texts."""
    if tokens.batch is not None and x.shape[0] != tokens.batch:
        raise ValueError(
            f"{path} sees {x.shape[0]} rows of a batch of {tokens.batch} texts; its weights cannot be decided for each "
            "text. Upscale the module around it, or leave it to a static method"
        )
    if tokens.length is not None and x.ndim == 3 and x.shape[1] != tokens.length:
        raise ValueError(
            f"{path} sees {x.shape[1]} of {tokens.length} tokens; it cannot decide for the whole text (feed-forward "
            "chunks, or a head that is given the last token alone)"
        )
    kept = None if tokens.kept is None else tokens.kept.get(path)
    if kept is not None and kept.shape[0] != x.shape[0]:
        raise ValueError(
            f"the cache was made for {kept.shape[0]} prompts, this step has {x.shape[0]} rows: weights are decided on "
            "the prompt and kept with its cache"
        )


def _mask_of(x: Tensor, tokens: Tokens) -> Tensor | None:
    """The mask of a module's input: of the positions after those in the cache; a cache of fixed size has more."""
    if tokens.mask is None or x.ndim != 3:
        return None
    last = tokens.past + x.shape[1]
    mask = tokens.mask[:, tokens.past : last] if tokens.mask.shape[1] >= last else tokens.mask[:, -x.shape[1] :]
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"the attention mask is for {list(tokens.mask.shape)} (batch, tokens), the upscaled module sees "
            f"{list(x.shape[:2])}: it cannot leave padding out"
        )
    return mask


def watch(model: nn.Module, path: str, states: dict[str, SequenceState]) -> SequenceState | None:
    """The state of the stack of layers around a module, which is told about every forward pass from now on.

    A stack is the nearest module around that takes token ids and an attention mask (a ``LlamaModel``, each of T5's two
    stacks, the text tower of a CLIP), or else the nearest that takes embeddings and a mask. What takes images is none.

    Args:
        model: the whole model.
        path: of a module in it.
        states: of the stacks that are watched already; a new one is added.

    Returns:
        None where there is no such stack, as in a vision tower.
    """
    found = _stack_around(model, path)
    if found is None:
        return None
    if found not in states:
        stack, state = model.get_submodule(found), SequenceState()
        taken = tuple(inspect.signature(stack.forward).parameters)
        stack.register_forward_pre_hook(_Begin(state, taken), with_kwargs=True)
        stack.register_forward_hook(_End(state, taken), with_kwargs=True, always_call=True)
        states[found] = state
    return states[found]


def _stack_around(model: nn.Module, path: str) -> str | None:
    embedded = None
    while path:
        path = path.rpartition(".")[0]
        taken = inspect.signature(model.get_submodule(path).forward).parameters
        if "pixel_values" in taken:
            return None if "input_ids" not in taken else embedded if path else None
        if "attention_mask" in taken and "input_ids" in taken:
            return path
        if "attention_mask" in taken and "inputs_embeds" in taken and embedded is None:
            embedded = path
    return embedded


class _Hook:
    """Knows what a stack was called with, by name."""

    def __init__(self, state: SequenceState, names: tuple[str, ...]) -> None:
        self.state, self.names = state, names

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args, strict=False)) | kwargs


class _Begin(_Hook):
    """Tells the routers of a stack about the tokens of a forward pass."""

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.given(args, kwargs)
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        batch, length = inputs.shape[:2] if isinstance(inputs, Tensor) else (None, None)
        mask = _padding(given.get("attention_mask"))
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        kept: dict[str, Tensor] | None = getattr(cache, CACHE_ATTRIBUTE, None) if past else None
        if past and kept is None:
            raise ValueError(
                f"this cache holds {past} tokens but not what their routers decided: it was filled by another model, "
                "or rebuilt; begin with the prompt and an empty cache"
            )
        self.state.masked = self.state.masked or (mask is not None and torch.is_grad_enabled())
        self.state.tokens = Tokens(True, batch, length, mask, past, kept, dict(kept or {}))


class _End(_Hook):
    """Keeps what was decided with the cache."""

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if output is not None:
            for cache in (self.given(args, kwargs).get("past_key_values"), getattr(output, "past_key_values", None)):
                if hasattr(cache, "get_seq_length"):
                    setattr(cache, CACHE_ATTRIBUTE, self.state.tokens.decided)
        self.state.tokens = UNKNOWN


def _padding(mask: Any) -> Tensor | None:
    """Which positions are tokens, (batch, positions), from whatever kind of attention mask; None without one.

    A mask of queries and keys, (batch, heads, queries, keys), shows padding as keys that no query may look at. Queries
    that are padding themselves may be shown to look at everything (attention kernels want no empty rows): only the
    last query may really do so.

    Raises:
        ValueError: it is of a kind that cannot be read.
    """
    if isinstance(mask, dict):  # one per kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool()
    if isinstance(mask, Tensor) and mask.ndim == 4:
        allowed = (mask > -1.0 if mask.is_floating_point() else mask.bool()).any(1)
        everything = allowed.all(-1, keepdim=True)
        everything[:, -1] = False
        return (allowed & ~everything).any(1)
    raise ValueError(
        f"an attention mask that is a {type(mask).__name__} does not tell routers what is padding; give one of 0 and "
        "1, (batch, tokens)"
    )
