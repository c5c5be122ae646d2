"""Losses of training, one number a sample: float32, always a mean over all values of the sample.

A mean over the values that a mask keeps would weigh samples by the size of a face, and would differ between processes.

Source: StableAvatar `train_1B_square.py` (custom_mse_loss, motion_sub_loss); Stand-In `pipelines/wan_video.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = ("full", "face", "lip")
MOTION_AXES = {"frames": 2, "legacy": 1}  # StableAvatar differences channels, which its authors meant to be frames


def per_sample(values: Tensor) -> Tensor:
    """(B, …) -> (B,), the mean of each sample's values."""
    return values.flatten(1).mean(dim=1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square()


def mse(prediction: Tensor, target: Tensor, known_frames: int = 0) -> Tensor:
    """(B, C, F, h, w) each -> (B,).

    known_frames: latent frames at the start that are given to the model as they are, and so teach nothing.
    """
    return per_sample(squared_error(prediction, target)[:, :, known_frames:])


def masks_on_latents(mask: Tensor, size: tuple[int, int, int]) -> Tensor:
    """A mask of pixels (B, 1, T, H, W) -> of latents (B, 1, F, h, w), by trilinear interpolation."""
    return F.interpolate(mask.float(), size=size, mode="trilinear", align_corners=False)


def choose_masks(share: Tensor, full: float, face: float) -> list[str]:
    """Which mask each sample's loss gets, from a uniform draw (B,): `full` of all, then `face`, lips for the rest."""
    return ["full" if q < full else "face" if q < full + face else "lip" for q in share.tolist()]


def masked_mse(prediction: Tensor, target: Tensor, face: Tensor, lip: Tensor, which: list[str]) -> Tensor:
    """StableAvatar's three losses: the whole picture with face and lips counted again, the face alone, the lips alone.

    Args:
        prediction, target: (B, C, F, h, w).
        face, lip: (B, 1, F, h, w) in 0 to 1.
        which: of `MASKS`, one a sample.

    Returns:
        (B,).
    """
    weights = {"full": 1 + face + lip, "face": face, "lip": lip}
    chosen = torch.stack([weights[name][row] for row, name in enumerate(which)])  # (B, 1, F, h, w)
    return per_sample(squared_error(prediction, target) * chosen)


def motion_difference(prediction: Tensor, target: Tensor, axis: str = "frames") -> Tensor:
    """How far the change from one latent frame to the next is off, (B,). A single frame has none.

    axis: frames, or legacy for the differences of channels that the released weights were trained with.
    """
    dim = MOTION_AXES[axis]
    if prediction.shape[dim] == 1:
        return prediction.new_zeros(prediction.shape[0], dtype=torch.float32)
    return per_sample(squared_error(prediction.diff(dim=dim), target.diff(dim=dim)))


def reconstruction(decoded: Tensor, frames: Tensor) -> Tensor:
    """L1 of a VAE's frames (B, 3, T, H, W), (B,)."""
    return per_sample((decoded.float() - frames.float()).abs())


def edge_difference(decoded: Tensor, frames: Tensor) -> Tensor:
    """L1 of the differences between neighbors, in a column and in a row, of frames (B, 3, T, H, W), (B,): blur costs
    more than what is a little too dark.
    """
    error = decoded.float() - frames.float()
    return per_sample(error.diff(dim=-2).abs()) + per_sample(error.diff(dim=-1).abs())


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of the posterior N(mean, exp(log_variance)) from N(0, 1), a mean over its values, (B,)."""
    mean, log_variance = mean.float(), log_variance.float()
    return per_sample(0.5 * (mean.square() + log_variance.exp() - 1 - log_variance))
