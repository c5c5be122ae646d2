"""The moving average of what is trained, in float32."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """mean ← decay·mean + (1 - decay)·weights, from the weights at the start.

    Args:
        values: the masters' values, by name.
        decay: of one update.
        every: optimiser steps between updates.
        device: where the mean is kept; None: where the weights are.
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float, every: int = 1, device: str | None = None):
        self.decay, self.every = decay, every
        self.mean = {name: value.detach().to(device or value.device, copy=True) for name, value in values.items()}

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor], step: int) -> None:
        """After optimiser step number `step`, from 0."""
        if (step + 1) % self.every:
            return
        for name, mean in self.mean.items():
            mean.lerp_(values[name].to(mean.device), 1 - self.decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved mean."""
        for name, mean in self.mean.items():
            mean.copy_(tensors[name])
