"""What the blocks of a transformer keep for the backward pass, and where: the memory of training, beside the weights.

A checkpointed block keeps its input alone and computes the rest again. The input is the residual stream in float32,
26.8 GB for 14B at 480x832 and 81 frames; it can wait in the machine's memory, or in bfloat16.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.wan.transformer import WanTransformer

# What attention computes, by PyTorch's own kernels.
ATTENTION_OPERATORS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def set_checkpointing(transformer: WanTransformer, kind: str, offload: bool = False, store_bf16: bool = False) -> None:
    """Have the blocks computed again in the backward pass.

    Args:
        kind: none, full, or attention: all but attention's outputs, which are kept.
        offload: the inputs of blocks wait in the machine's memory, pinned where there is a GPU.
        store_bf16: they are kept in bfloat16; what is computed again is then a little off, and so are gradients.
    """
    if kind == "none":
        return

    def keep_attention(ctx: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in ATTENTION_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE

    def run(block: nn.Module, hidden_states: Tensor, *args: object) -> Tensor:
        options = {}
        if kind == "attention":
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(keep_attention)
        given = hidden_states
        if offload or store_bf16:
            given = waiting_input(hidden_states, offload, store_bf16)
        # Draws come from no generator of PyTorch: there is no state to keep for the second time.
        return checkpoint(with_input, block, given, *args, use_reentrant=False, preserve_rng_state=False, **options)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)


def with_input(block: nn.Module, given: Tensor | Callable[[], Tensor], *args: object) -> Tensor:
    """The block on its input, or on what gives it."""
    return block(given if isinstance(given, Tensor) else given(), *args)


def waiting_input(hidden_states: Tensor, offload: bool, store_bf16: bool) -> Callable[[], Tensor]:
    """What gives a block's input: the first time as it is, and then from where it waited. Between the two, nothing here
    holds the input itself. (The second time only values are wanted: the graph is that of the first.)
    """
    stored = hidden_states.detach()
    if store_bf16:
        stored = stored.bfloat16()
    if offload:
        waiting = torch.empty(stored.shape, dtype=stored.dtype, device="cpu", pin_memory=stored.is_cuda)
        stored = waiting.copy_(stored, non_blocking=True)
    device, dtype, has_gradient = hidden_states.device, hidden_states.dtype, hidden_states.requires_grad
    first = [hidden_states]

    def give() -> Tensor:
        if first:
            return first.pop()
        return stored.to(device, non_blocking=True).to(dtype).requires_grad_(has_gradient)

    return give
