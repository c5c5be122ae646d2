"""The tables of SVI's error-recycling fine-tuning: how the steps of training weigh, and which errors belong together.

Source: Stable Video Infinity (arXiv 2510.09212), `train_svi.py` (`_get_timestep_grid`) and
`diffsynth/schedulers/flow_match.py`.
"""

import torch
from torch import Tensor

from models.wan.schedulers import TRAIN_TIMESTEPS


def loss_weights(timesteps: Tensor) -> Tensor:
    """Weight of the loss at each of the training timesteps (N,): a bell around the middle, down to 0 at the least, and
    1 on the mean.
    """
    bell = torch.exp(-2 * (timesteps / TRAIN_TIMESTEPS - 0.5) ** 2)
    bell = bell - bell.min()
    return bell * (len(timesteps) / bell.sum())


def error_buckets(timesteps: Tensor, grid: Tensor) -> Tensor:
    """The bucket of the error bank for each timestep (N,): the nearest of the grid's (K,), the first of equals, int64.

    The grid is that of inference, so that a step meets errors of its own noise level. It begins at 1000, above what
    a timestep is clamped to.
    """
    distances = (grid[None] - timesteps.clamp(0, TRAIN_TIMESTEPS - 1)[:, None]).abs()  # (N, K)
    return distances.argmin(dim=1)
