"""Every random number of training, as a pure function of (seed, step, global sample position, purpose).

Nothing is drawn "next": there is no state to save. A run that resumes, runs on other processes, with other workers or
another accumulation asks the same questions and gets the same answers. A new purpose shifts no other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor


def generator(seed: int, step: int, position: int | None, purpose: str) -> numpy.random.Generator:
    """The generator of one answer: Philox, keyed by a hash of the question. `position` None: of the whole step."""
    question = f"{seed}/{step}/{'' if position is None else position}/{purpose}".encode()
    key = int.from_bytes(hashlib.blake2b(question, digest_size=16).digest(), "little")
    return numpy.random.Generator(numpy.random.Philox(key=key))


@dataclass(frozen=True)
class Draws:
    """The draws of some samples of one optimiser step. Every method gives one row a sample, on the CPU.

    seed:         of the run.
    step:         optimiser step, from 0.
    positions:    of the samples in the global batch, from 0.
    global_batch: samples of the step over all processes and micro-batches.
    """

    seed: int
    step: int
    positions: Sequence[int]
    global_batch: int

    def __post_init__(self):
        assert all(0 <= position < self.global_batch for position in self.positions)

    def of(self, row: int) -> "Draws":
        """The draws of one of these samples."""
        return replace(self, positions=[self.positions[row]])

    def _generators(self, purpose: str) -> list[numpy.random.Generator]:
        return [generator(self.seed, self.step, position, purpose) for position in self.positions]

    def uniform(self, purpose: str) -> Tensor:
        """(B,) float64 in [0, 1)."""
        return torch.tensor([own.random() for own in self._generators(purpose)], dtype=torch.float64)

    def stratified(self, purpose: str) -> Tensor:
        """(B,) float64 in [0, 1): each sample of the global batch in a slice of its own, the slices dealt at random.

        The mean over a step of anything that depends on it varies less than with independent draws.
        """
        slices = generator(self.seed, self.step, None, f"{purpose}.slices").permutation(self.global_batch)
        own = torch.from_numpy(slices[list(self.positions)])
        return (own + self.uniform(purpose)) / self.global_batch

    def integers(self, purpose: str, high: int | Sequence[int]) -> Tensor:
        """(B,) int64 in [0, high); `high` may differ from sample to sample."""
        highs = [high] * len(self.positions) if isinstance(high, int) else high
        pairs = zip(self._generators(purpose), highs, strict=True)
        return torch.tensor([int(own.integers(limit)) for own, limit in pairs], dtype=torch.int64)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32, N(0, 1)."""
        rows = [own.standard_normal(tuple(shape), dtype=numpy.float32) for own in self._generators(purpose)]
        return torch.from_numpy(numpy.stack(rows))

    def lognormal(self, purpose: str, mean: float, std: float) -> Tensor:
        """(B,) float64, exp(N(mean, std))."""
        normals = [own.standard_normal() for own in self._generators(purpose)]
        return torch.exp(mean + std * torch.tensor(normals, dtype=torch.float64))
