"""Pinned RAM, from which a GPU fetches weights while it computes.

torch takes a pinned block of the next power of two for each tensor, to use it again (`CachingHostAllocator.h`,
`PowerOf2Ceil`). Wan's matrices are far from one: pinned one by one the 28.6 GB of a 14B expert take 43. Put together
into buffers that are a power of two themselves they take 30.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BUFFER = 2**30  # bytes: many times the largest matrix
ALIGNMENT = 512  # a tensor begins at a multiple of it in its buffer


def pinned_bytes(size: int) -> int:
    """What weights of this size in all take at most: their buffers, and one more for what is left free in each."""
    return size // BUFFER * BUFFER + power_of_two(size % BUFFER) + BUFFER * (size > BUFFER)


def power_of_two(size: int) -> int:
    """The next one, from 0 on."""
    return 1 << (size - 1).bit_length() if size else 0


def plan_buffers(sizes: Sequence[int]) -> tuple[list[dict[int, int]], list[int]]:
    """Where tensors go: the largest first, each into the first buffer that has room.

    Args:
        sizes: bytes of each tensor.

    Returns:
        of each buffer {number of a tensor: its offset}, and how many bytes it takes.
    """
    places: list[dict[int, int]] = []
    filled: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        taken = -(-sizes[number] // ALIGNMENT) * ALIGNMENT
        buffer = next((i for i, used in enumerate(filled) if used + taken <= BUFFER), len(filled))
        if buffer == len(filled):
            places.append({})
            filled.append(0)
        places[buffer][number] = filled[buffer]
        filled[buffer] += taken
    return places, [power_of_two(used) for used in filled]


def pin_weights(module: nn.Module) -> None:
    """Move a module's weights into pinned RAM, buffer by buffer: beside those that are not moved yet there is one
    buffer at a time. What is pinned already, diffusers does not copy once more.
    """
    parameters = list(module.parameters())
    for places, size in zip(*plan_buffers([p.nbytes for p in parameters]), strict=True):
        buffer = empty_pinned(size)
        for number, offset in places.items():
            weights = parameters[number]
            place = buffer[offset : offset + weights.nbytes].view(weights.dtype).view(weights.shape)
            weights.data = place.copy_(weights.data)


def empty_pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
