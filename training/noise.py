"""How much noise a training sample gets: the table of timesteps, how one is chosen, how its loss weighs.

The table is DiffSynth-Studio's, with which Stand-In, SVI and most LoRAs of Wan were trained: 1000 sigmas, shifted by 5,
so that a uniform index meets high noise more often. StableAvatar, Concat-ID and VideoX-Fun use it too, with weight 1.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.wan.schedulers import TRAIN_TIMESTEPS, get_schedule
from training.draws import Draws
from training.error_recycling import loss_weights

SAMPLINGS = ("uniform", "logit_normal", "stratified")
WEIGHTINGS = ("bell", "none")


@dataclass(frozen=True, kw_only=True)
class NoiseTable:
    """The noise levels of a training run.

    shift, size: of the table.
    sampling:    how an index is chosen: uniform, logit_normal (SD3's: the middle of the table more often), or
                 stratified (uniform, each sample of a global batch in a slice of its own).
    first, last: the part of the table that is trained, as shares of its indices, first included and last not: an expert
                 of Wan2.2 has its own (`expert_range`). Index 0 is pure noise.
    logit_mean, logit_std: of logit_normal.
    weighting:   of the loss: bell (least at both ends, 1 on the mean) or none.
    """

    shift: float = 5.0
    size: int = TRAIN_TIMESTEPS
    sampling: str = "uniform"
    first: float = 0.0
    last: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: str = "bell"
    sigmas: Tensor = field(init=False, repr=False, compare=False)  # (size,) float32, from 1 down
    timesteps: Tensor = field(init=False, repr=False, compare=False)  # (size,) float32, what the model is told
    weights: Tensor = field(init=False, repr=False, compare=False)  # (size,) float32

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling {self.sampling!r} is not one of {', '.join(SAMPLINGS)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {self.weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        schedule = get_schedule("euler", self.size, self.shift)
        bell = loss_weights(schedule.timesteps)
        # Written past the frozen fields: they follow from the others.
        object.__setattr__(self, "sigmas", schedule.sigmas[:-1])
        object.__setattr__(self, "timesteps", schedule.timesteps)
        object.__setattr__(self, "weights", bell if self.weighting == "bell" else torch.ones_like(bell))
        low, high = self.bounds
        if not 0 <= low < high <= self.size:
            raise ValueError(f"range {self.first:g} to {self.last:g} holds no timestep of {self.size}")

    @property
    def bounds(self) -> tuple[int, int]:
        """First index that is trained, and the one after the last."""
        return int(self.first * self.size), int(self.last * self.size)

    def sample(self, draw: Draws) -> Tensor:
        """An index of the table for each sample, (B,) int64."""
        if self.sampling == "logit_normal":
            normal = draw.normal("timestep", ())
            share = torch.sigmoid(self.logit_mean + self.logit_std * normal.double())
        elif self.sampling == "stratified":
            share = draw.stratified("timestep")
        else:
            share = draw.uniform("timestep")
        low, high = self.bounds
        return (low + (share * (high - low)).long()).clamp(max=high - 1)

    def weight(self, sigma: Tensor) -> Tensor:
        """The weight (B,) of the loss at noise levels (B,) of the table."""
        nearest = (self.sigmas[None] - sigma.cpu()[:, None]).abs().argmin(dim=1)
        return self.weights[nearest].to(sigma.device)

    def quantiles(self, count: int) -> Tensor:
        """Indices in the middle of `count` equal parts of the range, (count,) int64: where a held-out loss is taken."""
        low, high = self.bounds
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return (low + middles * (high - low)).long()


def expert_range(expert: str, boundary: float, table: NoiseTable) -> tuple[float, float]:
    """(first, last) of the part of the table that one expert of Wan2.2 denoises.

    Args:
        expert: "high" for timesteps at or above boundary·1000, "low" for the rest.
        boundary: of the model, e.g. 0.875 (T2V-A14B: 417 of 1000 indices are high) or 0.9 (I2V-A14B: 358).
        table: gives shift and size.
    """
    if expert not in ("high", "low"):
        raise ValueError(f"expert {expert!r} is not one of high, low")
    high = int((table.timesteps >= boundary * TRAIN_TIMESTEPS).sum())
    share = (high + 0.5) / table.size  # half an index of margin, so that share · size rounds down to it
    return (0.0, share) if expert == "high" else (share, 1.0)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, (B,), for tensors like (B, C, F, h, w)."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_σ = (1-σ)·clean + σ·noise, with a sigma (B,) for each sample."""
    s = spread(sigma, clean)
    return (1 - s) * clean + s * noise
