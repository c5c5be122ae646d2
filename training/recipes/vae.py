"""The VAE of small models: it learns to give frames back, from latents that stay near N(0, 1).

Nobody trains Wan's own VAE anew, and its authors published no training code. L1, a little KL and, where asked, LPIPS
are our choice; there is no adversary, so that it trains on one machine, and what large models show would come out soft.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from errors import UsageError
from training.draws import Draws
from training.losses import kl_divergence, reconstruction


class VaeTrainee(nn.Module):
    """An autoencoder whose forward pass is the whole reconstruction, for what wraps it."""

    def __init__(self, autoencoder: AutoencoderKLWan):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """frames (B, 3, 4n+1, H, W) in [-1, 1], noise (B, z, n+1, h, w) -> frames again, not clamped; the posterior's
        mean and logarithm of the variance, both (B, z, n+1, h, w), not normalised.
        """
        posterior = self.autoencoder.encode(frames).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.decode(latents), posterior.mean, posterior.logvar

    def latent_shape(self, frames: Tensor) -> tuple[int, int, int, int]:
        """(z, n+1, h, w) of the latents of frames (B, 3, 4n+1, H, W)."""
        config = self.autoencoder.config
        _, _, count, height, width = frames.shape
        factor = config.scale_factor_spatial
        return config.z_dim, (count - 1) // config.scale_factor_temporal + 1, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """As diffusers decodes, but for its clamp: a value beyond 1 would have no gradient that leads it back."""
        model = self.autoencoder
        model.clear_cache()
        x = model.post_quant_conv(latents)
        frames = []
        for i in range(latents.shape[2]):
            model._conv_idx = [0]
            part = x[:, :, i : i + 1]
            frames.append(model.decoder(part, feat_cache=model._feat_map, feat_idx=model._conv_idx, first_chunk=i == 0))
        model.clear_cache()
        decoded = torch.cat(frames, dim=2)
        return decoded if model.config.patch_size is None else unpatchify(decoded, model.config.patch_size)


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """Weights of the terms: l1 of the frames, kl of the posterior, lpips of the frames one by one.

    perceptual: pictures (N, 3, H, W) twice -> (N, …); needed where lpips is above 0 (`load_lpips`).
    """

    l1: float = 1.0
    kl: float = 1e-6
    lpips: float = 0.0
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def loss(self, decoded: Tensor, frames: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """(B,) float32."""
        losses = self.l1 * reconstruction(decoded, frames) + self.kl * kl_divergence(mean, log_variance)
        if self.lpips:
            pictures = (video.float().transpose(1, 2).flatten(0, 1) for video in (decoded, frames))  # (B·T, 3, H, W)
            distances = self.perceptual(*pictures).view(len(frames), -1)
            losses = losses + self.lpips * distances.mean(dim=1)
        return losses


def vae_step(
    recipe: VaeRecipe, trainee: Callable, frames: Tensor, draw: Draws, latent_shape: tuple[int, ...]
) -> Tensor:
    """Losses (B,) of one forward pass. latent_shape: (z, F, h, w)."""
    noise = draw.normal("posterior", latent_shape).to(frames)
    decoded, mean, log_variance = trainee(frames, noise)
    return recipe.loss(decoded, frames, mean, log_variance)


def load_lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual distance of the lpips package, frozen.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise UsageError("vae.lpips needs the lpips package: pip install lpips, or give vae.lpips 0") from error
    return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
