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
        mask: which positions are tokens, not padding, (batch, positions), earlier ones first; None if all are.
        past: how many positions lie in the cache, before those of this pass.
        kept: what earlier tokens of the same sequences decided, by module; None for a new prompt.
        decided: what this pass decides, by module; None where nobody will ask for it.
    """

    mask: Tensor | None = None
    past: int = 0
    kept: dict[str, Tensor] | None = None
    decided: dict[str, Tensor] | None = None


UNKNOWN = Tokens()


class SequenceState:
    """The tokens of the forward pass of a stack that is under way."""

    def __init__(self) -> None:
        self._tokens: PerThread[Tokens] = PerThread(UNKNOWN)

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
            ValueError: the cache or the mask is of another batch, or the mask of other tokens; or the module is run
                again in a backward pass.
        """
        tokens = self.tokens
        if tokens is UNKNOWN and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{path} is computed again in the backward pass, where padding is not known: turn gradient "
                "checkpointing off"
            )
        if tokens.kept is not None and path in tokens.kept:
            weights = tokens.kept[path]
            if weights.shape[0] != x.shape[0]:
                raise ValueError(
                    f"the cache was made for {weights.shape[0]} prompts, this step has {x.shape[0]} rows: weights are "
                    "decided on the prompt and kept with its cache"
                )
            return weights.to(x.device)
        mask = _mask_of(x, tokens)
        weights = router(x) if mask is None else router(x, mask)
        if tokens.decided is not None:
            tokens.decided[path] = weights.detach()
        return weights


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

    A stack is the nearest module around that takes token ids or embeddings and an attention mask: a ``LlamaModel``,
    each of T5's two stacks, the text tower of a CLIP.

    Args:
        model: the whole model.
        path: of a module in it.
        states: of the stacks that are watched already; a new one is added.

    Returns:
        None where there is no such stack, as in a vision tower.
    """
    while path:
        path = path.rpartition(".")[0]
        if path in states:
            return states[path]
        stack = model.get_submodule(path)
        taken = tuple(inspect.signature(stack.forward).parameters)
        if "attention_mask" in taken and ("input_ids" in taken or "inputs_embeds" in taken):
            state = states[path] = SequenceState()
            stack.register_forward_pre_hook(_Begin(state, taken), with_kwargs=True)
            stack.register_forward_hook(_End(state, taken), with_kwargs=True, always_call=True)
            return state
    return None


class _Begin:
    def __init__(self, state: SequenceState, names: tuple[str, ...]) -> None:
        self.state, self.names = state, names

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        mask = _padding(given.get("attention_mask"))
        earlier: dict[str, Tensor] | None = getattr(cache, CACHE_ATTRIBUTE, None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if earlier is not None and past > 0:
            self.state.tokens = Tokens(mask, past, earlier, dict(earlier))
        else:
            self.state.tokens = Tokens(mask, past, None, {})


class _End:
    def __init__(self, state: SequenceState, names: tuple[str, ...]) -> None:
        self.state, self.names = state, names

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if output is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, CACHE_ATTRIBUTE, self.state.tokens.decided)
        self.state.tokens = UNKNOWN


def _padding(mask: Any) -> Tensor | None:
    """Which positions are tokens, (batch, positions), from whatever kind of attention mask; None if it does not tell.

    A mask of queries and keys, (batch, heads, queries, keys), shows padding as keys that no query may look at. Queries
    that are padding themselves may be shown to look at everything (attention kernels want no empty rows): only the last
    query may really do so.
    """
    if isinstance(mask, dict):  # one per kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask.bool()
    if mask.ndim == 4:
        allowed = (mask > -1.0 if mask.is_floating_point() else mask.bool()).any(1)
        everything = allowed.all(-1, keepdim=True)
        everything[:, -1] = False
        return (allowed & ~everything).any(1)
    return None
