"""The VAE of small models: it learns to give frames back, from latents that stay near N(0, 1).

Nobody trains Wan's own VAE anew, and its authors published no training code. L1, a little KL and, where asked, edges
and LPIPS are our choice; there is no adversary, so that it trains on one machine, and what large models show would come
out soft.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor, nn

from errors import UsageError
from training.draws import Draws
from training.losses import edge_difference, kl_divergence, reconstruction


class CausalConv(WanCausalConv3d):
    """Diffusers' layer, whose first frame is a convolution in two dimensions: all that comes before it is zero, so that
    only the kernel's last slice counts. A third of the work on stills.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        left, _, above, _, before, _ = self._padding
        if x.shape[2] > 1 or cache_x is not None or before != self.kernel_size[0] - 1:
            return super().forward(x, cache_x)
        last = self.weight[:, :, -1]
        return F.conv2d(x[:, :, 0], last, self.bias, self.stride[1:], (above, left))[:, :, None]


class VaeTrainee(nn.Module):
    """An autoencoder whose forward pass is the whole reconstruction, for what wraps it.

    dtype: of convolutions and matrix products; weights, and what the loss is made of, are float32.
    """

    def __init__(self, autoencoder: AutoencoderKLWan, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.autoencoder, self.dtype = autoencoder, dtype
        for layer in autoencoder.modules():
            if isinstance(layer, WanCausalConv3d):
                layer.__class__ = CausalConv

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """frames (B, 3, 4n+1, H, W) in [-1, 1], noise (B, z, n+1, h, w) -> frames again, not clamped; the posterior's
        mean and logarithm of the variance, both (B, z, n+1, h, w), not normalised.
        """
        with torch.autocast(frames.device.type, self.dtype, enabled=self.dtype != torch.float32):
            posterior = self.autoencoder.encode(frames).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            decoded = self.decode(mean + (0.5 * log_variance).exp() * noise)
        return decoded.float(), mean, log_variance

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
    """Weights of the terms: l1 of the frames, edges of the differences between neighboring pixels, kl of the posterior,
    lpips of the frames one by one.

    perceptual: pictures (N, 3, H, W) twice -> (N, …); needed where lpips is above 0 (`load_lpips`).
    """

    l1: float = 1.0
    edges: float = 0.0
    kl: float = 1e-6
    lpips: float = 0.0
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def loss(self, decoded: Tensor, frames: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """(B,) float32."""
        losses = self.l1 * reconstruction(decoded, frames) + self.kl * kl_divergence(mean, log_variance)
        if self.edges:
            losses = losses + self.edges * edge_difference(decoded, frames)
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
