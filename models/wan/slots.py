"""What enters one forward pass beside latents and timestep: prompts, and what plug-ins add. Made for the call, or kept
with the request; nothing of it is left on a module.

    Plugin: (patch tokens (B, L, D), BlockContext) -> Slots         asked once a forward pass, after the embeddings
    BlockSlots: what all plug-ins together add to one block

A new kind of slot is one entry in `Slots` and `BlockSlots`, and one line in the block.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.wan.attention import Rope

KeysValues = tuple[Tensor, Tensor]  # K (normed, rotated where it has a position) and V, each (1 or B, M, n, d)


@dataclass(frozen=True)
class Slots:
    """What one plug-in adds to one forward pass. Every sequence has one entry a block; None fills nothing.

    added_tokens:         (B, L, D) added to the tokens after the patch embedding
    self_keys_values:     keys and values that the video's queries see beside their own
    self_qkv_deltas:      x (B, L, D) -> three terms added to q, k, v before their norms
    cross_attention:      (q (B, L, n, d), attention kernel) -> (B, L, D), added before cross-attention's `o`
    middle_residuals:     x (B, L, D) -> (B, L, D), added between cross-attention and feed-forward
    block_residuals:      x (B, L, D) -> (B, L, D), added at the end of the block
    on_self_keys_values:  called with (block index, K, V) of every self-attention
    """

    added_tokens: Tensor | None = None
    self_keys_values: Sequence[KeysValues | None] | None = None
    self_qkv_deltas: Sequence[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None] | None = None
    cross_attention: Sequence[Callable[[Tensor, Callable], Tensor] | None] | None = None
    middle_residuals: Sequence[Callable[[Tensor], Tensor] | None] | None = None
    block_residuals: Sequence[Callable[[Tensor], Tensor] | None] | None = None
    on_self_keys_values: Callable[[int, Tensor, Tensor], None] | None = None


# A plug-in sees the patch tokens (B, L, D) and the context of the coming blocks, and says what it adds.
Plugin = Callable[[Tensor, "BlockContext"], Slots]


@dataclass
class PromptBlock:
    """One block's cross-attention keys and values of one prompt, once they are computed, if they are to be kept."""

    keeps: bool = True
    keys_values: list[KeysValues] | None = None


@dataclass
class Prompt:
    """A request's text (and CLIP) states for one transformer, and what was derived from them.

    The states do not change over the steps, so the embedded tokens and each block's cross-attention keys and values are
    computed at first use and kept here, with the request, never on the model. While gradients are recorded nothing is
    kept.

    Args:
        text: a list of (len, text_dim) states, padded with zero rows to text_len (released behaviour: the padding is
            attended); or a tensor (B, T, text_dim), attended as it is.
        image: CLIP features (B, 257, image_dim), two pictures per sample (B, 514, image_dim) in FLF2V, or None.
        keep_keys_values: False recomputes keys and values at each call (saves 2·T·D·layers values per prompt).
    """

    text: Sequence[Tensor] | Tensor
    image: Tensor | None = None
    keep_keys_values: bool = True
    _tokens: tuple[Tensor, Tensor | None] | None = None
    _blocks: dict[Hashable, PromptBlock] = field(default_factory=dict)

    def block(self, index: Hashable) -> PromptBlock:
        """What a block keeps between calls. `index`: the transformer's by their numbers, a branch's by themselves."""
        if not self.keep_keys_values or torch.is_grad_enabled():
            return PromptBlock(keeps=False)
        return self._blocks.setdefault(index, PromptBlock())

    def tokens(self, embed: Callable[["Prompt", torch.device], tuple[Tensor, Tensor | None]], device: torch.device):
        if self._tokens is not None:
            return self._tokens
        tokens = embed(self, device)
        if not torch.is_grad_enabled():
            self._tokens = tokens
        return tokens


@dataclass(frozen=True)
class BlockSlots:
    """What all plug-ins together add to one block in one forward pass, and where that block keeps the prompt's keys.

    Blocks are told nothing of their number, and so all share one compiled graph.
    """

    self_keys_values: tuple[KeysValues, ...] = ()
    self_qkv_deltas: tuple[Callable, ...] = ()
    cross_attention: tuple[Callable, ...] = ()
    middle_residuals: tuple[Callable, ...] = ()
    block_residuals: tuple[Callable, ...] = ()
    on_self_keys_values: tuple[Callable[[Tensor, Tensor], None], ...] = ()
    prompt: PromptBlock | None = None

    @classmethod
    def of_block(cls, index: int, plugins: Sequence[Slots], prompt: "Prompt | None" = None) -> "BlockSlots":
        def entries(name: str) -> tuple:
            given = (getattr(slots, name) for slots in plugins)
            return tuple(entry[index] for entry in given if entry is not None and entry[index] is not None)

        listeners = (slots.on_self_keys_values for slots in plugins)
        return cls(
            entries("self_keys_values"),
            entries("self_qkv_deltas"),
            entries("cross_attention"),
            entries("middle_residuals"),
            entries("block_residuals"),
            tuple(functools.partial(listener, index) for listener in listeners if listener is not None),
            None if prompt is None else prompt.block(index),
        )


@dataclass
class BlockContext:
    """All that the blocks of one forward pass share. Made for the call, gone with it."""

    time: Tensor  # (B, 1 or L, D) float32, the time embedding (the head's modulation)
    modulation: Tensor  # (B, 1 or L, 6, D) float32, the blocks' modulation
    rope: Rope
    text: Tensor | None  # (B, T, D) in the compute dtype; None: no cross-attention
    image: Tensor | None  # (B, S, D), CLIP models
    dtype: torch.dtype  # compute dtype of the linears
    grid: tuple[int, int, int]  # (F, H, W) in tokens, of the first sample
    lengths: list[int] | None = None  # real tokens of each sample, where some are padded
    sharded: bool = False  # the sequence is split over processes
    prompt: Prompt | None = None  # where the blocks of a branch keep its keys and values

    def attention_mask(self, num_keys: int) -> Tensor | None:
        """(B, 1, 1, keys): False on padding. Keys of plug-ins, at the end, are never padding."""
        if self.lengths is None:
            return None
        length = torch.tensor(self.lengths, device=self.time.device)[:, None]
        padded = self.rope[0].shape[1]
        position = torch.arange(num_keys, device=self.time.device)[None]
        return ((position < length) | (position >= padded))[:, None, None]
